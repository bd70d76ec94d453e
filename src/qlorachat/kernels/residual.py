"""The residual stream of a fused decode step, and the tiled x of the product that reads it next.

A step has M rows, at most 64, in P padded ones. A product takes a tiled x (`tiles`) and leaves sums
(`sums`). The RMS norm between them is put off: x is h * weight, the squares of h are added up
beside it, and who reads the product's sums multiplies them by 1 / rms(h) (`decode_step`).
"""

from __future__ import annotations

import torch

from qlorachat.kernels.device import (
    dependent_launch,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)
from qlorachat.kernels.sums import (
    ROW_BLOCK,
    RowAdapters,
    adapter_shape,
    adapter_tensors,
    check_squares,
    check_sums,
    clear_sums,
    load_b,
    load_sums,
    take_sums_reference,
)
from qlorachat.kernels.tiles import store_tiled, tiled_shape, write_tiled

_COLUMNS = 64  # of one program: a block of a tiled x


def begin_residual(
    ids: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    """residual = embedding[ids], x = residual * weight tiled, squares += sum(residual^2).

    ids: int64 [M]. embedding: [V, width]; weight: [width]; residual: [M, width]; x: tiled
    [blocks, P, 64]; contiguous and of one dtype. squares: float32 [P].
    """
    rows, width = residual.shape
    assert ids.shape == (rows,)
    assert ids.dtype == torch.int64
    assert embedding.shape == (len(embedding), width)
    assert embedding.dtype == residual.dtype
    assert all(tensor.is_contiguous() for tensor in (ids, embedding, residual))
    _check_normed(weight, x, residual, squares)
    if not runs_triton(residual):
        begin_residual_reference(ids, embedding, weight, x, residual, squares)
        return
    _begin_kernel[_grid(width, rows)](
        *(ids, embedding, weight, x, residual, squares, rows),
        width=width,
        padded=x.shape[1],
        row_block=ROW_BLOCK,
        column_block=_COLUMNS,
        **dependent_launch(residual),
    )


def add_to_residual(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    x: torch.Tensor | None,
    squares: torch.Tensor | None,
) -> None:
    """residual += W x plus LoRA, in place; then x and squares as `begin_residual` leaves them.

    sums: float32 [width, P], cleared. residual: [M, width], contiguous; what is added is rounded to
    its dtype before the addition. weight, x, squares: as in `begin_residual`, or all None.
    """
    rows, width = residual.shape
    assert len(sums) == width
    assert residual.is_contiguous()
    check_sums(sums, adapters, rows, 1, residual.dtype)
    if weight is None or x is None or squares is None:
        assert weight is x is squares is None
    else:
        assert x.shape[1] == sums.shape[1]
        _check_normed(weight, x, residual, squares)
    if not runs_triton(residual):
        add_to_residual_reference(sums, adapters, residual, weight, x, squares)
        return
    _add_kernel[_grid(width, rows)](
        *(sums, *adapter_tensors(adapters), residual, weight, x, squares, rows),
        width=width,
        **adapter_shape(adapters, 1, residual.dtype),
        padded=sums.shape[1],
        row_block=ROW_BLOCK,
        column_block=_COLUMNS,
        **dependent_launch(residual),
    )


def begin_residual_reference(
    ids: torch.Tensor,
    embedding: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    squares: torch.Tensor,
) -> None:
    """`begin_residual` in plain torch."""
    residual.copy_(embedding[ids])
    _put_off_norm(residual, weight, x, squares)


def add_to_residual_reference(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    x: torch.Tensor | None,
    squares: torch.Tensor | None,
) -> None:
    """`add_to_residual` in plain torch."""
    residual += take_sums_reference(sums, adapters, len(residual), (0, len(sums))).to(
        residual.dtype
    )
    if weight is not None and x is not None and squares is not None:
        _put_off_norm(residual, weight, x, squares)


def _put_off_norm(
    residual: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, squares: torch.Tensor
) -> None:
    write_tiled(residual * weight, x)
    squares[: len(residual)] += residual.float().square().sum(1)


def _check_normed(
    weight: torch.Tensor, x: torch.Tensor, residual: torch.Tensor, squares: torch.Tensor
) -> None:
    rows, width = residual.shape
    padded = x.shape[1]
    assert 1 <= rows <= padded
    assert weight.shape == (width,)
    assert x.shape == tiled_shape(width, padded)
    assert weight.dtype == x.dtype == residual.dtype
    assert all(tensor.is_contiguous() for tensor in (weight, x))
    check_squares(squares, padded)


def _grid(columns: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, ROW_BLOCK)


@jit
def _begin_kernel(
    ids: tl.tensor,
    embedding: tl.tensor,
    weight: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    squares: tl.tensor,
    rows: int,
    width: tl.constexpr,
    padded: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    column = tl.program_id(0) * column_block + tl.arange(0, column_block)
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    token = tl.load(ids + row, mask=row < rows, other=0)
    h = tl.load(embedding + token[:, None] * width + column[None, :], mask=inside, other=0.0)
    _leave_residual(h, residual, weight, x, squares, row, column, rows, width, padded)


@jit
def _add_kernel(
    sums: tl.tensor,
    shrunk: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    x: tl.tensor,
    squares: tl.tensor,
    rows: int,
    width: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
    precision: tl.constexpr,
    padded: tl.constexpr,
    row_block: tl.constexpr,
    column_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    column = tl.program_id(0) * column_block + tl.arange(0, column_block)
    row = tl.program_id(1) * row_block + tl.arange(0, row_block)
    known, real = column < width, row < rows
    mine, own_b = load_b(
        *(b, slots, row, column, known, real),
        *(0, width, rank, depths, depth_block),
    )
    wait_for_previous(early)
    at = residual + row[:, None] * width + column[None, :]
    old = tl.load(at, mask=real[:, None] & known[None, :], other=0.0)
    added = load_sums(
        *(sums, shrunk, b, slots, scales, mine, own_b, row, column, known, real, 0),
        *(width, parts, rank, depths, depth_block, padded, precision),
    )
    h = (old.to(tl.float32) + added.to(old.dtype).to(tl.float32)).to(old.dtype)
    _leave_residual(h, residual, weight, x, squares, row, column, rows, width, padded)
    clear_sums(sums, row, column, known, padded)


@jit
def _leave_residual(
    h: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    x: tl.tensor,
    squares: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    padded: tl.constexpr,
) -> None:
    """h, [rows, columns] with zeros outside, written; its product with weight and its squares."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(residual + row[:, None] * width + column[None, :], h, mask=inside)
    if weight is not None:
        weights = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        wide = h.to(tl.float32)
        product = (wide * weights[None, :]).to(h.dtype)
        store_tiled(x, product, row, tl.program_id(0), row < rows, padded)
        square = tl.sum(wide * wide, axis=1)
        tl.atomic_add(squares + row, square, mask=row < rows, sem="relaxed")
