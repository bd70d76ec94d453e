"""Random inputs of a fused decode step's kernels, with poison where nothing may look or write."""

import itertools
from typing import NamedTuple

import torch
from torch.nn import functional

from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.nf4 import Nf4Matrix
from qlorachat.kernels.tiles import tiled_shape, untile
from tests.kernels.cases import POISON, rank_rows

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


def make_slots(rows: int, count: int, one: bool = False) -> torch.Tensor:
    """Of each row; the first one has an adapter, the second none, and nobody slot 2."""
    known = torch.tensor([0, count] if one else [s for s in range(count + 1) if s != 2])
    slots = known[torch.randint(0, len(known), (rows,))].int()
    slots[:2] = torch.tensor([count, 0])[:rows]
    return slots


def make_shrinking(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    rank: int | None,
    count: int = SLOTS,
    *,
    one: bool = False,
    more: int = 0,
) -> Shrinking | None:
    """A of slots that no row has is NaN; without `rank` there are no adapters.

    rank: of all parts together. more: ranks beyond those that rows have, in NaN.
    """
    if rank is None:
        return None
    slots = make_slots(rows, count, one)
    a = (torch.randn(count, rank + more, columns) / columns**0.5).to(dtype)
    a[:, rank:] = POISON
    poison_unused(a, slots)
    shrunk = apart(earlier_shrunk(rows, a.shape[1]))
    return Shrinking(a, slots, shrunk, one, rank if more else None)


def assert_shrunk(shrinking: Shrinking | None, x: torch.Tensor) -> None:
    """A x of a tiled x was added to what `make_shrinking` left, for each row's own slot alone."""
    if shrinking is None:
        return
    a, slots, shrunk = shrinking[:3]
    expected = earlier_shrunk(*shrunk.shape).double()
    sizes = torch.zeros_like(expected)
    plain, ranks = untile(x, len(slots), a.shape[2]).double(), slice(shrinking.own_ranks)
    for row, slot in enumerate(slots.tolist()):
        if slot:
            own, before = a[slot - 1, ranks].double(), expected[row, ranks]
            sizes[row, ranks] = before.abs() + own.abs() @ plain[row].abs()
            before += own @ plain[row]
    assert bool(((shrunk.double() - expected).abs() <= SUMMED * sizes).all())


def assert_adapters(
    own: Shrinking | Expanding, given: Shrinking | Expanding, x: torch.Tensor | None
) -> None:
    """A x of a tiled x was added, if they shrink; nothing else of them changed."""
    for name, new, old in zip(own._fields, own, given, strict=True):
        if isinstance(own, Shrinking) and name == "shrunk":
            assert x is not None
            assert_shrunk(own, x)
        elif not isinstance(new, torch.Tensor):
            assert new == old
        else:
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, with poison between them."""
    wider = rows.new_full((len(rows), rows.shape[1] + 4), POISON)
    wider[:, : rows.shape[1]] = rows
    return wider[:, : rows.shape[1]]


def earlier_shrunk(rows: int, ranks: int) -> torch.Tensor:
    """What A x is added to; it depends on the shape alone."""
    return torch.randn(rows, ranks, generator=torch.Generator().manual_seed(5))


def make_expanding(
    dtype: torch.dtype,
    rows: int,
    heights: tuple[int, ...],
    rank: int | None,
    count: int = SLOTS,
    *,
    one: bool = False,
    more: int = 0,
) -> Expanding | None:
    """A x is NaN for rows without adapter, B for slots that no row has.

    more: ranks beyond those that rows have, in NaN.
    """
    if rank is None:
        return None
    slots = make_slots(rows, count, one)
    shrunk = torch.randn(rows, len(heights) * (rank + more))
    shrunk[slots == 0] = POISON
    shrunk[:, len(heights) * rank :] = POISON
    b = torch.randn(count, sum(heights), rank + more).to(dtype)
    b[..., rank:] = POISON
    poison_unused(b, slots)
    scales, ranks = torch.rand(rows) * 2, rank if more else None
    return Expanding(apart(shrunk), b, slots, scales, one, ranks)


def make_exact_expanding(dtype: torch.dtype, rows: int, heights: tuple[int, ...]) -> Expanding:
    """In whole numbers: what it adds to `exact_sums` is exact in float32."""
    expanding = make_expanding(dtype, rows, heights, 16)
    assert expanding is not None
    scales = torch.randint(1, 3, (rows,)).float()
    shrunk = apart(expanding.shrunk.round())
    return Expanding(shrunk, expanding.b.round(), expanding.slots, scales)


def exact_sums(rows: int, outputs: int) -> torch.Tensor:
    return torch.randn(rows, outputs).mul(256).round() / 256


def beside(*ranks: int) -> list[tuple[type[Shrinking | Expanding] | None, int | None]]:
    """Kinds of adapters and ranks for `make_beside`: first of all none."""
    return [(None, None), *itertools.product((Shrinking, Expanding), ranks)]


def make_beside(
    kind: type[Shrinking | Expanding] | None,
    dtype: torch.dtype,
    rows: int,
    weight: Nf4Matrix,
    rank: int | None,
    count: int = SLOTS,
    *,
    more: int = 0,
) -> Shrinking | Expanding | None:
    """Adapters beside a product; rank: with `Shrinking`, of all parts together."""
    if kind is Shrinking:
        return make_shrinking(dtype, rows, weight.columns, rank, count, more=more)
    return make_expanding(dtype, rows, weight.heights, rank, count, more=more)


def expanded(
    expanding: Expanding | None, heights: tuple[int, ...]
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """scale * B (A x) and scale * |B| |A x| in float64, row by row and part by part."""
    if expanding is None:
        return 0.0, 0.0
    shrunk, b, slots, scales = expanding[:4]
    ranks = expanding.own_ranks
    places = [rank_rows(part, len(heights), ranks) for part in range(len(heights))]
    added = torch.zeros(2, len(slots), b.shape[1], dtype=torch.float64)
    for row, slot in enumerate(slots.tolist()):
        if slot:
            own = b[slot - 1, :, :ranks].double().split(heights)
            pairs = zip(own, shrunk.double()[row, places], strict=True)
            parts = [torch.stack((part @ x, part.abs() @ x.abs())) for part, x in pairs]
            added[:, row] = scales[row].double() * torch.cat(parts, 1)
    return added[0], added[1]


def poison_unused(weights: torch.Tensor, slots: torch.Tensor) -> None:
    """NaN in what is stacked for slots that no row has."""
    for slot in range(1, len(weights) + 1):
        if slot not in slots:
            weights[slot - 1] = POISON
