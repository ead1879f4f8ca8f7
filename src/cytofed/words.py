"""Words of the other side, fit to be shown.

Names, reasons and error texts that somebody else wrote end up in logs, terminals, pages and
documents. Whoever shows them passes them through here first: an escape sequence moves a cursor, a
newline forges a line of a log, a bidi control turns a sentence round.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from cytofed.errors import CytofedError

MOST_CHARS = 200
"""of a reason, shown to people"""


def one_line(text: object, *, most: int = MOST_CHARS) -> str:
    """``text`` as one line of at most ``most`` characters (and `` ...`` where it was longer).

    Guarantees: printable characters only, so no control or escape characters, line breaks, bidi
    or zero-width controls, unassigned or private characters; each becomes a space.
    """
    whole = str(text)
    plain = "".join(char if char.isprintable() else " " for char in whole[:most])
    return plain if len(whole) <= most else f"{plain} ..."


class _Fit(dict[int, int]):
    """What each character is shown as, found when it is first asked for."""

    def __missing__(self, code: int) -> int:
        fit = chr(code) in "\n\t" or unicodedata.category(chr(code)) not in _NO_WORDS
        self[code] = code if fit else ord(" ")
        return self[code]


_NO_WORDS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""control, format (bidi and zero-width among them), surrogate, private, line and paragraph ends"""
_FIT = _Fit()


def printable(text: str) -> str:
    """``text`` in its lines and tabs, character by character; what is no part of a word, or moves
    others, is a space."""
    return text if text.isascii() and text.isprintable() else text.translate(_FIT)


def markdown(text: object, *, most: int = MOST_CHARS) -> str:
    """``text`` as Markdown that shows it as it is, on one line.

    Guarantees: as ``one_line``; nothing of it becomes markup, HTML, a link or an image.
    """
    line = " ".join(one_line(text, most=most).split())
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~!&@])", r"\\\1", line)
    return re.sub(r"(?i)(www)\.|(:)//", lambda m: f"{m[1]}\\." if m[1] else r"\://", escaped)


def without_markup(card: str, *, most: int = 1 << 20) -> str:
    """A Markdown document of the other side, in which nothing is HTML, an image or a link.

    Headings, lists, tables and emphasis stay; of more than ``most`` characters the rest is gone.
    """
    plain = printable(card[:most])
    return re.sub(r"(?<!\\)((?:\\\\)*)(<|!(?=\[)|(?<=\])[(:\[])", r"\1\\\2", plain)


class LogFormatter(logging.Formatter):
    """Records as lines that nobody else can forge: a message is one line, a traceback its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message, most=2000)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        # Indented: what an error of the other side says looks like no record of this log.
        return "\n".join(f"  {one_line(line)}" for line in super().formatException(ei).split("\n"))


def log_to_stderr(*, quiet: Sequence[str]) -> None:
    """Have this process's log on stderr; of these libraries warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; an unexpected one with its type."""
    if isinstance(error, CytofedError):
        return one_line(error.message)
    return one_line(f"{type(error).__name__}: {error}")
