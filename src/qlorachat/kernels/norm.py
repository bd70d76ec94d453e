"""RMS norm, with or without the residual sum before it; rounds where LlamaRMSNorm rounds."""

from __future__ import annotations

import torch
from torch.nn import functional

from qlorachat.kernels.device import (
    dependent_launch,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * (x / rms(x))` over the last dimension.

    x: [T, width], contiguous; weight: [width]; both of one dtype, which the result has. The norm is
    computed in float32 and rounded before the weight, as in transformers' LlamaRMSNorm.
    """
    _check(x, weight)
    if not runs_triton(x):
        return rms_norm_reference(x, weight, eps)
    normed = torch.empty_like(x)
    _launch(x, None, weight, normed, None, eps)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to the dtype first.

    x, residual: [T, width], contiguous; weight: [width]; all of one dtype.
    """
    _check(x, weight)
    _check(residual, weight)
    assert len(residual) == len(x)
    if not runs_triton(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, normed, total, eps)
    return normed, total


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    return weight * functional.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain torch."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert x.dim() == 2
    assert x.is_contiguous()
    assert weight.shape == x.shape[1:], f"a weight {weight.shape} for rows {x.shape}"
    assert weight.dtype == x.dtype


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _norm_kernel[(rows,)](
        *(x, residual, weight, normed, total, eps),
        width=width,
        block=block,
        num_warps=warps,
        **dependent_launch(x),
    )


@jit
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    eps: float,
    width: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    columns = tl.arange(0, block)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    values = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        added = tl.load(residual + at, mask=inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(total + at, values, mask=inside)
    wide = values.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / width
    rounded = (wide * tl.rsqrt(mean_square + eps)).to(values.dtype).to(tl.float32)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (weights * rounded).to(values.dtype), mask=inside)
