"""What decode graphs are captured for; to capture one needs a card."""

import pytest

from qlorachat.engine.backend import PagedBackend
from qlorachat.engine.batch import ScheduledRow
from qlorachat.engine.graphs import DecodeGraphs
from qlorachat.tokens import SamplingParams, TokenRequest
from tests.engine.test_exact import open_small

REQUEST = TokenRequest(1, (5,), SamplingParams(), frozenset())


@pytest.mark.parametrize(
    ("slots", "adapters"), [((0,), 0), ((3, 0, 3), 1), ((1, 2), 2), ((0, 1, 2, 3), 2)]
)
def test_adapters_of_the_rows(slots: tuple[int, ...], adapters: int) -> None:
    """Kernels of one adapter know no second: more than one is another graph."""
    backend = PagedBackend(open_small())
    runner = backend._runner
    graphs = DecodeGraphs(runner._model, runner._cache, runner._last, 16)
    rows = [
        ScheduledRow(REQUEST, row, slot, 4, None, (row,), True) for row, slot in enumerate(slots)
    ]
    shape = graphs._shape(rows)
    assert shape.adapters == adapters
    assert shape.size >= len(rows)
    backend.close()
