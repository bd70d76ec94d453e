"""Markdown for a chat: cut into pieces that render alone, and shown without losing text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax

Row = list[Segment]  # one line of the screen, without its line end

_LINE = re.compile(r"[^\n]*\n|[^\n]+")  # lines as Markdown counts them, each with its end

# HTML, link definitions and image addresses would vanish, so they stay the text that they are.
_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["reference", "html_block", "html_inline", "image"])
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Source that renders by itself: a block, or one item of a list."""

    source: str
    follows_item: bool = False  # an item after another of one list: no blank line between
    is_fence: bool = False


def split(source: str) -> list[Piece]:
    """The pieces of a text, in order; together they are all of it. Blank text has none."""
    starts = list(_starts(_PARSER.parse(source)))
    if not starts:  # nothing but blank lines
        return []
    lines = _LINE.findall(source)
    begins = [0, *(start.line for start in starts[1:]), len(lines)]
    return [
        Piece("".join(lines[begin:end]), start.follows_item, start.is_fence)
        for start, begin, end in zip(starts, begins[:-1], begins[1:], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Start:
    line: int
    follows_item: bool = False
    is_fence: bool = False


def _starts(tokens: list[Token]) -> Iterator[_Start]:
    """Where the pieces begin: at each outermost block, in lists at each item."""
    first_item = True
    for token in tokens:
        if token.map is None:
            continue
        if token.level == 0 and token.type in ("bullet_list_open", "ordered_list_open"):
            first_item = True
        elif token.level == 1 and token.type == "list_item_open":
            yield _Start(token.map[0], follows_item=not first_item)
            first_item = False
        elif token.level == 0:
            yield _Start(token.map[0], is_fence=token.type == "fence")


def render(console: Console, options: ConsoleOptions, source: str) -> list[Row]:
    """The rows of a piece, without empty rows around it and empty space behind them."""
    rows = [_trimmed(row) for row in console.render_lines(ChatMarkdown(source), options, pad=False)]
    filled = [index for index, row in enumerate(rows) if row]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def _trimmed(row: Row) -> Row:
    """The row up to its last text; the ground of a code block is no empty space."""
    for index in range(len(row) - 1, -1, -1):
        text, style, _ = row[index]
        if style and style.bgcolor:
            return row[: index + 1]
        if text := text.rstrip(" "):
            return [*row[:index], Segment(text, style)]
    return []


class _LeftHeading(Heading):
    """A heading at the left, where the answer's text is."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _PlainCode(CodeBlock):
    """Code without a margin at its left, so that it can be copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(1, 0))


class ChatMarkdown(Markdown):
    """Rich's Markdown that keeps line breaks, HTML, link targets and all else that was said."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _LeftHeading,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }

    def __init__(self, source: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(source)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
