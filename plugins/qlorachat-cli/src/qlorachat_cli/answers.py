"""The answer on the screen as it comes: plain text, or Markdown whose finished rows never move."""

from collections.abc import Iterable
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from qlorachat_cli.layout import Layout
from qlorachat_cli.markdown import Row, render

REDRAW_SECONDS = 0.05
MARGIN_ROWS = 2  # of the screen's height that the moving part leaves free

# What a terminal would obey is shown as its picture (U+2400 ff.) instead.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)}
_VISIBLE = _PICTURES | {0x0D: None, 0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """The text without anything that a terminal would obey, save tab and line end."""
    return text.translate(_VISIBLE)


class AnswerView(Protocol):
    """Where an answer is shown, from entering to leaving the context."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...
    def feed(self, text: str) -> None:
        """Show more of it."""
        ...


class PlainView:
    """The text as it is; on a terminal without what the terminal would obey."""

    def __init__(self, console: Console, *, is_terminal: bool) -> None:
        self._file = console.file
        self._is_terminal = is_terminal
        self._has_text = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._has_text:
            self.feed("\n")

    def feed(self, text: str) -> None:
        self._has_text = True
        self._file.write(visible(text) if self._is_terminal else text)
        self._file.flush()


class MarkdownView:
    """Final rows are printed once; only the open end is redrawn, never taller than the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._layout = Layout(partial(render, console, console.options))  # of one width to its end
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._drawn = 0.0  # seconds of time.monotonic

    def __enter__(self) -> Self:
        self._live.start()
        self._live.update(Text("…", style="dim"), refresh=True)  # the prompt is being read
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with self._console:
            self._draw(self._layout.take_rest())
            self._live.stop()

    def feed(self, text: str) -> None:
        self._layout.add(visible(text))
        if monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw(self._layout.take())
            self._drawn = monotonic()

    def _draw(self, final: list[Row]) -> None:
        height = max(self._console.height - MARGIN_ROWS, 1)
        with self._console:  # one write for all of it: nothing flickers
            if final:
                self._live.update(_Rows([]), refresh=True)  # so that it does not scroll
                self._console.print(_Rows(final), end="", crop=False)
            self._live.update(_Rows(self._layout.open_rows()[-height:]), refresh=True)


class _Rows:
    """Rows as something that rich prints."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in self._rows:
            yield from row
            yield Segment.line()
