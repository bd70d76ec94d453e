"""A fused decode step's kernels: their references against whole formulas, and where Triton runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlorachat.kernels import paged_decode_attention, rope_and_cache, silu_mul
from qlorachat.kernels.decode_step import rope_and_cache_sums, silu_mul_sums
from qlorachat.kernels.residual import add_to_residual, begin_residual
from qlorachat.kernels.sums import RowAdapters
from qlorachat.kernels.tiles import rows_padded, tile, untile
from tests.kernels.cases import LoraCase, make_lora, make_paged, make_rope
from tests.kernels.step_cases import StepCase, columns_of, make_step, make_tiled
from tests.kernels.test_triton import needs_triton, run_checks

EPS = 1e-5
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
            t, s, h, e = (0, 2, 1, 3)[j // 16], j % 16 // 4, j % 4 // 2, j % 2
            chunk = (2 * s + h) ^ (m & 7)
            expected[block, m, chunk * 8 + 2 * t + e] = x[m, k]
    assert torch.equal(tile(x, padded), expected)
    assert torch.equal(untile(expected, rows, columns), x)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_first_residual(rows: int, width: int) -> None:
    ids, embedding, weight = torch.randint(0, 9, (rows,)), torch.randn(9, width), torch.randn(width)
    padded = rows_padded(rows)
    x, squares = make_tiled(torch.float32, width, padded), torch.zeros(padded)
    residual = torch.empty(rows, width)
    begin_residual(ids, embedding, weight, x, residual, squares)
    assert torch.equal(residual, embedding[ids])
    assert torch.equal(untile(x, rows, width), residual * weight)
    assert_untouched(x, rows, width)
    torch.testing.assert_close(squares[:rows], (residual**2).sum(1))
    assert not squares[rows:].any()


@pytest.mark.parametrize("rank", [None, 16, 48])
def test_the_next_residual(rank: int | None) -> None:
    case = make_case(5, (320,), rank)
    step, h, weight = run_product(case), torch.randn(5, 320), torch.randn(320)
    expected = h.double() + case.expected()
    x, squares = make_tiled(torch.float32, 320, 8), torch.zeros(8)
    last = h.clone()
    add_to_residual(step.sums.clone(), step.adapters, last, None, None, None)
    add_to_residual(step.sums, step.adapters, h, weight, x, squares)
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(last, h)
    assert torch.equal(untile(x, 5, 320), h * weight)
    assert_untouched(x, 5, 320)
    torch.testing.assert_close(squares[:5], (h**2).sum(1))
    assert not step.sums.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_added_is_rounded_first(dtype: torch.dtype) -> None:
    sums = make_step(dtype, 7, (64,), None).sums
    h = torch.randn(7, 64).to(dtype)
    expected = h + sums[:, :7].T.to(dtype)
    add_to_residual(sums, None, h, None, None, None)
    assert torch.equal(h, expected)


@pytest.mark.parametrize("rank", [None, 16, 48])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 80), (2, 1, 96)])
def test_rope_after_a_norm_put_off(
    heads: int, kv_heads: int, head_dim: int, rank: int | None
) -> None:
    parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    case, h, weight = make_case(7, parts, rank), torch.randn(7, 128), torch.randn(128)
    step, qkv = put_norm_off(case, h, weight), normed(case, h, weight).expected().float()
    rope = make_rope(torch.float32, rows=7, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    _, *ours = rope.arguments()
    _, *theirs = rope.arguments()
    q = torch.empty(7, heads, head_dim)
    context = [*ours, q]
    rope_and_cache_sums(*step, 128, EPS, *context)
    torch.testing.assert_close(q, rope_and_cache(qkv, *theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not step.sums.any()


@pytest.mark.parametrize("rank", [None, 16, 48])
def test_silu_after_a_norm_put_off(rank: int | None) -> None:
    case, h, weight = make_case(9, (320, 320), rank), torch.randn(9, 128), torch.randn(128)
    step, gate_up = put_norm_off(case, h, weight), normed(case, h, weight).expected().float()
    x = make_tiled(torch.float32, 320, 16)
    silu_mul_sums(*step, 128, EPS, x, 9)
    torch.testing.assert_close(untile(x, 9, 320), silu_mul(gate_up), rtol=1e-4, atol=1e-4)
    assert_untouched(x, 9, 320)
    assert not step.sums.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_once_after_the_norm(dtype: torch.dtype) -> None:
    sums, adapters, squares = make_step(dtype, 7, (64, 64), None)
    gate_up = (sums[:, :7].T * torch.rsqrt(squares[:7, None] / 50 + EPS)).contiguous()
    x = make_tiled(dtype, 64, 8)
    silu_mul_sums(sums, adapters, squares, 50, EPS, x, 7)
    assert torch.equal(untile(x, 7, 64), silu_mul(gate_up.to(dtype)))


def test_padding_rows_are_cleared_too() -> None:
    step = make_step(torch.float32, 3, (64, 64), 16)
    assert step.sums[:, 3:].isnan().all()
    silu_mul_sums(*step, 50, EPS, make_tiled(torch.float32, 64, 8), 3)
    assert not step.sums.any()


def test_attention_leaves_its_result_tiled() -> None:
    case = make_paged(torch.float32, [3, 0, 40], heads=4, kv_heads=2, head_dim=80)
    out, tiled = torch.empty_like(case.q), make_tiled(torch.float32, 320, 8)
    paged_decode_attention(*case.arguments(), 0.2, out)
    paged_decode_attention(*case.arguments(), 0.2, tiled, tiled=True)
    assert torch.equal(untile(tiled, 3, 320), out.flatten(1))
    assert_untouched(tiled, 3, 320)


@needs_triton
def test_interpreted_kernels_equal_their_references() -> None:
    run_checks("step_checks.py", TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_a_card(tmp_path: Path) -> None:
    # Triton 3.9 warns where fusion is left to its default
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    run_checks("compiled_step_checks.py", TRITON_INTERPRET="0", **settings)


def assert_untouched(x: torch.Tensor, rows: int, columns: int) -> None:
    """A tiled x, allocated by `make_tiled`, whose padding is as it was."""
    expected = make_tiled(x.dtype, columns, x.shape[1])
    blocks = columns // 64
    expected[:blocks, :rows] = x[:blocks, :rows]
    assert torch.equal(x, expected)


def make_case(rows: int, parts: tuple[int, ...], rank: int | None) -> LoraCase:
    """x [rows, 128] and its projection; without `rank` no row has an adapter."""
    case = make_lora(torch.float32, rows=rows, inputs=128, rank=rank or 16, parts=parts, adapters=3)
    assert case.columns == columns_of(parts)
    if rank is None:
        case.slots.zero_()
    return project(case, case.x)


def project(case: LoraCase, x: torch.Tensor) -> LoraCase:
    """The case with y = W x of a weight that depends on its shape alone."""
    weight = torch.randn(
        case.columns[-1], x.shape[1], generator=torch.Generator().manual_seed(5)
    ).div(x.shape[1] ** 0.5)
    return replace(case, x=x, y=x @ weight.T)


def run_product(case: LoraCase) -> StepCase:
    """What the product leaves for a case; zeros in its padding rows."""
    rows, padded = len(case.x), rows_padded(len(case.x))

    def pad(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, padded - rows)).contiguous()

    adapters = None
    if case.slots.any():
        shrunk = pad(case.a.flatten(0, 1) @ case.x.T)
        adapters = RowAdapters(shrunk, case.b, case.slots, case.scales)
    return StepCase(pad(case.y.T), adapters, pad((case.x**2).sum(1)))


def put_norm_off(case: LoraCase, h: torch.Tensor, weight: torch.Tensor) -> StepCase:
    """What the product leaves for h * weight, and the squares of h."""
    step = run_product(project(case, h * weight))
    squares = torch.zeros_like(step.squares)
    squares[: len(h)] = (h**2).sum(1)
    return step._replace(squares=squares)


def normed(case: LoraCase, h: torch.Tensor, weight: torch.Tensor) -> LoraCase:
    return project(case, torch.nn.functional.rms_norm(h, h.shape[1:], weight, EPS))
