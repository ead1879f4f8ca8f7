"""When the coordinator asks again."""

from __future__ import annotations

import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from cytofed.errors import VerificationError
from cytofed.messages import BadMessage, new_message
from cytofed.server.asking import Pauses, read


@given(first_s=st.floats(0.01, 100), most_s=st.floats(100, 10_000), refusals=st.integers(1, 30))
def test_each_pause_is_twice_the_one_before_up_to_the_longest(
    first_s: float, most_s: float, refusals: int
) -> None:
    pauses = Pauses(first_s, most_s, now=lambda: 0.0)
    told = [pauses.refused("lab-1") for _ in range(refusals)]
    assert told == [min(first_s * 2**k, most_s) for k in range(refusals)]


def test_nothing_is_asked_again_within_its_pause_and_others_do_not_wait_with_it() -> None:
    clock = [5.0]
    pauses = Pauses(2.0, 60.0, now=lambda: clock[0])
    assert pauses.over(("run", "lab-1"))  # never refused
    pauses.refused(("run", "lab-1"))
    clock[0] = 6.9
    assert not pauses.over(("run", "lab-1"))
    assert pauses.over(("run", "lab-2"))
    assert pauses.over(("another run", "lab-1"))
    clock[0] = 7.0
    assert pauses.over(("run", "lab-1"))
    pauses.refused(("run", "lab-1"))
    clock[0] = 10.9
    assert not pauses.over(("run", "lab-1"))


def reply(error: Error | None = None) -> Message:
    message = new_message(RecordDict(), kind="train", node=1, group="1", ttl_s=1.0)
    return Message(error, reply_to=message) if error else message


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("division by zero"), "cannot be read: ZeroDivisionError: division by"),
        (MemoryError(), "cannot be read: MemoryError"),
        (RecursionError("deep"), "cannot be read: RecursionError"),
        (VerificationError("forged\x1b[31m"), r"forged \[31m"),
        (BadMessage("no header"), "no header"),
    ],
)
def test_whatever_reading_a_reply_raises_is_a_bad_message(error: Exception, told: str) -> None:
    def how(_message: Message) -> None:
        raise error

    with pytest.raises(BadMessage, match=told):
        read(reply(), how)


def test_silence_and_a_reason_are_bad_messages_too() -> None:
    with pytest.raises(BadMessage, match="no answer before the deadline"):
        read(None, str)
    with pytest.raises(BadMessage, match=r"^busy  now$"):
        read(reply(Error(100, "busy\r\nnow")), str)


def test_pauses_of_what_is_not_asked_about_any_more_are_forgotten() -> None:
    clock = [0.0]
    pauses = Pauses(1.0, 60.0, now=lambda: clock[0])
    for number in range(10_000):
        clock[0] += 1.0
        pauses.refused((f"run-{number}", "lab-1"))
    assert len(pauses._until) < 200
