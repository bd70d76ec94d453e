"""The Triton kernels of a fused decode step against their references, in Triton's interpreter.

test_decode_step.py runs this file in a process of its own, as test_triton.py does with the others.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlorachat.kernels import attention, decode_step, residual
from qlorachat.kernels.sums import RowAdapters
from qlorachat.kernels.tiles import rows_padded, tile, tiled_shape, untile
from tests.kernels.cases import make_paged, make_rope
from tests.kernels.interpreted_checks import (
    TOLERANCE,
    dtypes,
    few,
    readable_loop_bounds,
    rounded_alike,
)
from tests.kernels.step_cases import make_step, make_tiled

__all__ = ["readable_loop_bounds"]  # a fixture of every test here

row_counts = st.integers(1, 64)
ranks = st.sampled_from([None, 16, 48, 64, 80, 256])
EPS = 1e-5


def copy(argument: Any) -> Any:
    if isinstance(argument, RowAdapters):
        return RowAdapters(*(tensor.clone() for tensor in argument))
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def check(
    kernel: Callable[..., None], reference: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Both leave every tensor alike, what they must not touch included."""
    ours, theirs = ([copy(argument) for argument in arguments] for _ in range(2))
    kernel(*ours)
    reference(*theirs)
    for actual, expected in zip(ours, theirs, strict=True):
        if isinstance(actual, torch.Tensor):
            tolerance = TOLERANCE.get(actual.dtype, 0)
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True
            )
            assert actual.dtype != torch.float16 or rounded_alike(actual, expected)


@few
@given(dtypes, row_counts, st.sampled_from([64, 320, 576]))
def test_begin_residual(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    padded = rows_padded(rows)
    arguments = (
        torch.randint(0, 50, (rows,)),
        torch.randn(50, width).to(dtype),
        torch.randn(width).to(dtype),
        make_tiled(dtype, width, padded),
        torch.full((rows, width), float("nan"), dtype=dtype),
        torch.rand(padded),
    )
    check(residual.begin_residual, residual.begin_residual_reference, arguments)


@few
@given(dtypes, row_counts, st.sampled_from([64, 320, 576]), ranks)
def test_add_to_residual(dtype: torch.dtype, rows: int, width: int, rank: int | None) -> None:
    sums, adapters, squares = make_step(dtype, rows, (width,), rank)
    h, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    arguments = (sums, adapters, h, weight, make_tiled(dtype, width, sums.shape[1]), squares)
    check(residual.add_to_residual, residual.add_to_residual_reference, arguments)


@few
@given(dtypes, row_counts, st.sampled_from([16, 80, 128]), ranks)
def test_add_to_the_last_residual(
    dtype: torch.dtype, rows: int, width: int, rank: int | None
) -> None:
    sums, adapters, _ = make_step(dtype, rows, (width,), rank)
    arguments = (sums, adapters, torch.randn(rows, width).to(dtype), None, None, None)
    check(residual.add_to_residual, residual.add_to_residual_reference, arguments)


@few
@given(
    dtypes,
    row_counts,
    st.sampled_from([(4, 4, 64), (9, 3, 80), (6, 1, 96), (2, 2, 128), (3, 1, 16)]),
    ranks,
)
def test_rope_and_cache_sums(
    dtype: torch.dtype, rows: int, shape: tuple[int, int, int], rank: int | None
) -> None:
    heads, kv_heads, head_dim = shape
    parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    rope = make_rope(dtype, rows=rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    step = make_step(dtype, rows, parts, rank)
    q = torch.full((rows, heads, head_dim), float("nan"), dtype=dtype)
    arguments = (*step, 100, EPS, *rope.arguments()[1:], q)
    check(decode_step.rope_and_cache_sums, decode_step.rope_and_cache_sums_reference, arguments)


@few
@given(dtypes, row_counts, st.sampled_from([64, 320, 448]), ranks)
def test_silu_mul_sums(dtype: torch.dtype, rows: int, width: int, rank: int | None) -> None:
    step = make_step(dtype, rows, (width, width), rank)
    x = make_tiled(dtype, width, step.sums.shape[1])
    arguments = (*step, 100, EPS, x, rows)
    check(decode_step.silu_mul_sums, decode_step.silu_mul_sums_reference, arguments)


@few
@given(
    dtypes,
    st.lists(st.sampled_from([0, 1, 16, 33, 100]), min_size=1, max_size=9),
    st.sampled_from([(4, 4, 64), (8, 2, 80), (8, 1, 96), (2, 2, 128)]),
    st.sampled_from([None, 1, 2, 8]),
)
def test_tiled_attention(
    dtype: torch.dtype, lengths: list[int], shape: tuple[int, int, int], splits: int | None
) -> None:
    heads, kv_heads, head_dim = shape
    case = make_paged(dtype, lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    rows, columns, padded = len(lengths), heads * head_dim, rows_padded(len(lengths))
    out = make_tiled(dtype, columns, padded)
    attention.paged_decode_attention(*case.arguments(), 0.2, out, splits, tiled=True)
    expected = attention.paged_decode_attention_reference(*case.arguments(), 0.2).flatten(1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(untile(out, rows, columns), expected, rtol=tolerance, atol=tolerance)
    padding = tile(torch.zeros(rows, columns), padded) == tile(torch.ones(rows, columns), padded)
    assert padding.shape == tiled_shape(columns, padded)
    assert (out == 7)[padding].all()
