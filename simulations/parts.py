"""What the pages of runs, audits and sweeps are made of: sections, tables, figures, one style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from cytofed import figures
from cytofed.privacy.accounting import shown


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def warning_box(text: str) -> str:
    return f'<p class="warning">{escape(text)}</p>'


def scroll(inner: str) -> str:
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def drawing(figure: Figure, name: str, label: str, caption: str) -> str:
    """A figure with its caption.

    A wide one scrolls on a phone, where it would be too small; none grows beyond legible.
    """
    width_px = int(figure.get_figwidth() * 72)
    least_px = int(1.2 * width_px) if width_px > 400 else 0
    svg = figures.inline_svg(figure, name=name, label=label, min_width_px=least_px)
    growth = 1.35 if least_px else 1.6
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure style="max-width:{int(growth * width_px)}px">{scroll(svg)}{below}</figure>'


def table_of(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int, wrap: bool = False
) -> str:
    """A table whose first ``texts`` columns are text and whose others are numbers."""
    sides = ["" if i < texts else ' class="num"' for i in range(len(head))]
    top = "".join(
        f"<th scope=col{side}>{escape(h)}</th>" for side, h in zip(sides, head, strict=True)
    )
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = "".join(
        "<tr>"
        + "".join(
            f"<th scope=row>{escape(v)}</th>" if i == 0 else f"<td{sides[i]}>{escape(v)}</td>"
            for i, v in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table{' class=wrap' if wrap else ''}>{top}<tbody>{body}</tbody></table>"


def number(value: Any) -> str:
    """A number in at most four digits; a dash for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def in_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def in_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest}s"
    return f"{minutes // 60}h {minutes % 60}m"


def in_epsilon(epsilon: float | None) -> str:
    return "–" if epsilon is None else shown(epsilon)


def token(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


CSS = """
header{margin-bottom:20px}
.status{display:inline-block;margin:0 0 10px;padding:1px 12px;border-radius:99px;
border:1.5px solid var(--second);color:var(--second);font-weight:600;font-size:14px}
.status.completed{border-color:var(--third);color:var(--third)}
.warning{max-width:none}
.claim{font-size:18px;font-weight:600}
.tiles{grid-template-columns:repeat(auto-fit,minmax(124px,1fr));margin:18px 0 0}
.tile dd{line-height:1.3;white-space:nowrap}
.tile p{color:var(--muted);font-size:12.5px;line-height:1.35}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));
gap:16px 28px;align-items:start}
@media (min-width:900px){.grid.uneven{grid-template-columns:5fr 7fr}}
.grid>*{min-width:0}
figure{margin:0 0 12px}
figcaption{color:var(--muted);font-size:14px;max-width:75ch}
svg{display:block;width:100%;height:auto;font-family:inherit}
thead th{vertical-align:bottom}
tbody th{white-space:nowrap}
.num{text-align:right;font-variant-numeric:tabular-nums}
.wrap td{overflow-wrap:anywhere}
.wrap td:not(.num){min-width:15ch}
.wrap td.num{white-space:nowrap}
.wrap tbody th{white-space:normal;min-width:12ch}
.examples img{border-radius:4px;margin:0 3px 0 0}
.examples td{white-space:nowrap}
summary{cursor:pointer;color:var(--first)}
@media (max-width:600px){main{padding:20px 10px 32px}section{padding:14px 12px}
h1{font-size:23px}.lead{font-size:16px}
.tiles{grid-template-columns:1fr 1fr}.tile dd{font-size:22px}}
@media print{body{font-size:13px}.grid{grid-template-columns:1fr 1fr}
.grid.uneven{grid-template-columns:2fr 3fr}th,td{padding-right:6px}
figure,tr{break-inside:avoid}svg{min-width:0!important}
.wrap td:not(.num),.wrap tbody th{min-width:0}.examples img{width:48px;height:48px}
details::details-content{content-visibility:visible;block-size:auto}}
"""
