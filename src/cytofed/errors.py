"""Every error that cytofed raises on purpose, and the exit code it ends a command with.

::

    CytofedError                 1  internal error or failed run
    |- InputError                2  bad input or usage; names what, the value, the way out
    |- RefusedError              3  refused by a lab's policy or budget
    |- IncompleteError           4  the run ended without some lab or round
    `- VerificationError         5  a signature, hash chain, commitment or audit does not hold

A message says what was expected and what was found; ``hint`` is the next step to take.
"""

from __future__ import annotations


class CytofedError(Exception):
    """Base of all expected errors."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(CytofedError):
    """A file, flag, plan or data set that cannot be used as it is."""

    exit_code = 2


class RefusedError(CytofedError):
    """A lab's policy, approval or budget says no."""

    exit_code = 3


class IncompleteError(CytofedError):
    """A model exists, but rounds are missing or a lab never contributed."""

    exit_code = 4


class VerificationError(CytofedError):
    """Something that must hold does not: signature, chain, commitment, claimed epsilon."""

    exit_code = 5
