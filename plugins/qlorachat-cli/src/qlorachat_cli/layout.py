"""A growing answer as rows of the screen; a finished row is handed out once and never changes."""

from collections.abc import Callable

from qlorachat_cli.markdown import Piece, Row, split

Render = Callable[[str], list[Row]]

_CLOSING_ROWS = 2  # of a code block: the margin below, and a last line that may still change


class Layout:
    """Cuts Markdown into rows that are final and rows that the next words may change."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._source = ""  # from the first piece that is not finished
        self._handed_out = 0  # rows of that piece
        self._follows_item = False  # whether that piece is one more item of a list
        self._is_first = True  # whether nothing precedes it

    def add(self, text: str) -> None:
        """Let the answer grow."""
        self._source += text

    def take(self) -> list[Row]:
        """The rows that became final since the last call.

        Only whole lines decide: a line's meaning is open until its end is known.
        """
        whole, newline, _ = self._source.rpartition("\n")
        pieces = self._pieces(whole + newline)
        if not pieces:
            return []
        rows = self._finish(pieces[:-1])
        self._follows_item = pieces[-1].follows_item
        if pieces[-1].is_fence:
            rows += self._growth(pieces[-1])
        return rows

    def take_rest(self) -> list[Row]:
        """All rows that are left: the answer has ended."""
        return self._finish(self._pieces(self._source))

    def open_rows(self) -> list[Row]:
        """The rows that are not final yet."""
        pieces = self._pieces(self._source)
        rows: list[Row] = []
        for index, piece in enumerate(pieces):
            rows += self._rows(piece, is_first=self._is_first and index == 0)
        return rows[self._handed_out :]

    def _pieces(self, source: str) -> list[Piece]:
        pieces = split(source)
        if pieces and self._follows_item:
            pieces[0] = Piece(pieces[0].source, follows_item=True)
        return pieces

    def _finish(self, pieces: list[Piece]) -> list[Row]:
        rows: list[Row] = []
        for piece in pieces:
            rows += self._rows(piece, is_first=self._is_first)[self._handed_out :]
            self._handed_out, self._is_first = 0, False
            self._source = self._source.removeprefix(piece.source)
        return rows

    def _growth(self, fence: Piece) -> list[Row]:
        """The new rows of a code block that goes on: its lines never move."""
        rows = self._rows(fence, is_first=self._is_first)[:-_CLOSING_ROWS]
        growth = rows[self._handed_out :]
        self._handed_out += len(growth)
        return growth

    def _rows(self, piece: Piece, *, is_first: bool) -> list[Row]:
        gap: list[Row] = [] if is_first or piece.follows_item else [[]]
        return gap + self._render(piece.source)
