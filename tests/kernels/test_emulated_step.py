"""The CUDA kernels of a fused decode step, run on a CPU (`emulator`), against their references."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

from qlorachat.kernels.decode_attention import (
    attend_sums,
    attend_sums_reference,
    make_meeting,
)
from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.decode_step import (
    add_to_residual,
    add_to_residual_reference,
    begin_residual,
    begin_residual_reference,
    silu_mul_sums,
    silu_mul_sums_reference,
)
from qlorachat.kernels.eight_bits import INT8, narrow, widen
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import rows_padded
from tests.kernels.cases import POISON
from tests.kernels.emulator import Emulator, OnCard
from tests.kernels.step_cases import (
    EPS,
    HIDDEN,
    SLOTS,
    apart,
    assert_adapters,
    make_expanding,
    make_shrinking,
    make_tiled,
)
from tests.kernels.test_decode_attention import make_context

HALF = torch.bfloat16
ROUNDED = 2**-7  # one step of bfloat16's last digit
SEEDS = (0, 3)  # asynchronous work early, then late; and other orders


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def make_sums(rows: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """And squares."""
    torch.manual_seed(rows + outputs)
    return torch.randn(rows, outputs), 100 * torch.rand(rows)


def copied(argument: Any, kind: type[torch.Tensor]) -> Any:
    if isinstance(argument, tuple):
        return type(argument)(*(copied(each, kind) for each in argument))
    if not isinstance(argument, torch.Tensor):
        return argument
    in_buffer = argument.ndim == 2 and argument.stride(0) > argument.shape[1]
    return (apart(argument) if in_buffer else argument.clone()).as_subclass(kind)


def tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Of all arguments but the adapters."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple) and not isinstance(each, Shrinking | Expanding):
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
    if expected.dtype in (HALF, INT8):
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
        check_adapters([copied(argument, torch.Tensor) for argument in run], arguments)
    assert len(card.launched) == len(SEEDS)


def check_adapters(run: Sequence[Any], given: Sequence[Any]) -> None:
    """A x is that of the x which the kernel wrote, the one argument of three dimensions."""
    tiled = [each for each in run if isinstance(each, torch.Tensor) and each.ndim == 3]
    for own, old in zip(run, given, strict=True):
        if isinstance(old, Shrinking | Expanding):
            assert_adapters(own, old, tiled[0] if tiled else None)


@pytest.mark.parametrize(
    ("rank", "one", "more"),
    [
        *((rank, False, 0) for rank in (None, 16, 48, 64, 112, 192)),
        *((48, True, 0), (48, True, 48), (96, True, 0), (192, True, 16), (96, False, 16)),
    ],
)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 320), (9, 576), (64, 192)])
def test_begin_residual(
    card: Emulator, rows: int, width: int, rank: int | None, one: bool, more: int
) -> None:
    torch.manual_seed(rows)
    x = make_tiled(HALF, width, rows_padded(rows))
    given = (torch.randint(0, 9, (rows,)), half(9, width), half(width), x)
    shrinking = make_shrinking(HALF, rows, width, rank, one=one, more=more)
    arguments = (*given, half(rows, width) * POISON, torch.rand(rows), shrinking)
    check(card, begin_residual, begin_residual_reference, *arguments)


ROWS_AND_WIDTHS = [(1, 320), (3, 64), (8, 192), (9, 320), (20, 64), (20, 192), (64, 320)]
RANKS = [  # of the adapters that are added, and of the next product's
    *((None, None), (None, 16), (None, 48), (None, 64), (None, 192)),
    *((16, None), (48, None), (80, None), (192, None)),
    *((16, 192), (48, 48), (80, 16), (192, 112)),
]
ADAPTERS = [  # whether rows have one alone, which has kernels of its own if both fit; more
    *((False, *ranks, 0) for ranks in RANKS),
    *((True, *ranks, 0) for ranks in ((None, 48), (16, None), (16, 48), (32, 48))),
    *((True, *ranks, 16) for ranks in ((None, 192), (64, None), (32, 96), (64, 192), (64, 144))),
    *((True, 16, 48, 48), (False, 16, 48, 32), (False, 80, 192, 16)),
]


@pytest.mark.parametrize(("one", "rank", "next_rank", "more"), ADAPTERS)
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_add_to_residual(
    card: Emulator,
    rows: int,
    width: int,
    one: bool,
    rank: int | None,
    next_rank: int | None,
    more: int,
) -> None:
    sums, _ = make_sums(rows, width)
    x = make_tiled(HALF, width, rows_padded(rows))
    adapters = (
        make_expanding(HALF, rows, (width,), rank, one=one, more=more),
        make_shrinking(HALF, rows, width, next_rank, one=one, more=more),
    )
    check(
        *(card, add_to_residual, add_to_residual_reference),
        *(sums, half(rows, width), half(width), x, torch.rand(rows), *adapters),
    )


@pytest.mark.parametrize("rank", [None, 16, 80])
def test_the_last_add_to_residual(card: Emulator, rank: int | None) -> None:
    sums, _ = make_sums(9, 192)
    expanding = make_expanding(HALF, 9, (192,), rank)
    arguments = (sums, half(9, 192), None, None, None, expanding, None)
    check(card, add_to_residual, add_to_residual_reference, *arguments)


@pytest.mark.parametrize(
    ("rank", "one", "more"),
    [
        *((rank, False, 0) for rank in (None, 16, 48, 80, 192)),
        *((16, True, 0), (16, True, 48), (32, True, 0), (64, True, 16), (48, False, 16)),
    ],
)
@pytest.mark.parametrize(("rows", "width"), ROWS_AND_WIDTHS)
def test_silu_mul(
    card: Emulator, rows: int, width: int, rank: int | None, one: bool, more: int
) -> None:
    sums, squares = make_sums(rows, 2 * width)
    x = make_tiled(HALF, width, rows_padded(rows))
    expanding = make_expanding(HALF, rows, (width, width), rank, one=one, more=more)
    check(
        *(card, silu_mul_sums, silu_mul_sums_reference),
        *(sums, LateNorm(squares, HIDDEN, EPS), x, expanding),
    )


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("bare", [0, 8, 40, 63])
def test_silu_mul_with_bare_rows_first(card: Emulator, bare: int, rank: int) -> None:
    """As a batch has them: whole warps, and a whole block, without the adapter."""
    rows, width = 64, 128
    sums, squares = make_sums(rows, 2 * width)
    given = make_expanding(HALF, rows, (width, width), rank, one=True)
    assert given is not None
    slots = torch.tensor([0] * bare + [SLOTS] * (rows - bare), dtype=torch.int32)
    shrunk = torch.randn(given.shrunk.shape)
    shrunk[slots == 0] = POISON
    expanding = given._replace(slots=slots, shrunk=apart(shrunk))
    x = make_tiled(HALF, width, rows)
    norm = LateNorm(squares, HIDDEN, EPS)
    check(card, silu_mul_sums, silu_mul_sums_reference, sums, norm, x, expanding)
    assert set(card.launched) == {f"silu_mul_2_{rank}"}


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize(("rows", "width"), [(8, 192), (20, 64)])
def test_many_adapters(card: Emulator, rows: int, width: int, rank: int) -> None:
    sums, squares = make_sums(rows, 2 * width)
    x = make_tiled(HALF, width, rows_padded(rows))
    gate_up, down = (make_expanding(HALF, rows, (width,) * parts, rank, 60) for parts in (2, 1))
    shrinking = make_shrinking(HALF, rows, width, rank, 60)
    for adapters in (gate_up, down, shrinking):
        assert adapters is not None
        assert len(adapters.slots[:8].unique()) > 5  # more than are held at once
    norm = LateNorm(squares, HIDDEN, EPS)
    check(card, silu_mul_sums, silu_mul_sums_reference, sums, norm, x, gate_up)
    card.launched.clear()
    arguments = (half(rows, width), half(width), x, torch.rand(rows), down, shrinking)
    check(card, add_to_residual, add_to_residual_reference, sums[:, :width].clone(), *arguments)


@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "lengths", [[1], [0, 17, 129], [300, 2, 16], [100, 0, 40, 1, 33, 8, 65, 15, 64]]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (2, 2, 64), (8, 1, 64), (2, 2, 128), (4, 1, 128), (2, 1, 256)],
)
def test_attention(
    card: Emulator,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: list[int],
    splits: int,
    in_8_bits: bool,
) -> None:
    rows, columns = len(lengths), heads * head_dim
    sums, squares = make_sums(rows, columns + 2 * kv_heads * head_dim)
    context = make_context(HALF, heads, kv_heads, head_dim, lengths)
    if in_8_bits:
        caches = (narrow(context.key_cache, INT8), narrow(context.value_cache, INT8))
        context = context._replace(key_cache=caches[0], value_cache=caches[1])
    out = make_tiled(HALF, columns, rows_padded(rows))
    meeting = None
    if not card.card.starts_early:
        shape = (rows, heads, kv_heads, head_dim)
        meeting = make_meeting(*shape, out.device, splits)
    check(
        *(card, attend_sums, attend_sums_reference),
        *(sums, LateNorm(squares, HIDDEN, EPS), context, head_dim**-0.5, out),
        meeting=meeting,
        splits=splits,
    )
    assert meeting is None or not meeting.arrived.any()


@pytest.mark.parametrize("least", [-38, -12, 0])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (2, 2, 128)])
def test_attention_in_8_bits_of_every_size(
    card: Emulator, heads: int, kv_heads: int, head_dim: int, least: int
) -> None:
    """Values of a position are up to 10^4 and down to 10^least, or all zero; so are keys."""
    lengths = [70, 0, 1]
    sums, squares = make_sums(len(lengths), (heads + 2 * kv_heads) * head_dim)
    context = make_context(HALF, heads, kv_heads, head_dim, lengths)
    caches = []
    for cache, most in ((context.key_cache, 0), (context.value_cache, 4)):
        sizes = 10 ** (least + (most - least) * torch.rand(cache.shape[:3])[..., None])
        sizes[torch.rand(sizes.shape) < 0.1] = 0
        caches.append(narrow((cache.float() * sizes).bfloat16(), INT8))
    context = context._replace(key_cache=caches[0], value_cache=caches[1])
    out = make_tiled(HALF, heads * head_dim, rows_padded(len(lengths)))
    shape = (len(lengths), heads, kv_heads, head_dim)
    meeting = None if card.card.starts_early else make_meeting(*shape, out.device, 2)
    check(
        *(card, attend_sums, attend_sums_reference),
        *(sums, LateNorm(squares, HIDDEN, EPS), context, head_dim**-0.5, out),
        meeting=meeting,
        splits=2,
    )
