"""The CUDA kernels of NF4 products, run on a CPU (`emulator`), against the weights in float64."""

from dataclasses import replace

import pytest
import torch

from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.nf4 import Nf4Matrix, nf4_dequantize
from qlorachat.kernels.nf4_matmul import nf4_matmul, nf4_matmul_tiled
from qlorachat.kernels.nf4_write_out import (
    MOST_RANKS,
    LoraMatrices,
    nf4_write_out,
    nf4_write_out_reference,
)
from qlorachat.kernels.tiles import rows_padded, tile
from tests.kernels.cases import POISON, rank_rows
from tests.kernels.emulator import Emulator, OnCard
from tests.kernels.step_cases import SUMMED, assert_adapters, beside, expanded, make_beside
from tests.kernels.test_emulated_step import copied
from tests.kernels.test_nf4 import make_matrix

HALF = torch.bfloat16
SPLIT = 2**-15  # error of an A x in two halves, relative
STRIDE = 48  # ranks that there is room for, of an adapter
EXTREME = 200.0  # times a usual absmax


def make_weight(heights: tuple[int, ...], columns: int) -> Nf4Matrix:
    return make_matrix(heights, columns, largest=EXTREME)[0]


def multiplied(x: torch.Tensor, weight: Nf4Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T and |x| |W|^T in float64, of the 16 code values rounded to bfloat16."""
    rounded = nf4_dequantize(replace(weight, code=weight.code.to(HALF).float())).double()
    return x.double() @ rounded.T, x.double().abs() @ rounded.abs().T


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, sizes: torch.Tensor, rounding: float
) -> None:
    """rounding: of the result, relative."""
    error = (actual.as_subclass(torch.Tensor).double() - expected).abs()
    assert bool((error <= rounding * expected.abs() + SUMMED * sizes).all())


@pytest.mark.parametrize(
    ("heights", "columns"), [((16,), 64), ((48, 16, 32), 192), ((32, 80), 1088), ((272, 80), 320)]
)
def test_write_out(card: Emulator, heights: tuple[int, ...], columns: int) -> None:
    weight = make_weight(heights, columns)
    for card.seed in range(4):
        assert torch.equal(nf4_write_out(weight), nf4_dequantize(weight).to(HALF))
    assert card.launched == ["nf4_write_out"] * 4


@pytest.mark.parametrize("ranks", range(0, MOST_RANKS + 1, 16))
@pytest.mark.parametrize(
    ("heights", "columns"), [((16,), 64), ((48, 16, 32), 192), ((32, 80), 1088), ((272, 80), 320)]
)
def test_an_adapter_written_out(
    card: Emulator, heights: tuple[int, ...], columns: int, ranks: int
) -> None:
    weight = make_weight(heights, columns)
    lora = make_matrices(heights, columns, ranks)
    exact, sizes = written(weight, lora)
    for card.seed in range(4):
        assert_near(nf4_write_out(weight, lora), exact, sizes, torch.finfo(HALF).eps / 2)
    assert card.launched == [f"nf4_write_out_{ranks}" if ranks else "nf4_write_out"] * 4
    for each in (lora.a[len(heights) * ranks :], lora.b[:, ranks:]):
        each.zero_()
    assert_near(nf4_write_out_reference(weight, lora), exact, sizes, 0)


def make_matrices(heights: tuple[int, ...], columns: int, ranks: int) -> LoraMatrices:
    """Of STRIDE ranks, infinite where nothing may look."""
    a = torch.randn(len(heights) * STRIDE, columns).to(HALF)
    b = torch.randn(sum(heights), STRIDE).to(HALF)
    a[len(heights) * ranks :], b[:, ranks:] = POISON, POISON
    return LoraMatrices(a, b, ranks, 0.75)


def written(weight: Nf4Matrix, lora: LoraMatrices) -> tuple[torch.Tensor, torch.Tensor]:
    """W + scale * B A and |W| + scale * |B| |A| in float64, part by part."""
    exact, sizes, row = nf4_dequantize(weight).double(), nf4_dequantize(weight).double().abs(), 0
    for part, height in enumerate(weight.heights):
        a = lora.a[rank_rows(part, len(weight.heights), lora.ranks)].double()
        b = lora.b[row : row + height, : lora.ranks].double()
        exact[row : row + height] += lora.scale * (b @ a)
        sizes[row : row + height] += lora.scale * (b.abs() @ a.abs())
        row += height
    return exact, sizes


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 256), (9, 320), (64, 576)])
def test_tile(card: Emulator, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns).bfloat16()
    for sums in (None, torch.ones(1), torch.ones(9, 1000)):
        tiled = tile(x.as_subclass(OnCard), rows_padded(rows), sums)
        assert torch.equal(tiled.as_subclass(torch.Tensor), tile(x, rows_padded(rows)))
        assert sums is None or not sums.any()
    assert card.launched == ["tile"] * 3


@pytest.mark.parametrize(
    ("rows", "heights", "columns"), [(3, (48, 16, 32), 192), (40, (96,), 576), (9, (80,), 1024)]
)
def test_nf4_matmul(card: Emulator, rows: int, heights: tuple[int, ...], columns: int) -> None:
    weight, x = make_weight(heights, columns), torch.randn(rows, columns).to(HALF)
    y = nf4_matmul(x.as_subclass(OnCard), weight)
    assert y.dtype == HALF
    assert_near(y, *multiplied(x, weight), torch.finfo(HALF).eps / 2)
    assert len(card.launched) == 2


@pytest.mark.parametrize(("kind", "rank"), beside(16, 48, 80))
@pytest.mark.parametrize(
    ("rows", "heights", "columns", "blocks"),
    [
        (1, (96,), 512, 3),
        (8, (256, 16, 32), 576, 2),
        (8, (48, 16, 32), 2560, 1),
        (9, (48, 16, 96), 192, 2),
        (16, (144,), 2560, 5),
        (20, (192, 16), 512, 3),
        (20, (48, 16), 320, 2),
        (64, (96, 112), 576, 4),
        (33, (16,), 1024, 3),
        (64, (144, 32, 32), 320, 3),
        (5, (208, 16), 320, 11),  # more blocks than there is work
    ],
)
def test_nf4_matmul_tiled(
    card: Emulator,
    rows: int,
    heights: tuple[int, ...],
    columns: int,
    blocks: int,
    kind: type[Shrinking | Expanding] | None,
    rank: int | None,
) -> None:
    weight = make_weight(heights, columns)
    x, before = torch.randn(rows, columns).to(HALF), torch.randn(rows, weight.rows)
    lora = make_beside(kind, HALF, rows, weight, rank)
    check_tiled(card, x, weight, before, lora, blocks)


@pytest.mark.parametrize("columns", [192, 512])
@pytest.mark.parametrize(("kind", "rank"), beside(16, 48)[1:])
@pytest.mark.parametrize(("rows", "count"), [(8, 60), (20, 20), (64, 9)])
def test_many_adapters_beside_a_product(
    card: Emulator,
    rows: int,
    count: int,
    kind: type[Shrinking | Expanding],
    rank: int,
    columns: int,
) -> None:
    weight = make_weight((96, 16), columns)
    x, before = torch.randn(rows, columns).to(HALF), torch.randn(rows, weight.rows)
    lora = make_beside(kind, HALF, rows, weight, rank, count)
    assert lora is not None
    assert len(lora.slots[:16].unique()) > 5  # more adapters than are held at once
    check_tiled(card, x, weight, before, lora, blocks=2)


@pytest.mark.parametrize(("kind", "rank"), beside(16, 48, 80)[1:])
@pytest.mark.parametrize("more", [16, 96])
@pytest.mark.parametrize(
    ("rows", "heights", "columns"),
    [(8, (48, 16, 32), 512), (20, (96, 16), 192), (64, (112,), 576)],
)
def test_ranks_that_no_row_has_beside_a_product(
    card: Emulator,
    rows: int,
    heights: tuple[int, ...],
    columns: int,
    more: int,
    kind: type[Shrinking | Expanding],
    rank: int,
) -> None:
    weight = make_weight(heights, columns)
    x, before = torch.randn(rows, columns).to(HALF), torch.randn(rows, weight.rows)
    lora = make_beside(kind, HALF, rows, weight, rank, more=more)
    check_tiled(card, x, weight, before, lora, blocks=3)


def check_tiled(
    card: Emulator,
    x: torch.Tensor,
    weight: Nf4Matrix,
    before: torch.Tensor,
    lora: Shrinking | Expanding | None,
    blocks: int,
) -> None:
    """Sums of real rows, and A x of adapters that shrink; all else is left as it is."""
    product, sizes = multiplied(x, weight)
    expected, sizes = before + product, 1 + sizes
    if isinstance(lora, Expanding):
        added, added_sizes = expanded(lora, weight.heights)
        expected, sizes = expected + added, sizes + (1 + SPLIT / SUMMED) * added_sizes
    tiled = tile(x, rows_padded(len(x)))
    tiled[:, len(x) :] = POISON
    following = make_weight((112, 16), 320)
    for card.seed, ahead in zip(range(4), (None, following, weight, None), strict=True):
        sums, own = before.clone(), copied(lora, torch.Tensor)
        nf4_matmul_tiled(tiled.as_subclass(OnCard), weight, sums, own, ahead=ahead, blocks=blocks)
        assert_near(sums, expected, sizes, 0)
        if lora is not None:
            assert_adapters(own, lora, tiled)
    assert len(card.launched) == 4
