"""What a fused decode step does between its products: references against whole formulas."""

import pytest
import torch

from qlorachat.kernels import decode_step, nf4_matmul, silu_mul
from qlorachat.kernels.decode_step import add_to_residual, begin_residual, silu_mul_sums
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import rows_padded, tile, untile
from tests.kernels.cubin import ARCHITECTURES, compiled, registers, shared_bytes
from tests.kernels.step_cases import (
    EPS,
    HIDDEN,
    assert_shrunk,
    assert_untouched,
    exact_sums,
    expanded,
    make_exact_expanding,
    make_expanding,
    make_product,
    make_shrinking,
    make_tiled,
)
from tests.kernels.test_nf4 import needs_nvrtc

SHAPES = [(1, 64), (5, 256), (8, 320), (33, 576)]


@pytest.mark.parametrize(
    ("rows", "padded"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64)]
)
def test_padded_rows(rows: int, padded: int) -> None:
    assert rows_padded(rows) == padded


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_tiled_layout(rows: int, columns: int) -> None:
    x = 1 + torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    padded = rows_padded(rows)
    expected = torch.zeros(-(-columns // 256) * 4, padded, 64)
    for m in range(rows):
        for k in range(columns):
            block, j = divmod(k, 64)
            t, s, h, e = j // 16, j % 16 // 4, j % 4 // 2, j % 2
            chunk = (2 * s + h) ^ (m & 7)
            expected[block, m, chunk * 8 + 2 * t + e] = x[m, k]
    assert torch.equal(tile(x, padded), expected)
    assert torch.equal(untile(expected, rows, columns), x)


@pytest.mark.parametrize("rank", [None, 16, 48])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_first_residual(rows: int, width: int, rank: int | None) -> None:
    ids, embedding, weight = torch.randint(0, 9, (rows,)), torch.randn(9, width), torch.randn(width)
    x, earlier = make_tiled(torch.float32, width, rows_padded(rows)), torch.rand(rows)
    residual, squares = torch.full((rows, width), float("nan")), earlier.clone()
    shrinking = make_shrinking(torch.float32, rows, width, rank)
    begin_residual(ids, embedding, weight, x, residual, squares, shrinking)
    assert torch.equal(residual, embedding[ids])
    assert torch.equal(untile(x, rows, width), residual * weight)
    assert_untouched(x, rows, width)
    torch.testing.assert_close(squares, earlier + (residual**2).sum(1))
    assert_shrunk(shrinking, x)


@pytest.mark.parametrize("next_rank", [None, 16, 48])
@pytest.mark.parametrize("rank", [None, 16, 48])
@pytest.mark.parametrize(("rows", "width"), [(5, 320), (33, 64)])
def test_the_next_residual(rows: int, width: int, rank: int | None, next_rank: int | None) -> None:
    sums, h, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    x, earlier = make_tiled(torch.float32, width, rows_padded(rows)), torch.rand(rows)
    expanding = make_expanding(torch.float32, rows, (width,), rank)
    shrinking = make_shrinking(torch.float32, rows, width, next_rank)
    expected = (h.double() + sums + expanded(expanding, (width,))[0]).float()
    last, last_sums, squares = h.clone(), sums.clone(), earlier.clone()
    add_to_residual(last_sums, last, None, None, None, expanding, None)
    add_to_residual(sums, h, weight, x, squares, expanding, shrinking)
    torch.testing.assert_close(h, expected)
    assert rank is not None or torch.equal(h, expected)
    assert torch.equal(last, h)
    assert torch.equal(untile(x, rows, width), h * weight)
    assert_untouched(x, rows, width)
    torch.testing.assert_close(squares, earlier + (h**2).sum(1))
    assert_shrunk(shrinking, x)
    assert not sums.any()
    assert not last_sums.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_added_is_rounded_first(dtype: torch.dtype) -> None:
    sums, h, weight = exact_sums(7, 64), torch.randn(7, 64).to(dtype), torch.randn(64).to(dtype)
    expanding, shrinking = make_exact_expanding(dtype, 7, (64,)), make_shrinking(dtype, 7, 64, 16)
    expected, x = h + (sums + expanded(expanding, (64,))[0]).to(dtype), make_tiled(dtype, 64, 8)
    add_to_residual(sums, h, weight, x, torch.zeros(7), expanding, shrinking)
    assert torch.equal(h, expected)
    assert torch.equal(untile(x, 7, 64), expected * weight)
    assert_shrunk(shrinking, x)


@pytest.mark.parametrize("rank", [None, 16, 48])
def test_silu_after_a_norm_put_off(rank: int | None) -> None:
    sums, given, gate_up = make_product(9, 640)
    x, squares = make_tiled(torch.float32, 320, 16), given.clone()
    expanding = make_expanding(torch.float32, 9, (320, 320), rank)
    added = expanded(expanding, (320, 320))[0] * torch.rsqrt(given[:, None] / HIDDEN + EPS)
    silu_mul_sums(sums, LateNorm(squares, HIDDEN, EPS), x, expanding)
    expected = silu_mul((gate_up + added).float())
    torch.testing.assert_close(untile(x, 9, 320), expected, rtol=1e-4, atol=1e-4)
    assert_untouched(x, 9, 320)
    assert not sums.any()
    assert torch.equal(squares, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once_after_the_norm(dtype: torch.dtype) -> None:
    sums, squares, x = exact_sums(7, 128), 100 * torch.rand(7), make_tiled(dtype, 64, 8)
    expanding = make_exact_expanding(dtype, 7, (64, 64))
    whole = (sums + expanded(expanding, (64, 64))[0]).float()
    gate_up = whole * torch.rsqrt(squares[:, None] / 50 + EPS)
    silu_mul_sums(sums, LateNorm(squares, 50, EPS), x, expanding)
    assert torch.equal(untile(x, 7, 64), silu_mul(gate_up.to(dtype)))


KERNELS = {
    f"{kernel}_{kind}"
    for kernel in ("begin_residual", "add_to_residual", "silu_mul")
    for tiles in (1, 2)
    for kind in (f"{tiles}", *(f"{tiles}_{ranks}" for ranks in decode_step.RANKS_OF_ONE))
}


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_source_compiles(architecture: str) -> None:
    code = compiled("decode_step.cu", architecture)
    assert code.startswith(b"\x7fELF")
    assert set(registers(code)) == KERNELS


def pieces(ranks: int, tiles: int) -> int:
    """Bytes of one adapter's B and A, four times as many ranks, for a block of four warps."""
    return ranks // 16 * 4 * tiles * 4 * decode_step._PIECE_BYTES


ADD, SWIGLU, PROCESSOR = "add_to_residual", "silu_mul", 228 * 1024  # bytes of shared memory
BESIDE = [  # rows of a product, what waits beside it, its warps on one scheduler, its pieces
    *((rows, f"{ADD}_1", 1, decode_step._BESIDE[rows]) for rows in (8, 16)),
    *((rows, f"{ADD}_1_{one}", 1, pieces(one, 1)) for rows in (8, 16) for one in (16, 32, 64)),
    *((rows, f"{SWIGLU}_1", 2, decode_step._BESIDE[rows]) for rows in (8, 16)),
    *((rows, f"{SWIGLU}_1_{one}", 2, pieces(one, 1)) for rows in (8, 16) for one in (16, 32, 64)),
    (32, f"{ADD}_2", 1, decode_step._BESIDE[32]),
    *((32, f"{ADD}_2_{one}", 1, pieces(one, 2)) for one in (16, 32)),
]


@needs_nvrtc
@pytest.mark.parametrize(("rows", "kernel", "warps", "asked"), BESIDE)
def test_a_block_fits_beside_a_product(rows: int, kernel: str, warps: int, asked: int) -> None:
    """On a Hopper processor, with what it asks for."""
    taken, others = product_takes(rows)
    own, least = block_takes(kernel)
    assert 32 * (4 * others + warps * own) <= 65536 // 4  # of one of four schedulers
    assert taken + asked + least <= PROCESSOR


SPREAD = {(32, 2): (SWIGLU, 3), (64, 1): (ADD, 3), (64, 2): (SWIGLU, 4)}


@needs_nvrtc
@pytest.mark.parametrize("kind", ["2", "2_16", "2_32"])
@pytest.mark.parametrize(("place", "asked"), decode_step._SPREAD.items())
def test_so_many_blocks_share_a_processor(place: tuple[int, int], asked: int, kind: str) -> None:
    kernel, count = SPREAD[place]
    own, least = block_takes(f"{kernel}_{kind}")
    assert PROCESSOR // (asked + least) == count <= 65536 // (128 * own)
    taken, others = product_takes(place[0])
    beside = taken + asked + least <= PROCESSOR and 512 * others + 128 * own <= 65536
    assert beside == (place[0] == 32)


def product_takes(rows: int) -> tuple[int, int]:
    """Bytes of a product's block on Hopper, and registers of a thread."""
    code, name = compiled("nf4_matmul_hopper.cu", "sm_90a"), f"nf4_matmul_{rows}"
    taken = nf4_matmul._hopper_instance(rows).shared_bytes + shared_bytes(code, name)
    return taken, -(-registers(code)[name] // 8) * 8


def block_takes(kernel: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of a block that asks for none."""
    code = compiled("decode_step.cu", "sm_90a")
    return -(-registers(code)[kernel] // 8) * 8, shared_bytes(code, kernel)
