"""The CUDA kernels of a fused decode step, run on a CPU (`emulator`), against their references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlorachat.kernels.attention import paged_decode_attention_reference
from qlorachat.kernels.decode_attention import attend_sums
from qlorachat.kernels.decode_step import (
    add_to_residual,
    add_to_residual_reference,
    begin_residual,
    begin_residual_reference,
    silu_mul_sums,
    silu_mul_sums_reference,
)
from qlorachat.kernels.rotary import rope_and_cache_reference
from qlorachat.kernels.sums import RowAdapters, inverse_rms_reference, take_sums_reference
from qlorachat.kernels.tiles import rows_padded, write_tiled
from tests.kernels.cases import POISON
from tests.kernels.emulator import Emulator, OnCard
from tests.kernels.step_cases import EPS, HIDDEN, StepCase, make_tiled
from tests.kernels.test_decode_attention import make_context

ROUNDED = 2**-7  # one step of bfloat16's last digit
SEEDS = (0, 3)  # asynchronous work early, then late; and other orders
SLOTS = 3


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def make_product(rows: int, parts: tuple[int, ...], rank: int | None) -> StepCase:
    """What a product leaves; A x is NaN but for each row's own slot, B for slots of no row."""
    torch.manual_seed(rows + sum(parts))
    sums, squares = torch.randn(rows, sum(parts)), 100 * torch.rand(rows)
    if rank is None:
        return StepCase(sums, None, squares)
    slots = torch.randint(0, SLOTS, (rows,), dtype=torch.int32)
    slots[: 2 if rows > 2 else 1] = torch.tensor([2, 0][: 2 if rows > 2 else 1])
    shrunk = torch.randn(rows, SLOTS, len(parts) * rank)
    shrunk[slots[:, None] != torch.arange(1, SLOTS + 1)] = POISON
    b = half(SLOTS, sum(parts), rank) / rank**0.5
    for slot in range(SLOTS):
        if slot + 1 not in slots:
            b[slot] = POISON
    adapters = RowAdapters(shrunk.flatten(1), b, slots, torch.rand(rows) * 2)
    return StepCase(sums, adapters, squares)


def copied(argument: Any, kind: type[torch.Tensor]) -> Any:
    if isinstance(argument, RowAdapters):
        return RowAdapters(*(tensor.clone() for tensor in argument))
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.clone().as_subclass(kind)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.nan_to_num(), expected.nan_to_num())


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the largest, and 16-bit numbers equal but for a few."""
    actual = actual.as_subclass(torch.Tensor)
    assert torch.equal(actual.isnan(), expected.isnan())
    ours, theirs = actual.nan_to_num(), expected.nan_to_num()
    if not expected.is_floating_point():
        assert torch.equal(ours, theirs)
        return
    assert (ours - theirs).abs().max() <= ROUNDED * theirs.abs().max()
    if expected.dtype == torch.bfloat16:
        assert int((ours != theirs).sum()) <= 1 + 0.02 * ours.numel()


def check(
    card: Emulator,
    launcher: Callable[..., None],
    reference: Callable[..., None],
    *arguments: Any,
    **settings: Any,
) -> None:
    """All arguments afterwards; what no atomic adds made is the same in every order."""
    expected = [copied(argument, torch.Tensor) for argument in arguments]
    reference(*expected)
    runs = []
    for card.seed in SEEDS:
        runs.append([copied(argument, OnCard) for argument in arguments])
        launcher(*runs[-1], **settings)
    for other, *ours in zip(expected, *runs, strict=True):
        if isinstance(other, RowAdapters):
            for own in ours:
                assert all(map(same, own, other))
        elif isinstance(other, torch.Tensor):
            for own in ours:
                assert_alike(own, other)
                assert other.dtype == torch.float32 or same(own, ours[0])
    assert len(card.launched) == len(SEEDS)


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 320), (9, 576), (64, 192)])
def test_begin_residual(card: Emulator, rows: int, width: int) -> None:
    torch.manual_seed(rows)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    given = (torch.randint(0, 9, (rows,)), half(9, width), half(width), x)
    residual = half(rows, width) * POISON
    arguments = (*given, residual, torch.rand(rows))
    check(card, begin_residual, begin_residual_reference, *arguments)


ROWS_AND_WIDTHS = [(1, 320), (3, 64), (8, 192), (9, 320), (20, 64), (20, 192), (64, 320)]


@pytest.mark.parametrize("rank", [None, 16, 48, 64])
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_add_to_residual(card: Emulator, rows: int, width: int, rank: int | None) -> None:
    sums, adapters, _ = make_product(rows, (width,), rank)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    normed = (half(width), x, torch.rand(rows))
    check(
        *(card, add_to_residual, add_to_residual_reference),
        *(sums, adapters, half(rows, width), *normed),
    )


@pytest.mark.parametrize("rank", [None, 16])
def test_the_last_add_to_residual(card: Emulator, rank: int | None) -> None:
    sums, adapters, _ = make_product(9, (192,), rank)
    arguments = (sums, adapters, half(9, 192), None, None, None)
    check(card, add_to_residual, add_to_residual_reference, *arguments)


@pytest.mark.parametrize("rank", [None, 16, 48, 64])
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_silu_mul(card: Emulator, rows: int, width: int, rank: int | None) -> None:
    product = make_product(rows, (width, width), rank)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    check(card, silu_mul_sums, silu_mul_sums_reference, *product, HIDDEN, EPS, x)


def attend_in_float32(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    width: int,
    eps: float,
    *rest: Any,
) -> None:
    """`attend_sums_reference` with scores and weights that are not rounded, as the kernel's."""
    *_, keys, values, tables, lengths, scale, out = rest
    columns = (0, sums.shape[1] - 2 * keys[0, 0].numel(), sums.shape[1] - keys[0, 0].numel())
    taken = take_sums_reference(sums, adapters, (*columns, sums.shape[1]))
    qkv = (taken * inverse_rms_reference(squares, width, eps)).bfloat16()
    q = rope_and_cache_reference(qkv, *rest[:6])
    caches = (keys.float(), values.float())
    mixed = paged_decode_attention_reference(q.float(), *caches, tables, lengths, scale)
    write_tiled(mixed.flatten(1).bfloat16(), out)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "lengths", [[1], [0, 17, 129], [300, 2, 16], [100, 0, 40, 1, 33, 8, 65, 15, 64]]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rank"),
    [
        *((9, 3, 64, 16), (2, 2, 64, None), (8, 1, 64, 48)),
        *((2, 2, 128, 48), (4, 1, 128, None), (2, 1, 256, 16)),
    ],
)
def test_attention(
    card: Emulator,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rank: int | None,
    lengths: list[int],
    splits: int,
) -> None:
    rows, columns = len(lengths), heads * head_dim
    parts = (columns, kv_heads * head_dim, kv_heads * head_dim)
    product = make_product(rows, parts, rank)
    context = make_context(torch.bfloat16, heads, kv_heads, head_dim, lengths)
    out = make_tiled(torch.bfloat16, columns, rows_padded(rows))
    check(
        *(card, attend_sums, attend_in_float32),
        *(*product, HIDDEN, EPS, *context, head_dim**-0.5, out),
        splits=splits,
    )
