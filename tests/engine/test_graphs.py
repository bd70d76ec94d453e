"""What decode graphs are captured for; to capture one needs a card."""

import pytest
import torch

from qlorachat.engine.backend import PagedBackend
from qlorachat.engine.batch import ScheduledRow
from qlorachat.engine.graphs import DecodeGraphs
from qlorachat.model import KVCache, Rows
from qlorachat.tokens import SamplingParams, TokenRequest
from tests.engine.test_exact import make_adapter, open_small

REQUEST = TokenRequest(1, (5,), SamplingParams(), frozenset())


@pytest.mark.parametrize(
    ("slots", "adapters", "ranks"),
    [((0,), 0, 0), ((3, 0, 3), 1, 16), ((1, 2), 2, 48), ((0, 1, 3), 2, 32), ((2,), 1, 48)],
)
def test_adapters_of_the_rows(
    slots: tuple[int, ...], adapters: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of one adapter know no second, and no more ranks than rows have: others are other
    graphs."""
    backend = PagedBackend(open_small())
    runner = backend._runner
    stacks = runner._model.adapters
    stacks.allocate(3, 48)
    for slot, rank in enumerate((20, 40, 4), start=1):
        stacks.write(slot, make_adapter(rank))
    graphs = DecodeGraphs(runner._model, runner._cache, runner._last, 16)
    rows = [
        ScheduledRow(REQUEST, row, slot, 4, None, (row,), True) for row, slot in enumerate(slots)
    ]
    shape = graphs._shape(rows)
    assert (shape.adapters, shape.ranks) == (adapters, ranks)
    assert shape.size >= len(rows)
    given: list[Rows] = []

    def note(rows: Rows, cache: KVCache) -> torch.Tensor:
        given.append(rows)
        return torch.zeros(len(rows.ids), 64)

    monkeypatch.setattr(runner._model, "hidden", note)
    graphs._step(shape)
    (own,) = (each.lora for each in given)
    assert (own.active, own.one, own.ranks) == (adapters > 0, adapters == 1, ranks)
    backend.close()
