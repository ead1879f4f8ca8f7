"""The frame of the pages that cytofed writes: one file, no scripts, nothing loaded, light or dark.

The colours are those of the figures, too.
"""

from __future__ import annotations

from html import escape

from cytofed.words import printable

INK, MUTED, GRID, PAPER = "#1c2030", "#646b7d", "#d9dce4", "#fffffe"
# Azure and eosin of the May-Gruenwald-Giemsa stain, and a third that colour-blind eyes tell apart.
FIRST, SECOND, THIRD = "#5a45b0", "#c0475d", "#1b8272"
LIGHT = (
    f"--page:#f5f6f9;--paper:#ffffff;--ink:{INK};--muted:{MUTED};--grid:{GRID};"
    f"--first:{FIRST};--second:{SECOND};--third:{THIRD};--tint:#fbeef0;"
)
_DARK = (
    "--page:#12141a;--paper:#1b1e27;--ink:#e8eaf2;--muted:#9ea5b8;--grid:#353a48;"
    "--first:#a99bf5;--second:#f08a9c;--third:#5cc7b6;--tint:#33222a;"
)


def page(*, title: str, heading: str, headline: str, sections: str, css: str, footer: str) -> str:
    """The page. ``title``, ``heading`` are text; the rest is HTML; ``css`` comes after the common.

    Its content policy allows its own styles and images that are in the page, nothing else. No
    control character, whoever wrote it, turns its text round.
    """
    made = _PAGE.format(
        title=escape(title),
        heading=escape(heading),
        headline=headline,
        sections=sections,
        css=_CSS + css,
        footer=footer,
    )
    return printable(made)


_CSS = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
main{{max-width:1120px;margin:0 auto;padding:32px 16px 48px}}
h1{{font-size:28px;line-height:1.2;margin:0 0 8px;overflow-wrap:anywhere}}
h2{{font-size:19px;margin:0 0 10px}}
p{{margin:0 0 12px;max-width:75ch}}
section{{background:var(--paper);border:1px solid var(--grid);border-radius:10px;
padding:18px 20px;margin-bottom:16px}}
.lead{{font-size:18px}}
.warning{{border-left:4px solid var(--second);background:var(--tint);padding:8px 12px;
border-radius:4px}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:10px}}
.tile{{background:var(--paper);border:1px solid var(--grid);border-radius:10px;padding:9px 12px}}
.tile dt{{color:var(--muted);font-size:13px}}
.tile dd{{margin:0;font-size:23px;font-weight:650;font-variant-numeric:tabular-nums}}
.tile p{{margin:0;overflow-wrap:anywhere}}
.scroll{{overflow-x:auto}}
.scroll:focus-visible,summary:focus-visible{{outline:2px solid var(--first);outline-offset:2px}}
table{{border-collapse:collapse;font-size:14px;margin:4px 0 12px}}
th,td{{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--grid);
vertical-align:top}}
thead th{{color:var(--muted);font-weight:500}}
tbody th{{font-weight:600}}
pre{{margin:0 0 12px;padding:10px 12px;background:var(--page);border-radius:6px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
code{{font:0.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
footer{{color:var(--muted);font-size:13px}}
@media print{{:root{{color-scheme:light;{LIGHT}--page:#fff}}
main{{max-width:none;padding:0}}section{{border:0;padding:0}}table{{font-size:10px}}
.scroll{{overflow:visible}}pre{{white-space:pre-wrap}}
.tile{{break-inside:avoid}}h2{{break-after:avoid}}}}
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header><h1>{heading}</h1>{headline}</header>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""
