"""What comes between the products of a fused decode step, attention apart (`decode_attention`).

A step has M rows, at most 64. A product takes a tiled x (`tiles`), of P padded rows, and leaves
sums (`sums`). The RMS norm before it is put off: x is h * weight, the squares of h are added up
beside it, and who reads the product's sums multiplies them by 1 / rms(h).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qlorachat.kernels import cuda_source
from qlorachat.kernels.activation import silu_mul_reference
from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.sums import (
    RowAdapters,
    adapter_shape,
    adapter_tensors,
    check_squares,
    check_sums,
    inverse_rms_reference,
    take_sums_reference,
)
from qlorachat.kernels.tiles import tiled_shape, write_tiled

SOURCE = "decode_step.cu"
_THREADS, _ROWS = 128, 8  # of a block


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
    [blocks, P, 64]; contiguous and of one dtype, bfloat16 on a card. squares: float32 [M].
    """
    rows, width = residual.shape
    assert ids.shape == (rows,)
    assert ids.dtype == torch.int64
    assert embedding.shape == (len(embedding), width)
    assert embedding.dtype == residual.dtype
    assert all(tensor.is_contiguous() for tensor in (ids, embedding, residual))
    _check_normed(weight, x, residual, squares)
    if not residual.is_cuda:
        begin_residual_reference(ids, embedding, weight, x, residual, squares)
        return
    arguments = (ids, embedding, weight, x, residual, squares, rows, width, x.shape[1])
    _launch("begin_residual", (width, 2 * _THREADS), (rows, 1), arguments, residual)


def add_to_residual(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    x: torch.Tensor | None,
    squares: torch.Tensor | None,
) -> None:
    """residual += W x plus LoRA, in place; then x and squares as `begin_residual` leaves them.

    sums: float32 [M, width], cleared. residual: [M, width], contiguous; what is added is rounded to
    its dtype before the addition. weight, x, squares: as in `begin_residual`, or all None.
    """
    rows, width = residual.shape
    assert sums.shape == residual.shape
    assert residual.is_contiguous()
    check_sums(sums, adapters, 1, residual.dtype)
    if weight is None or x is None or squares is None:
        assert weight is x is squares is None
    else:
        _check_normed(weight, x, residual, squares)
    if not residual.is_cuda:
        add_to_residual_reference(sums, adapters, residual, weight, x, squares)
        return
    arguments = (
        *(sums, *adapter_tensors(adapters), residual, weight, x, squares),
        *(*adapter_shape(adapters, width), rows, 0 if x is None else x.shape[1]),
    )
    tiles = _tiles(rows)
    assert width % (16 * tiles) == 0
    shape = ((width, 64 * tiles), (rows, _ROWS))
    _launch(f"add_to_residual_{tiles}", *shape, arguments, residual)


def silu_mul_sums(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    hidden: int,
    eps: float,
    x: torch.Tensor,
) -> None:
    """`silu_mul` of gate|up = (W x plus LoRA) / rms, rounded once, tiled.

    sums: float32 [M, 2 * width], cleared; width is a multiple of 64. squares: float32 [M], sums
    over `hidden` columns. x: tiled [blocks, P, 64], contiguous; bfloat16 on a card.
    """
    rows, outputs = sums.shape
    assert outputs % 2 == 0
    assert x.shape == tiled_shape(outputs // 2, x.shape[1])
    assert rows <= x.shape[1]
    assert x.is_contiguous()
    check_sums(sums, adapters, 2, x.dtype)
    check_squares(squares, rows)
    if not x.is_cuda:
        silu_mul_sums_reference(sums, adapters, squares, hidden, eps, x)
        return
    arguments = (
        *(sums, *adapter_tensors(adapters), squares, x),
        *(*adapter_shape(adapters, outputs), 1 / hidden, eps, rows, x.shape[1]),
    )
    tiles = _tiles(rows)
    shape = ((outputs // 2, 64 * tiles), (rows, _ROWS))
    _launch(f"silu_mul_{tiles}", *shape, arguments, x)


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
    residual += take_sums_reference(sums, adapters, (0, sums.shape[1])).to(residual.dtype)
    if weight is not None and x is not None and squares is not None:
        _put_off_norm(residual, weight, x, squares)


def silu_mul_sums_reference(
    sums: torch.Tensor,
    adapters: RowAdapters | None,
    squares: torch.Tensor,
    hidden: int,
    eps: float,
    x: torch.Tensor,
) -> None:
    """`silu_mul_sums` in plain torch."""
    outputs = sums.shape[1]
    taken = take_sums_reference(sums, adapters, (0, outputs // 2, outputs))
    gate_up = (taken * inverse_rms_reference(squares, hidden, eps)).to(x.dtype)
    write_tiled(silu_mul_reference(gate_up), x)


def _put_off_norm(
    residual: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, squares: torch.Tensor
) -> None:
    write_tiled(residual * weight, x)
    squares += residual.float().square().sum(1)


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
    check_squares(squares, rows)


def _tiles(rows: int) -> int:
    """Of 16 columns, one warp's: few where blocks are few."""
    return 1 if rows <= 16 else 2


def _launch(
    kernel: str,
    columns: tuple[int, int],
    rows: tuple[int, int],
    arguments: Sequence[Argument],
    like: torch.Tensor,
) -> None:
    """Columns and rows: how many there are, and how many of them a block takes."""
    assert like.dtype == torch.bfloat16
    function = cuda_source.load_kernel(
        SOURCE, like.dtype, kernel, like.device, shared_percent=cuda_source.STEP_SHARED
    )
    grid = [-(-count // own) for count, own in (columns, rows)]
    cuda_source.launch(function, grid, _THREADS, 0, arguments, like.device, early=True)
