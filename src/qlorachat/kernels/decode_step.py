"""What comes between the products of a fused decode step, attention apart (`decode_attention`).

A step has M rows, at most 64. A product takes a tiled x (`tiles`), of P padded rows, and leaves
sums (`sums`). The RMS norm before it is put off: x is h * weight, the squares of h are added up
beside it, and who reads the product's sums multiplies them by 1 / rms(h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.activation import silu_mul_reference
from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.decode_lora import (
    Expanding,
    Shrinking,
    expand_reference,
    expanding_arguments,
    shrink_reference,
    shrinking_arguments,
)
from qlorachat.kernels.device import is_hopper
from qlorachat.kernels.sums import LateNorm, check_squares, check_sums, take_sums_reference
from qlorachat.kernels.tiles import rows_padded, tiled_shape, write_tiled

SOURCE = "decode_step.cu"
_ROWS = 8  # of a block
_WARPS = 4  # of a block, but for SwiGLU of few rows
_SWIGLU_WARPS = 7
_FEW = 16  # rows up to which a warp has one tile of columns, not two
_COLUMNS = 16  # of a tile
_PIECE_BYTES = 512  # of 16 ranks of a tile, PIECE in lora_between.cuh
_LEAST = {1: (4, 8), 2: (2, 6)}  # of B and A, that are used at once: GROUPS there, by tiles
RANKS_OF_ONE = (16, 32, 64)  # of rows' only adapter, that have kernels of their own
# bytes of shared memory for a block's pieces: what a product of so many padded rows leaves, beside
# which a block then waits; of most rows nothing fits beside one
_BESIDE = {8: 58 * 1024, 16: 46 * 1024, 32: 26 * 1024, 64: 64 * 1024}
_ALONE = 64 * 1024  # for those of one adapter, beside a product or not
_LITTLE = 24 * 1024  # on cards that are not roomy
# bytes that a block has at the least on Hopper, by padded rows and parts: three or four then fit on
# a processor. Else those that have room first take most blocks, and others wait for them
_SPREAD = {(32, 2): 60 * 1024, (64, 1): 58 * 1024, (64, 2): 52 * 1024}


def begin_residual(
    ids: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor,
    shrinking: Shrinking | None,
) -> None:
    """residual = embedding[ids], x = residual * weight tiled, squares += sum(residual^2).

    ids: int64 [M]. embedding: [V, width]; weight: [width]; residual: [M, width]; x: tiled
    [blocks, P, 64]; contiguous and of one dtype, bfloat16 on a card. squares: float32 [M].
    shrinking: the adapters of the product that follows, with A x of this x.
    """
    rows, width = residual.shape
    assert ids.shape == (rows,)
    assert ids.dtype == torch.int64
    assert embedding.shape == (len(embedding), width)
    assert embedding.dtype == residual.dtype
    assert all(tensor.is_contiguous() for tensor in (ids, embedding, residual))
    _check_normed(weight, x, residual, squares, shrinking)
    if not residual.is_cuda:
        begin_residual_reference(ids, embedding, weight, x, residual, squares, shrinking)
        return
    room = _find_room(rows, residual.device, None, shrinking)
    arguments = (
        *(ids, embedding, weight, x, residual, squares),
        *(*shrinking_arguments(shrinking), room.a, rows, width, x.shape[1]),
    )
    _launch("begin_residual", width, rows, arguments, residual, room)


def add_to_residual(
    sums: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    x: torch.Tensor | None,
    squares: torch.Tensor | None,
    expanding: Expanding | None,
    shrinking: Shrinking | None,
) -> None:
    """residual += sums, in place; then x, squares and A x as `begin_residual` leaves them.

    sums: float32 [M, width], cleared; what `expanding` says is added to them first. residual:
    [M, width], contiguous; what is added is rounded to its dtype before the addition. The rest as
    in `begin_residual`, or all None.
    """
    rows, width = residual.shape
    assert sums.shape == residual.shape
    assert residual.is_contiguous()
    check_sums(sums)
    if expanding is not None:
        expanding.check(rows, (width,), residual.dtype)
    if weight is None or x is None or squares is None:
        assert weight is x is squares is None
        assert shrinking is None
    else:
        _check_normed(weight, x, residual, squares, shrinking)
    if not residual.is_cuda:
        add_to_residual_reference(sums, residual, weight, x, squares, expanding, shrinking)
        return
    room = _find_room(rows, residual.device, expanding, shrinking)
    arguments = (
        *(sums, residual, weight, x, squares, *expanding_arguments(expanding), room.b),
        *(*shrinking_arguments(shrinking), room.a, rows, width, 0 if x is None else x.shape[1]),
    )
    assert width % 64 == 0
    _launch("add_to_residual", width, rows, arguments, residual, room)


def silu_mul_sums(
    sums: torch.Tensor,
    norm: LateNorm,
    x: torch.Tensor,
    expanding: Expanding | None,
) -> None:
    """`silu_mul` of gate|up = sums / rms, rounded once, tiled.

    sums: float32 [M, 2 * width], cleared; width is a multiple of 64; what `expanding` says is added
    to them first. norm: of [M]. x: tiled [blocks, P, 64], contiguous; bfloat16 on a card.
    """
    rows, outputs = sums.shape
    assert outputs % 2 == 0
    assert x.shape == tiled_shape(outputs // 2, x.shape[1])
    assert rows <= x.shape[1]
    assert x.is_contiguous()
    check_sums(sums)
    norm.check(rows)
    if expanding is not None:
        expanding.check(rows, (outputs // 2,) * 2, x.dtype)
    if not x.is_cuda:
        silu_mul_sums_reference(sums, norm, x, expanding)
        return
    warps = _SWIGLU_WARPS if rows <= _FEW else _WARPS
    room = _find_room(rows, x.device, expanding, None, parts=2, warps=warps)
    arguments = (
        *(sums, norm.squares, x, *expanding_arguments(expanding), room.b),
        *(outputs // 2, 1 / norm.width, norm.eps, rows, x.shape[1]),
    )
    _launch("silu_mul", outputs // 2, rows, arguments, x, room)


def begin_residual_reference(
    ids: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor,
    shrinking: Shrinking | None,
) -> None:
    """`begin_residual` in plain torch."""
    residual.copy_(embedding[ids])
    _put_off_norm(residual, weight, x, squares, shrinking)


def add_to_residual_reference(
    sums: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    x: torch.Tensor | None,
    squares: torch.Tensor | None,
    expanding: Expanding | None,
    shrinking: Shrinking | None,
) -> None:
    """`add_to_residual` in plain torch."""
    expand_reference(sums, expanding, (residual.shape[1],))
    residual += take_sums_reference(sums).to(residual.dtype)
    if weight is not None and x is not None and squares is not None:
        _put_off_norm(residual, weight, x, squares, shrinking)


def silu_mul_sums_reference(
    sums: torch.Tensor,
    norm: LateNorm,
    x: torch.Tensor,
    expanding: Expanding | None,
) -> None:
    """`silu_mul_sums` in plain torch."""
    expand_reference(sums, expanding, (sums.shape[1] // 2,) * 2)
    active = silu_mul_reference((take_sums_reference(sums) * norm.factors()).to(x.dtype))
    write_tiled(active, x)


def _put_off_norm(
    residual: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    squares: torch.Tensor,
    shrinking: Shrinking | None,
) -> None:
    write_tiled(residual * weight, x)
    shrink_reference(residual * weight, shrinking)
    squares += residual.float().square().sum(1)


def _check_normed(
    weight: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor,
    shrinking: Shrinking | None,
) -> None:
    rows, width = residual.shape
    padded = x.shape[1]
    assert 1 <= rows <= padded
    assert weight.shape == (width,)
    assert x.shape == tiled_shape(width, padded)
    assert weight.dtype == x.dtype == residual.dtype
    assert all(tensor.is_contiguous() for tensor in (weight, x))
    check_squares(squares, rows)
    if shrinking is not None:
        shrinking.check(rows, width, x.dtype)


class _Room(NamedTuple):
    """Pieces of B and of A that each warp of a block can hold; stacked, all of them together."""

    b: int
    a: int
    one: int  # ranks of the rows' only adapter, where these have kernels of their own, or 0
    warps: int
    stacked: bool  # whether warps of a block have the same columns, not the same rows
    bytes: int  # of a block


def _find_room(
    rows: int,
    device: torch.device,
    expanding: Expanding | None,
    shrinking: Shrinking | None,
    *,
    parts: int = 1,
    warps: int = _WARPS,
) -> _Room:
    """For all pieces of a block's rows, or for as many as there is memory for."""
    sizes = [(0, 0) if each is None else each.sizes for each in (expanding, shrinking)]
    most = _LITTLE
    if cuda_source.is_roomy(device):
        alone = all(slots <= 1 for slots, _ in sizes)
        most = max(_BESIDE[rows_padded(rows)], _ALONE if alone else 0)
    tiles = _tiles(rows)
    one = next((ranks for ranks in RANKS_OF_ONE if sizes in _sizes_of_one(ranks)), 0)
    stacked = one > 0 and (tiles, parts) == (2, 2)
    holders = 1 if stacked else warps
    left = most // (holders * tiles * _PIECE_BYTES)
    b, a = (min(slots, _ROWS) * ranks // 16 for slots, ranks in sizes)
    least_b, least_a = (
        min(least, ranks // 16) for least, (_, ranks) in zip(_LEAST[tiles], sizes, strict=True)
    )
    b = min(b, max(least_b, left // parts - min(a, left // 2)))
    a = min(a, max(least_a, left - b * parts))
    if (16 * b, 16 * a) != tuple(ranks for _, ranks in sizes):
        assert not stacked  # whose pieces fit everywhere
        one = 0  # no room for all pieces at once
    held = holders * tiles * (b * parts + a) * _PIECE_BYTES
    least = _SPREAD.get((rows_padded(rows), parts), 0) if is_hopper(device) else 0
    return _Room(b, a, one, warps, stacked, max(held, least))


def _sizes_of_one(ranks: int) -> Sequence[list[tuple[int, int]]]:
    """Slots and ranks, of B and of A (q|k|v's), of one adapter of so many ranks."""
    b, a, none = (1, ranks), (1, 3 * ranks), (0, 0)
    return [b, none], [none, a], [b, a]


def _tiles(rows: int) -> int:
    """Of 16 columns, of a warp."""
    return 1 if rows <= _FEW else 2


def _launch(
    kernel: str,
    columns: int,
    rows: int,
    arguments: Sequence[Argument],
    like: torch.Tensor,
    room: _Room,
) -> None:
    assert like.dtype == torch.bfloat16
    tiles = _tiles(rows)
    name = f"{kernel}_{tiles}" + (f"_{room.one}" if room.one else "")
    function = cuda_source.load_kernel(
        SOURCE, name, like.device, shared_percent=cuda_source.STEP_SHARED
    )
    wide, high = (1, room.warps) if room.stacked else (room.warps, 1)
    grid = (-(-columns // (_COLUMNS * tiles * wide)), -(-rows // (_ROWS * high)))
    threads = 32 * room.warps
    cuda_source.launch(function, grid, threads, room.bytes, arguments, like.device, early=True)
