"""Words of others: whatever they are, a log, terminal, page or document shows them as words."""

from __future__ import annotations

import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

from cytofed import console
from cytofed.errors import InputError, VerificationError
from cytofed.page import page
from cytofed.plan import from_dict
from cytofed.words import LogFormatter, markdown, one_line, printable, reason_of, without_markup

HOSTILE = (
    "\x1b[2J\x1b[31mred\x1b]8;;http://evil\x07link",
    "first\r\n2026-01-01 INFO forged",
    "a\u202egnp.exe\u2066 b\u200b\u2028c\x00\x7f\x9b31m",
    "[red]x[/red] [link=http://evil]y[/link] [/]",
    "\ud800 lone, \ue000 private",
)


def shown_of(raw: str) -> bool:
    return all(
        char.isprintable() or char in "\n\t" or unicodedata.category(char) in ("Zs", "Cn")
        for char in raw
    )


@given(st.text() | st.sampled_from(HOSTILE), st.integers(1, 300))
def test_one_line_is_printable_bounded_and_keeps_what_is_fit(text: str, most: int) -> None:
    line = one_line(text, most=most)
    assert line.isprintable()
    assert len(line) <= most + len(" ...")
    if text.isprintable() and len(text) <= most:
        assert line == text


@given(st.text() | st.sampled_from(HOSTILE))
def test_printable_keeps_lines_and_lengths(text: str) -> None:
    assert shown_of(printable(text))
    assert len(printable(text)) == len(text)
    assert printable(text).count("\n") == text.count("\n")


MARKUP = st.text(st.sampled_from(list("[]()!<>\\`*_#|:/ \n\"'&@=-.~{}axhtpsw")), max_size=60)
KNOWN = (
    "![x](http://evil/a.png)",
    "[x](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "<http://evil>",
    "[x][r]\n\n[r]: http://evil",
    "http://evil www.evil.com a@evil.com",
    "\\![x](http://evil)",
    "\\\\![x](http://evil)",
    "&lt;img&gt;",
    "a | b\n|---|---|",
)
_PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
_LIVE = {"link_open", "image", "html_inline", "html_block"}


def live(text: str) -> set[str]:
    """What of a Markdown document is more than words."""
    tokens = _PARSER.parse(text)
    flat = [*tokens, *(child for token in tokens for child in token.children or [])]
    return {token.type for token in flat} & _LIVE


@given(MARKUP | st.sampled_from(KNOWN) | st.text())
def test_markdown_shows_text_and_nothing_else(text: str) -> None:
    kept = " ".join(one_line(text).split())
    tokens = _PARSER.parse(f"- name: {markdown(text)} end")
    [inline] = [token for token in tokens if token.type == "inline"]
    told = "".join(child.content for child in inline.children or [])
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    assert " ".join(told.split()) == " ".join(f"name: {kept} end".split())


@given(MARKUP | st.sampled_from(KNOWN))
def test_document_of_the_other_side_loads_nothing_and_leads_nowhere(text: str) -> None:
    assert not live(without_markup(text)), without_markup(text)


def test_document_of_the_other_side_keeps_its_tables_and_headings() -> None:
    card = "# Card\n\n- **bold** `code` \\<x\\>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert without_markup(card) == card
    assert len(without_markup("x" * 10, most=4)) == 4


def record(message: str, *arguments: object, error: BaseException | None = None) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("n", logging.WARNING, "f", 1, message, arguments, info)
    return LogFormatter().format(made)


@pytest.mark.parametrize("words", HOSTILE)
def test_nobody_forges_a_line_of_a_log(words: str) -> None:
    line = record("run %s: %s", words, "x" * 9999)
    assert line.isprintable()
    assert len(line) < 2100
    try:
        raise VerificationError(words)
    except VerificationError as error:
        first, *others = record("failed", error=error).split("\n")
    assert first.isprintable()
    assert all(other.isprintable() and other.startswith("  ") for other in others)


@pytest.mark.parametrize("words", HOSTILE)
def test_terminal_shows_words_and_runs_none(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    screen = console._Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)
    table = Table("lab")
    table.add_row(Text(words))
    screen.print(Text(words))
    screen.print(table)
    assert isinstance(screen.file, io.StringIO)
    assert shown_of(screen.file.getvalue())

    console.say(words)
    console.print_error(InputError(words, hint=words))
    out, err = capsys.readouterr()
    assert shown_of(out)
    assert shown_of(err)
    messages = [line for line in err.splitlines() if not line.startswith("  ")]
    assert [line.partition(": ")[2][:5] for line in messages] == ["error", "hint:"]


def test_page_has_no_character_that_moves_others() -> None:
    made = page(
        title=HOSTILE[0],
        heading=HOSTILE[2],
        headline=HOSTILE[2],
        sections=HOSTILE[1],
        css="",
        footer="",
    )
    assert shown_of(made)
    assert "gnp.exe" in made


def test_progress_shows_markup_of_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = console._Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(console, "stderr", screen)
    with console.RunProgress() as progress:
        progress.order("[red]run", "train", 1, 2, 3)
        progress.step(
            "[red]run", "[link=http://evil]lab[/link]", round_=1, share=0.5, loss=1.0, labs=1
        )
        progress._progress.refresh()
    assert isinstance(screen.file, io.StringIO)
    told = screen.file.getvalue()
    assert "[red]run" in told
    assert "[link=http://evil]lab[/link]" in told
    assert "\x1b]8" not in told


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"labels": {"scheme": "x\x1b[31m"}}, r"labels\.scheme"),
        ({"model": {"start": "a\nb"}}, r"model\.start"),
        ({"strategy": {"name": "fed\u202eavg"}}, r"strategy\.name"),
        ({"train": {"class_prior": {"BA\x07": 1.0}}}, r"a key below train\.class_prior"),
        ({"labels": {"scheme": "x" * 2000}}, r"labels\.scheme"),
    ],
)
def test_plan_has_printable_words_only(tree: dict[str, object], where: str) -> None:
    with pytest.raises(InputError, match=f"{where} is .* can be printed") as refusal:
        from_dict(tree)
    assert refusal.value.message.isprintable()


def test_reason_of_an_unexpected_error_names_its_type() -> None:
    assert reason_of(ValueError("a\nb")) == "ValueError: a b"
    assert reason_of(InputError("a\nb")) == "a b"
