"""What a streamed answer leaves on a real terminal's screen: the rows of the whole, each once."""

import re
from io import StringIO

import pytest
from rich.console import Console

from qlorachat_cli import answers
from qlorachat_cli.answers import MarkdownView, PlainView, visible

WIDTH, HEIGHT = 40, 8
LONG = (
    "# Title\n\n"
    + "\n".join(f"- item {n} with words that go on and on until they wrap" for n in range(12))
    + "\n\n```python\n"
    + "\n".join(f"x{n} = {n}" for n in range(20))
    + "\n```\n\n"
    + "\n".join(f"> 引用 {n}" for n in range(15))
    + "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end."
)


class Screen:
    """As much of a terminal as rich's Live uses; what scrolled off the top can't be reached."""

    _CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")

    def __init__(self) -> None:
        self.rows = [""]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        assert "".join(match.group() for match in self._CODES.finditer(text)) == text
        for match in self._CODES.finditer(text):
            argument, command, carriage_return, line_feed, shown = match.groups()
            if command:
                self._obey(argument, command)
            elif carriage_return:
                self._column = 0
            elif line_feed:
                self._new_line()
            else:
                self._show(shown)

    def _obey(self, argument: str, command: str) -> None:
        if command == "A":
            self._row -= int(argument)
            assert self._row >= max(len(self.rows) - HEIGHT, 0), "the cursor left the screen"
        elif command == "K":
            self.rows[self._row] = ""
        else:
            assert command in "mhl", f"unexpected {argument}{command}"

    def _new_line(self) -> None:
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.rows):
            self.rows.append("")

    def _show(self, text: str) -> None:
        row = self.rows[self._row]
        self.rows[self._row] = row[: self._column] + text + row[self._column + len(text) :]
        self._column += len(text)


def console(file: StringIO) -> Console:
    return Console(
        file=file,
        width=WIDTH,
        height=HEIGHT,
        force_terminal=True,
        legacy_windows=False,
        _environ={},
    )


def stream(text: str, length: int) -> list[str]:
    """The screen's rows after `text` came in pieces of `length` characters."""
    file = StringIO()
    with MarkdownView(console(file)) as view:
        for start in range(0, len(text), length):
            view.feed(text[start : start + length])
    screen = Screen()
    screen.write(file.getvalue())
    return [row.rstrip() for row in screen.rows]


@pytest.fixture
def every_piece_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "REDRAW_SECONDS", 0.0)


@pytest.mark.usefixtures("every_piece_is_drawn")
@pytest.mark.parametrize("length", [1, 7, 100])
def test_a_streamed_answer_leaves_the_rows_of_the_whole(length: int) -> None:
    rows = stream(LONG, length)
    assert rows == stream(LONG, len(LONG))
    words = [row for row in rows if "item" in row or " = " in row or "引用" in row]
    assert len(words) == len(set(words)) == 12 + 20 + 15
    assert rows[-2:] == ["The end.", ""]


@pytest.mark.usefixtures("every_piece_is_drawn")
def test_one_draw_is_one_write_so_that_nothing_flickers() -> None:
    writes: list[str] = []

    class File(StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return super().write(text)

    with MarkdownView(console(File())) as view:
        view.feed("one\n\ntwo\n\nthr")
        before = len(writes)
        view.feed("ee\n\nfour")
        assert len(writes) == before + 1


def test_an_answer_without_text_leaves_nothing() -> None:
    assert set(stream("", 1)) <= {""}
    file = StringIO()
    with PlainView(Console(file=file), is_terminal=True):
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a␛[2Jb"),
        ("tab\tline\r\n", "tab\tline\n"),
        ("\x07\x7f\x9b", "␇␡\ufffd"),
        ("日本語 🐻", "日本語 🐻"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_plain_text_is_exact_unless_a_terminal_would_obey_it(is_terminal: bool) -> None:
    file = StringIO()
    with PlainView(Console(file=file), is_terminal=is_terminal) as view:
        view.feed("**a**\x1b[")
        view.feed("0m")
    assert file.getvalue() == ("**a**␛[0m\n" if is_terminal else "**a**\x1b[0m\n")
