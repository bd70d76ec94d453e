"""A device for the scheduler's tests: runs batches in launch order on a model made of checksums.

The state after a token stands for all that a model knows there: the adapter, its strength and
every token so far. A cache cell holds the state at its position, so one look tells whether a row
reads what it should.
"""

from collections.abc import Iterator
from zlib import crc32

from qlorachat.engine.batch import Batch, ScheduledRow
from qlorachat.tokens import TokenRequest

VOCABULARY = 7


def root(adapter: str | None, scale: float) -> int:
    return crc32(repr((adapter, scale if adapter else None)).encode())


def advance(state: int, token: int) -> int:
    return crc32(f"{state} {token}".encode())


def next_token(state: int) -> int:
    return state % VOCABULARY


def states(request: TokenRequest, count: int) -> Iterator[int]:
    """The states at positions 0..count-1 of the prompt and its endless greedy continuation."""
    state = root(request.adapter, request.adapter_scale)
    for position in range(count):
        prompt = request.prompt[position : position + 1]
        state = advance(state, prompt[0] if prompt else next_token(state))
        yield state


def text(request: TokenRequest, count: int) -> tuple[int, ...]:
    """The first `count` tokens of the prompt and its endless greedy continuation."""
    answer = [next_token(state) for state in states(request, count)][len(request.prompt) - 1 :]
    return (request.prompt + tuple(answer))[:count]


class Device:
    """Cache cells, adapter slots and rows, as the launches so far have left them."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int], int] = {}  # (block, offset) -> state
        self.last: dict[int, tuple[int, int]] = {}  # row -> request id, last sampled token

    def launch(self, batch: Batch) -> dict[int, int]:
        """Run a batch; row -> sampled token. Rows run in any order, so none may need another."""
        self._check_slots(batch)
        self._check_independence(batch)
        tokens = {row.row: self._run(row) for row in batch.rows}
        return {row.row: tokens[row.row] for row in batch.rows if row.sample}

    def _cells(self, row: ScheduledRow, start: int, end: int) -> list[tuple[int, int]]:
        size = self.block_size
        return [(row.block_table[place // size], place % size) for place in range(start, end)]

    def _check_slots(self, batch: Batch) -> None:
        named = {(row.slot, row.request.adapter) for row in batch.rows}
        assert len(named) == len({slot for slot, _ in named}), f"a slot for two adapters: {named}"
        assert all((slot == 0) == (adapter is None) for slot, adapter in named)

    def _check_independence(self, batch: Batch) -> None:
        assert len({row.row for row in batch.rows}) == len(batch.rows)
        writes = [set(self._cells(row, row.start, row.end)) for row in batch.rows]
        for index, row in enumerate(batch.rows):
            others = set().union(*writes[:index], *writes[index + 1 :])
            assert not others.intersection(self._cells(row, 0, row.end)), "rows meet in a cell"

    def _run(self, row: ScheduledRow) -> int:
        """Compute a row's positions from the cells before them; the token after its last one."""
        truth = list(states(row.request, row.end))
        read = [self.cells.get(cell) for cell in self._cells(row, 0, row.start)]
        assert read == truth[: row.start], f"{row} reads others' positions"
        state = read[-1] if read else root(row.request.adapter, row.request.adapter_scale)
        for cell, token in zip(
            self._cells(row, row.start, row.end), self._inputs(row), strict=True
        ):
            assert state is not None
            state = self.cells[cell] = advance(state, token)
        assert state == truth[-1], f"{row} was given wrong tokens"
        if row.sample:
            self.last[row.row] = (row.request.request_id, next_token(state))
        return next_token(state)

    def _inputs(self, row: ScheduledRow) -> tuple[int, ...]:
        if row.history:
            assert row.history == text(row.request, len(row.history))
            self.last[row.row] = (row.request.request_id, -1)
        owner, token = self.last[row.row]
        assert owner == row.request.request_id, "the row's state is another request's"
        return (token,) if row.tokens is None else row.tokens
