"""Words of the other side, fit to be shown.

Names, reasons and error texts that somebody else wrote end up in logs, terminals, pages and
documents. Whoever shows them passes them through here first: an escape sequence moves a cursor, a
newline forges a line of a log, a bidi control turns a sentence round.
"""

from __future__ import annotations

import re

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


def markdown(text: object, *, most: int = MOST_CHARS) -> str:
    """``text`` as Markdown that shows it as it is, on one line.

    Guarantees: as ``one_line``; nothing of it becomes markup, HTML, a link or an image.
    """
    line = " ".join(one_line(text, most=most).split())
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~!&@])", r"\\\1", line)
    return re.sub(r"(?i)(www)\.|(:)//", lambda m: f"{m[1]}\\." if m[1] else r"\://", escaped)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; an unexpected one with its type."""
    if isinstance(error, CytofedError):
        return one_line(error.message)
    return one_line(f"{type(error).__name__}: {error}")
