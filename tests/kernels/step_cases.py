"""Random inputs of a fused decode step's kernels, with poison where nothing may look or write."""

from itertools import accumulate
from typing import NamedTuple

import torch

from qlorachat.kernels.sums import RowAdapters
from qlorachat.kernels.tiles import rows_padded, tiled_shape
from tests.kernels.cases import POISON

UNTOUCHED = 7.0  # in the padding of a tiled x


class StepCase(NamedTuple):
    """What a product leaves; NaN in its padding rows, but for sums beyond its last 8 rows."""

    sums: torch.Tensor
    adapters: RowAdapters | None
    squares: torch.Tensor


def make_step(
    dtype: torch.dtype, rows: int, parts: tuple[int, ...], rank: int | None, slots: int = 3
) -> StepCase:
    """`parts`: rows of the projection's parts. Without `rank` there is no adapter."""
    torch.manual_seed(rows + sum(parts))
    padded, outputs = rows_padded(rows), sum(parts)
    adapters = None
    if rank is not None:
        adapters = RowAdapters(
            shrunk=_poisoned(torch.randn(slots * len(parts) * rank, padded), rows),
            b=(torch.randn(slots, outputs, rank) / rank**0.5).to(dtype),
            slots=torch.randint(0, slots + 1, (rows,), dtype=torch.int32),
            scales=torch.rand(rows) * 2,
        )
    sums = _poisoned(torch.randn(outputs, padded), rows)
    sums[:, -(-rows // 8) * 8 :] = 0
    return StepCase(
        sums=sums,
        adapters=adapters,
        squares=_poisoned(100 * torch.rand(padded), rows),
    )


def make_tiled(dtype: torch.dtype, columns: int, padded: int) -> torch.Tensor:
    return torch.full(tiled_shape(columns, padded), UNTOUCHED, dtype=dtype)


def columns_of(parts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(parts, initial=0))


def _poisoned(values: torch.Tensor, rows: int) -> torch.Tensor:
    values[..., rows:] = POISON
    return values
