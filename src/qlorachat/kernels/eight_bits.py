"""Keys and values in 8 bits, half of what 16 bit take: codes of int8 and a scale for each head.

A head's row of D numbers is D + 8 bytes: its codes, the float32 scale, which is the largest size
over 127, and 4 bytes that keep rows aligned. A number is code * scale.
"""

from __future__ import annotations

import torch

from qlorachat.kernels.device import jit, tl

INT8 = torch.int8
TAIL = 8  # bytes of a row behind its codes
_LARGEST = 127.0
_TINY = 1e-38  # a scale that is not larger has codes of 0: one over it may be infinite


def fits(cache: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a cache may hold keys of `dtype`: in that dtype or in 8 bits."""
    return cache.dtype in (dtype, INT8)


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a cache of `dtype` has for `head_dim` numbers."""
    return head_dim + TAIL if dtype == INT8 else head_dim


def head_dim_of(cache: torch.Tensor) -> int:
    """D of a cache [..., D], or [..., D + 8] in 8 bits."""
    return cache.shape[-1] - TAIL if cache.dtype == INT8 else cache.shape[-1]


def scales_of(cache: torch.Tensor) -> torch.Tensor | None:
    """The whole cache as float32, a row's scale behind D / 4 others; None in 16 bit."""
    return cache.view(torch.float32) if cache.dtype == INT8 else None


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., D] as rows of a cache of `dtype`, in 8 bits [..., D + 8]; otherwise as given."""
    if dtype != INT8:
        return values
    wide = values.float()
    scales = wide.abs().amax(-1, keepdim=True) * (1 / _LARGEST)
    inverse = 1 / torch.where(scales > _TINY, scales, 1)
    codes = torch.floor(wide * inverse + 0.5).to(INT8)
    tails = torch.cat((scales, torch.zeros_like(scales)), -1).view(INT8)
    return torch.cat((codes, tails), -1)


def widen(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a cache as numbers, [..., D], in `dtype` where they are in 8 bits."""
    if rows.dtype != INT8:
        return rows
    codes, tails = rows.split_with_sizes((rows.shape[-1] - TAIL, TAIL), -1)
    scales = tails.contiguous().view(torch.float32)[..., :1]
    return (codes.float() * scales).to(dtype)


@jit
def scale_of(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Of rows that are given in two halves, zeros beyond them; [rows, 1]."""
    largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
    return largest[:, None] * 0.007874015748031496


@jit
def encode(values: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Codes of float32 values, int8."""
    inverse = 1.0 / tl.where(scale > 1e-38, scale, 1.0)
    return tl.floor(values * inverse + 0.5).to(tl.int8)


@jit
def decode(codes: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Float32 of codes."""
    return codes.to(tl.float32) * scale
