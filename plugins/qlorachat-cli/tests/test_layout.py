"""Streamed Markdown: however an answer is cut, the same rows come out, and no word is lost."""

from functools import partial
from io import StringIO
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlorachat_cli.layout import Layout
from qlorachat_cli.markdown import Row, render, split

LINES = (
    "{w}",
    "{w} **{w}** and `{w}`",
    "**{w}",
    "日本語{w}、改行。",
    "# {w}",
    "- {w}",
    "  - {w}",
    "- {w}\n\n  {w}",
    "1. {w}",
    "2. {w}",
    "> {w}",
    "```",
    "```python",
    "    {w}",
    '    x = """{w}',
    "| {w} | {w} |",
    "|---|---|",
    "[{w}]: http://{w}",
    "[{w}](http://{w}) ![{w}](http://{w})",
    "use <{w}> and <b>{w}</b>",
    "---",
    "===",
    "",
    "",
    "\t{w}",
    "{w}\u2028{w}",
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text of Markdown lines, and the words in it in order."""
    numbers = count()
    words: list[str] = []
    lines = []
    for line in draw(st.lists(st.sampled_from(LINES), max_size=25)):
        fresh = [f"w{next(numbers)}x" for _ in range(line.count("{w}"))]
        words += fresh
        lines.append(line.replace("{w}", "{}").format(*fresh))
    return "\n".join(lines), words


def console(width: int) -> Console:
    return Console(file=StringIO(), width=width, force_terminal=True, legacy_windows=False)


def layout(width: int) -> Layout:
    screen = console(width)
    return Layout(partial(render, screen, screen.options))


def plain(rows: list[Row]) -> list[str]:
    return ["".join(segment.text for segment in row) for row in rows]


def whole(text: str, width: int) -> list[str]:
    page = layout(width)
    page.add(text)
    return plain(page.take_rest())


@settings(deadline=None, max_examples=200)
@given(answers(), st.data(), st.integers(12, 60))
def test_the_rows_do_not_depend_on_how_the_answer_is_cut(
    answer: tuple[str, list[str]], data: st.DataObject, width: int
) -> None:
    text, _ = answer
    page = layout(width)
    rows: list[Row] = []
    position = 0
    while position < len(text):
        length = data.draw(st.integers(1, 40))
        page.add(text[position : position + length])
        position += length
        rows += page.take()
    assert plain(rows + page.take_rest()) == whole(text, width)


@settings(deadline=None)
@given(answers())
def test_no_word_is_lost(answer: tuple[str, list[str]]) -> None:
    text, words = answer
    shown = "\n".join(whole(text, 200))
    position = 0
    for word in words:
        position = shown.find(word, position)
        assert position >= 0, f"{word} is not shown"


@settings(deadline=None)
@given(answers())
def test_the_pieces_are_the_text(answer: tuple[str, list[str]]) -> None:
    text, _ = answer
    assert "".join(piece.source for piece in split(text)) == (text if text.strip() else "")


@settings(deadline=None)
@given(answers(), st.integers(1, 30))
def test_final_and_open_rows_are_the_answer_so_far(answer: tuple[str, list[str]], cut: int) -> None:
    text = answer[0][:cut]
    page = layout(40)
    page.add(text)
    assert plain(page.take() + page.open_rows()) == whole(text, 40)


def test_finished_items_and_code_lines_are_final_while_the_rest_goes_on() -> None:
    page = layout(40)
    page.add("- one\n- two\n- thr")
    assert plain(page.take()) == [" • one"]
    page.add("ee\n\n```python\na = 1\nb = 2\nc = 3\nd")
    final = [row.rstrip() for row in plain(page.take())]
    assert final == [" • two", " • three", "", "", "a = 1", "b = 2"]


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("春は\n夏は", ["春は", "夏は"]),
        ("use <b> or List<int>", ["use <b> or List<int>"]),
        ("[docs](https://example.org)", ["docs (https://example.org)"]),
        ("[a]: https://example.org", ["[a]: https://example.org"]),
        ("# Title\ntext", ["Title", "", "text"]),
        ("a\n\n\n\nb", ["a", "", "b"]),
        ("3. c\n4. d", [" 3 c", " 4 d"]),
        ("あいうえおかきくけこさ", ["あいうえおかきくけこ", "さ"]),
    ],
)
def test_what_is_shown(source: str, shown: list[str]) -> None:
    assert whole(source, 21 if "あ" in source else 60) == shown
