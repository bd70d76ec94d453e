"""Random inputs of a fused decode step's kernels, with poison where nothing may look or write."""

from typing import NamedTuple

import torch
from torch.nn import functional

from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.tiles import tiled_shape, untile
from tests.kernels.cases import POISON

UNTOUCHED = 7.0  # in the padding of a tiled x
HIDDEN = 128  # columns of the products' x
EPS = 1e-5
SLOTS = 4
SUMMED = 1e-5  # error of float32 sums, of the sum of sizes


class Product(NamedTuple):
    """What one leaves of an x whose norm was put off, and what it had left of the norm."""

    sums: torch.Tensor
    squares: torch.Tensor
    normed: torch.Tensor


def make_product(rows: int, outputs: int) -> Product:
    torch.manual_seed(rows + outputs)
    h, weight = torch.randn(rows, HIDDEN), torch.randn(HIDDEN)
    matrix = torch.randn(HIDDEN, outputs) / HIDDEN**0.5
    normed = functional.rms_norm(h, (HIDDEN,), weight, EPS)
    return Product((h * weight) @ matrix, (h**2).sum(1), normed @ matrix)


def make_tiled(dtype: torch.dtype, columns: int, padded: int) -> torch.Tensor:
    return torch.full(tiled_shape(columns, padded), UNTOUCHED, dtype=dtype)


def assert_untouched(x: torch.Tensor, rows: int, columns: int) -> None:
    """A tiled x, allocated by `make_tiled`, whose padding is as it was."""
    expected = make_tiled(x.dtype, columns, x.shape[1])
    blocks = columns // 64
    expected[:blocks, :rows] = x[:blocks, :rows]
    assert torch.equal(x, expected)


def make_slots(rows: int) -> torch.Tensor:
    """Of each row; the first one has an adapter, the second none, and nobody slot 2."""
    slots = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (rows,))].int()
    slots[:2] = torch.tensor([4, 0])[:rows]
    return slots


def make_shrinking(
    dtype: torch.dtype, rows: int, columns: int, rank: int | None
) -> Shrinking | None:
    """A of slots that no row has is NaN; without `rank` there are no adapters."""
    if rank is None:
        return None
    slots = make_slots(rows)
    a = (torch.randn(SLOTS, rank, columns) / columns**0.5).to(dtype)
    poison_unused(a, slots)
    return Shrinking(a, slots, earlier_shrunk(rows, SLOTS * rank))


def assert_shrunk(shrinking: Shrinking | None, x: torch.Tensor) -> None:
    """A x of a tiled x was added to what `make_shrinking` left, for each row's own slot alone."""
    if shrinking is None:
        return
    a, slots, shrunk = shrinking
    expected = earlier_shrunk(*shrunk.shape).double().view(len(slots), len(a), -1)
    sizes = torch.zeros_like(expected)
    plain = untile(x, len(slots), a.shape[2]).double()
    for row, slot in enumerate(slots.tolist()):
        if slot:
            own = a[slot - 1].double()
            sizes[row, slot - 1] = expected[row, slot - 1].abs() + own.abs() @ plain[row].abs()
            expected[row, slot - 1] += own @ plain[row]
    error = (shrunk.double() - expected.flatten(1)).abs()
    assert bool((error <= SUMMED * sizes.flatten(1)).all())


def earlier_shrunk(rows: int, ranks: int) -> torch.Tensor:
    """What A x is added to; it depends on the shape alone."""
    return torch.randn(rows, ranks, generator=torch.Generator().manual_seed(5))


def make_expanding(
    dtype: torch.dtype, rows: int, heights: tuple[int, ...], rank: int | None
) -> Expanding | None:
    """A x is NaN but for each row's own slot, B for slots that no row has."""
    if rank is None:
        return None
    slots = make_slots(rows)
    shrunk = torch.randn(rows, SLOTS, len(heights) * rank)
    shrunk[slots[:, None] != torch.arange(1, SLOTS + 1)] = POISON
    b = torch.randn(SLOTS, sum(heights), rank).to(dtype)
    poison_unused(b, slots)
    return Expanding(shrunk.flatten(1), b, slots, torch.rand(rows) * 2)


def expanded(
    expanding: Expanding | None, heights: tuple[int, ...]
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """scale * B (A x) and scale * |B| |A x| in float64, row by row and part by part."""
    if expanding is None:
        return 0.0, 0.0
    shrunk, b, slots, scales = expanding
    every = shrunk.double().view(len(slots), len(b), len(heights), -1)
    added = torch.zeros(2, len(slots), b.shape[1], dtype=torch.float64)
    for row, slot in enumerate(slots.tolist()):
        if slot:
            own = b[slot - 1].double().split(heights)
            pairs = zip(own, every[row, slot - 1], strict=True)
            parts = [torch.stack((part @ x, part.abs() @ x.abs())) for part, x in pairs]
            added[:, row] = scales[row].double() * torch.cat(parts, 1)
    return added[0], added[1]


def poison_unused(weights: torch.Tensor, slots: torch.Tensor) -> None:
    """NaN in what is stacked for slots that no row has."""
    for slot in range(1, len(weights) + 1):
        if slot not in slots:
            weights[slot - 1] = POISON
