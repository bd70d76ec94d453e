"""The CUDA kernels of a fused decode step, run on a CPU (`emulator`), against their references."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from qlorachat.kernels.attention import paged_decode_attention_reference
from qlorachat.kernels.decode_attention import Meeting, PagedContext, attend_sums, make_meeting
from qlorachat.kernels.decode_lora import Shrinking
from qlorachat.kernels.decode_step import (
    add_to_residual,
    add_to_residual_reference,
    begin_residual,
    begin_residual_reference,
    silu_mul_sums,
    silu_mul_sums_reference,
)
from qlorachat.kernels.eight_bits import INT8, narrow, widen
from qlorachat.kernels.rotary import rope_and_cache_reference
from qlorachat.kernels.sums import LateNorm, take_sums_reference
from qlorachat.kernels.tiles import rows_padded, write_tiled
from tests.kernels.cases import POISON
from tests.kernels.emulator import Emulator, OnCard
from tests.kernels.step_cases import EPS, HIDDEN, assert_shrunk, make_shrinking, make_tiled
from tests.kernels.test_decode_attention import make_context

ROUNDED = 2**-7  # one step of bfloat16's last digit
SEEDS = (0, 3)  # asynchronous work early, then late; and other orders


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def make_sums(rows: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """And squares."""
    torch.manual_seed(rows + outputs)
    return torch.randn(rows, outputs), 100 * torch.rand(rows)


def make_half_shrinking(rows: int, columns: int, rank: int | None) -> Shrinking | None:
    return make_shrinking(torch.bfloat16, rows, columns, rank)


def copied(argument: Any, kind: type[torch.Tensor]) -> Any:
    if isinstance(argument, tuple):
        return type(argument)(*(copied(each, kind) for each in argument))
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.clone().as_subclass(kind)


def tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Of all arguments but those that atomic adds leave, and scratch."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple) and not isinstance(each, Shrinking | Meeting):
            yield from tensors(each)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(plain(actual).nan_to_num(), plain(expected).nan_to_num())


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """As numbers, where it is a cache in 8 bits."""
    return widen(tensor.as_subclass(torch.Tensor), torch.float32)


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within one rounding of the largest, and numbers of 16 or 8 bits equal but for a few."""
    ours, theirs = plain(actual), plain(expected)
    assert torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if not theirs.is_floating_point():
        assert torch.equal(ours, theirs)
        return
    rounded = 2 * ROUNDED if expected.dtype == INT8 else ROUNDED  # a code is a 127th
    assert (ours - theirs).abs().max() <= rounded * theirs.abs().max()
    if expected.dtype in (torch.bfloat16, INT8):
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
    for other, *ours in zip(*map(tensors, (expected, *runs)), strict=True):
        for own in ours:
            assert_alike(own, other)
            assert other.dtype == torch.float32 or same(own, ours[0])
    for run in runs:
        check_shrunk(run, arguments)
        assert not any(each.arrived.any() for each in run if isinstance(each, Meeting))
    assert len(card.launched) == len(SEEDS)


def check_shrunk(run: Sequence[Any], given: Sequence[Any]) -> None:
    """A x is that of the x which the kernel wrote, the one argument of three dimensions."""
    for own, old in zip(run, given, strict=True):
        if isinstance(old, Shrinking):
            (x,) = (each for each in run if isinstance(each, torch.Tensor) and each.ndim == 3)
            assert same(own.a, old.a)
            assert torch.equal(own.slots, old.slots)
            assert_shrunk(own, x.as_subclass(torch.Tensor))


@pytest.mark.parametrize("rank", [None, 16, 48, 192])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 320), (9, 576), (64, 192)])
def test_begin_residual(card: Emulator, rows: int, width: int, rank: int | None) -> None:
    torch.manual_seed(rows)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    given = (torch.randint(0, 9, (rows,)), half(9, width), half(width), x)
    residual, shrinking = half(rows, width) * POISON, make_half_shrinking(rows, width, rank)
    arguments = (*given, residual, torch.rand(rows), shrinking)
    check(card, begin_residual, begin_residual_reference, *arguments)


ROWS_AND_WIDTHS = [(1, 320), (3, 64), (8, 192), (9, 320), (20, 64), (20, 192), (64, 320)]


@pytest.mark.parametrize("rank", [None, 16, 48, 192])
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_add_to_residual(card: Emulator, rows: int, width: int, rank: int | None) -> None:
    sums, _ = make_sums(rows, width)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    normed = (half(width), x, torch.rand(rows), make_half_shrinking(rows, width, rank))
    check(
        *(card, add_to_residual, add_to_residual_reference),
        *(sums, half(rows, width), *normed),
    )


def test_the_last_add_to_residual(card: Emulator) -> None:
    sums, _ = make_sums(9, 192)
    arguments = (sums, half(9, 192), None, None, None, None)
    check(card, add_to_residual, add_to_residual_reference, *arguments)


@pytest.mark.parametrize("rank", [None, 16, 64, 128])
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_silu_mul(card: Emulator, rows: int, width: int, rank: int | None) -> None:
    sums, squares = make_sums(rows, 2 * width)
    x = make_tiled(torch.bfloat16, width, rows_padded(rows))
    shrinking = make_half_shrinking(rows, width, rank)
    check(
        *(card, silu_mul_sums, silu_mul_sums_reference),
        *(sums, LateNorm(squares, HIDDEN, EPS), x, shrinking),
    )


def attend_in_float32(
    sums: torch.Tensor,
    norm: LateNorm,
    context: PagedContext,
    scale: float,
    out: torch.Tensor,
    *of_a_card: object,
) -> None:
    """`attend_sums_reference` with scores and weights that are not rounded, as the kernel's.

    A x is left to `check_shrunk`.
    """
    qkv = (take_sums_reference(sums) * norm.factors()).bfloat16()
    *places, tables, lengths = context
    q = rope_and_cache_reference(qkv, *places)
    keys, values = (
        widen(cache, torch.float32).float() for cache in (context.key_cache, context.value_cache)
    )
    mixed = paged_decode_attention_reference(q.float(), keys, values, tables, lengths, scale)
    write_tiled(mixed.flatten(1).bfloat16(), out)


@pytest.mark.parametrize("in_8_bits", [False, True])
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
    in_8_bits: bool,
) -> None:
    rows, columns = len(lengths), heads * head_dim
    sums, squares = make_sums(rows, columns + 2 * kv_heads * head_dim)
    context = make_context(torch.bfloat16, heads, kv_heads, head_dim, lengths)
    if in_8_bits:
        caches = (narrow(context.key_cache, INT8), narrow(context.value_cache, INT8))
        context = context._replace(key_cache=caches[0], value_cache=caches[1])
    out = make_tiled(torch.bfloat16, columns, rows_padded(rows))
    shrinking = make_half_shrinking(rows, columns, rank)
    meeting = None
    if not card.card.starts_early:
        shape = (rows, heads, kv_heads, head_dim)
        meeting = make_meeting(*shape, out.device, splits)
    check(
        *(card, attend_sums, attend_in_float32),
        *(sums, LateNorm(squares, HIDDEN, EPS), context),
        *(head_dim**-0.5, out, shrinking, meeting),
        splits=splits,
    )
