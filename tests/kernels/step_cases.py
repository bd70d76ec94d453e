"""Random inputs of a fused decode step's kernels, with poison where nothing may look or write."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional

from qlorachat.kernels.sums import RowAdapters
from qlorachat.kernels.tiles import tiled_shape
from tests.kernels.cases import POISON, LoraCase, make_lora

UNTOUCHED = 7.0  # in the padding of a tiled x
HIDDEN = 128  # columns of the products' x
EPS = 1e-5


class StepCase(NamedTuple):
    """What a product leaves; A x is NaN but for each row's own slot."""

    sums: torch.Tensor
    adapters: RowAdapters | None
    squares: torch.Tensor


def make_tiled(dtype: torch.dtype, columns: int, padded: int) -> torch.Tensor:
    return torch.full(tiled_shape(columns, padded), UNTOUCHED, dtype=dtype)


def assert_untouched(x: torch.Tensor, rows: int, columns: int) -> None:
    """A tiled x, allocated by `make_tiled`, whose padding is as it was."""
    expected = make_tiled(x.dtype, columns, x.shape[1])
    blocks = columns // 64
    expected[:blocks, :rows] = x[:blocks, :rows]
    assert torch.equal(x, expected)


def make_case(rows: int, parts: tuple[int, ...], rank: int | None) -> LoraCase:
    """x [rows, HIDDEN] and its projection; without `rank` no row has an adapter."""
    case = make_lora(
        torch.float32, rows=rows, inputs=HIDDEN, rank=rank or 16, parts=parts, adapters=3
    )
    if rank is None:
        case.slots.zero_()
    else:
        case.slots[:3] = torch.tensor([0, 3, 1])
    return project(case, case.x)


def project(case: LoraCase, x: torch.Tensor) -> LoraCase:
    """The case with y = W x of a weight that depends on its shape alone."""
    weight = torch.randn(
        case.columns[-1], x.shape[1], generator=torch.Generator().manual_seed(5)
    ).div(x.shape[1] ** 0.5)
    return replace(case, x=x, y=x @ weight.T)


def run_product(case: LoraCase) -> StepCase:
    """What the product leaves for a case."""
    adapters = None
    if case.slots.any():
        shrunk = case.x @ case.a.flatten(0, 1).T
        every = shrunk.view(len(case.x), len(case.a), -1)
        slots = torch.arange(1, len(case.a) + 1)
        every[case.slots[:, None] != slots] = POISON
        adapters = RowAdapters(shrunk, case.b, case.slots, case.scales)
    return StepCase(case.y.clone(), adapters, (case.x**2).sum(1))


def put_norm_off(case: LoraCase, h: torch.Tensor, weight: torch.Tensor) -> StepCase:
    """What the product leaves for h * weight, and the squares of h."""
    return run_product(project(case, h * weight))._replace(squares=(h**2).sum(1))


def normed(case: LoraCase, h: torch.Tensor, weight: torch.Tensor) -> LoraCase:
    return project(case, functional.rms_norm(h, h.shape[1:], weight, EPS))
