"""One order to many labs over any Grid, replies as they arrive, every wait bounded."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from cytofed.errors import CytofedError
from cytofed.messages import BadMessage
from cytofed.words import one_line, reason_of

T = TypeVar("T")

Cohort = Mapping[str, int]
"""The labs of a run: name -> Flower node id."""


def ask(
    grid: Grid,
    cohort: Cohort,
    kind: str,
    number: int,
    content: RecordDict,
    *,
    timeout_s: float,
) -> Iterator[tuple[str, Message | None]]:
    """Send the same content to every lab; yield (lab, reply) as replies arrive.

    The content is shared by all messages, so memory does not grow with the cohort. Labs without a
    reply by the deadline, or that could not be sent to, come last with None.
    """
    contents = ((lab, node, content) for lab, node in cohort.items())
    return ask_each(grid, contents, kind, number, timeout_s=timeout_s)


def ask_each(
    grid: Grid,
    contents: Iterable[tuple[str, int, RecordDict]],
    kind: str,
    number: int,
    *,
    timeout_s: float,
) -> Iterator[tuple[str, Message | None]]:
    """As ``ask``, each lab with a content of its own: lab, node id, content, one after the other.

    All is sent when this returns. A reply that was yielded is not kept: there is memory for one.
    """
    waiting: dict[str, str] = {}
    unsent = []
    for lab, node, content in contents:
        message = grid.create_message(content, kind, node, str(number), ttl=timeout_s)
        ids = [i for i in grid.push_messages([message]) if i]
        if ids:
            waiting[ids[0]] = lab
        else:
            unsent.append(lab)
    return _replies(grid, waiting, unsent, time.monotonic() + timeout_s)


def _replies(
    grid: Grid, waiting: dict[str, str], unsent: list[str], deadline: float
) -> Iterator[tuple[str, Message | None]]:
    pause_s = 0.001
    while waiting:
        late = time.monotonic() >= deadline
        replies = list(grid.pull_messages(list(waiting)))
        if late and not replies:  # what is there by then counts, however long it took to read it
            break
        pause_s = 0.001 if replies else min(pause_s * 2, 0.05)
        if waiting and not replies:
            time.sleep(pause_s)
        while replies:
            lab = waiting.pop(replies[0].metadata.reply_to_message_id, "")
            if lab:
                yield lab, replies.pop(0)
            else:
                del replies[0]
    for lab in [*waiting.values(), *unsent]:
        yield lab, None


def content_of(message: Message | None) -> Message:
    """The reply itself. Errors: BadMessage where there is none, or the lab says why not."""
    if message is None:
        raise BadMessage("no answer before the deadline")
    if message.has_error():
        raise BadMessage(one_line(message.error.reason or "") or f"error {message.error.code}")
    return message


def read(message: Message | None, how: Callable[[Message], T]) -> T:
    """What ``how`` makes of a lab's reply.

    Errors: BadMessage, whatever ``how`` raises. What a lab sends is that lab's failure and nobody
    else's, also where it is bad in a way that nobody has thought of.
    """
    reply = content_of(message)
    try:
        return how(reply)
    except Exception as error:
        raise BadMessage(unreadable(error)) from None


def unreadable(error: Exception) -> str:
    """Why a lab's answer cannot be read, in words that can be shown."""
    told = reason_of(error)
    return told if isinstance(error, CytofedError) else f"its answer cannot be read: {told}"


class Pauses:
    """When to ask again for what was refused: ``first_s`` later, then each time ``longer``."""

    def __init__(
        self,
        first_s: float,
        most_s: float,
        *,
        longer: float = 2.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s, self._most_s, self._longer, self._now = first_s, most_s, longer, now
        self._until: dict[Hashable, tuple[float, float]] = {}
        """the end of a pause, and its length"""

    def over(self, key: Hashable) -> bool:
        """Whether to ask now; yes of what was never refused."""
        end, _ = self._until.get(key, (0.0, 0.0))
        return self._now() >= end

    def refused(self, key: Hashable) -> float:
        """Begin the next pause; returns its seconds."""
        _, before_s = self._until.get(key, (0.0, 0.0))
        pause_s = max(self._first_s, min(self._longer * before_s, self._most_s))
        now = self._now()
        past = [other for other, (end, _) in self._until.items() if end + 2 * self._most_s < now]
        for other in past:  # not asked about any more
            del self._until[other]
        self._until[key] = now + pause_s, pause_s
        return pause_s
