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
from qlorachat.kernels.decode_lora import (
    Expanding,
    Shrinking,
    expand_reference,
    expanding_arguments,
    shrink_reference,
    shrinking_arguments,
)
from qlorachat.kernels.sums import LateNorm, check_squares, check_sums, take_sums_reference
from qlorachat.kernels.tiles import tiled_shape, write_tiled

SOURCE = "decode_step.cu"
_ROWS, _WARPS = 8, 4  # of a block
_SWIGLU_WARPS = 7  # for few rows
_FEW = 16  # rows up to which a warp has 16 columns, not 32


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
    arguments = (
        *(ids, embedding, weight, x, residual, squares),
        *(*shrinking_arguments(shrinking), rows, width, x.shape[1]),
    )
    _launch("begin_residual", width, rows, arguments, residual)


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
    arguments = (
        *(sums, residual, weight, x, squares, *expanding_arguments(expanding)),
        *(*shrinking_arguments(shrinking), rows, width, 0 if x is None else x.shape[1]),
    )
    assert width % 64 == 0
    _launch("add_to_residual", width, rows, arguments, residual)


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
    arguments = (
        *(sums, norm.squares, x, *expanding_arguments(expanding)),
        *(outputs // 2, 1 / norm.width, norm.eps, rows, x.shape[1]),
    )
    _launch("silu_mul", outputs // 2, rows, arguments, x)


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


def _launch(
    kernel: str, columns: int, rows: int, arguments: Sequence[Argument], like: torch.Tensor
) -> None:
    assert like.dtype == torch.bfloat16
    tiles = 1 if rows <= _FEW else 2  # few where blocks are few
    name = f"{kernel}_{tiles}"
    warps = _SWIGLU_WARPS if name == "silu_mul_1" else _WARPS
    function = cuda_source.load_kernel(
        SOURCE, name, like.device, shared_percent=cuda_source.STEP_SHARED
    )
    grid = (-(-columns // (16 * warps * tiles)), -(-rows // _ROWS))
    cuda_source.launch(function, grid, 32 * warps, 0, arguments, like.device, early=True)
