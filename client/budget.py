"""The lab's budget as the lab half sees it: nothing is trained or scored that was not reserved.

In a deployment a person's approval makes the hold; a simulation approves for its virtual labs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cytofed.arrays import Parts, parts_sha256
from cytofed.errors import RefusedError
from cytofed.messages import Order
from cytofed.plan import Unit
from cytofed.privacy import ledger
from cytofed.privacy.ledger import Ledger
from cytofed.privacy.terms import Terms


class Budget(Protocol):
    """Spends an order before it is carried out and names the one answer that may leave.

    Training and evaluation of a round are two orders; scores are noised counts, as parts.
    """

    def reserve(self, order: Order) -> None:
        """Errors: RefusedError where no approval covers the order or a limit would be passed."""

    def release(self, order: Order, parts: Parts) -> None:
        """Errors: VerificationError where the order has released something else."""


@dataclass(frozen=True)
class LedgerBudget:
    """A budget on the ledger file at ``path``, for one pool and federation."""

    path: Path
    pool: str
    federation: str
    unit: Unit

    def approve(self, plan_sha256: str, terms: Terms, declared_patients: int) -> None:
        """Hold the full price of a plan, training and scores.

        Approving again while a hold is active changes nothing.
        """
        Ledger.create(self.path)
        with self._open() as book:
            book.hold(
                federation=self.federation,
                plan_sha256=plan_sha256,
                cost=terms.cost(declared_patients),
            )

    def approved(self, plan_sha256: str) -> bool:
        """Whether a plan was ever approved here, its rounds left or not."""
        if not self.path.is_file():
            return False
        with self._open() as book:
            return any(
                (hold.federation, hold.plan_sha256) == (self.federation, plan_sha256)
                for hold in book.holds()
            )

    def reserve(self, order: Order) -> None:
        with self._open() as book:
            book.reserve(self._entry(order))

    def release(self, order: Order, parts: Parts) -> None:
        entry = self._entry(order)
        with self._open() as book:
            book.release(entry, parts_sha256(parts))
            book.settle(entry)

    @contextmanager
    def _open(self) -> Iterator[Ledger]:
        with Ledger.open(self.path, pool=self.pool, unit=self.unit) as book:
            yield book

    def _entry(self, order: Order) -> ledger.Order:
        return ledger_order(order, self.federation)


def ledger_order(order: Order, federation: str) -> ledger.Order:
    """An order as the ledger and the outbox see it.

    Errors: RefusedError for one that releases nothing.
    """
    return ledger.Order(
        federation=federation,
        run=order.run,
        round=order.round,
        slot=order.slot,
        plan_sha256=order.plan_sha256,
        weights_sha256=order.weights_sha256,
        order_sha256=order.sha256,
        task=task_of(order),
    )


def task_of(order: Order) -> ledger.Task:
    """What an order spends. Errors: RefusedError for one that releases nothing."""
    if order.kind == "query":
        raise RefusedError("a query releases nothing that a budget pays for")
    return order.kind
