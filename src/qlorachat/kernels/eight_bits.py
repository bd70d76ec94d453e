"""Keys and values in 8 bits, half of what 16 bit take: float8 e4m3, four binary digits.

torch neither indexes nor copies rows of this dtype, so a cache is taken as bytes for that. Triton
kernels decode by themselves: cards before Ada have no instruction for it.
"""

from __future__ import annotations

import torch

from qlorachat.kernels.device import jit, tl

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def fits(cache: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a cache may hold keys of `dtype`: in that dtype or in 8 bits."""
    return cache.dtype in (dtype, E4M3)


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """The cache itself, or its bytes where it is in 8 bits."""
    return cache.view(torch.uint8) if cache.dtype == E4M3 else cache


def narrow(values: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Values as `as_bytes` of the cache holds them; beyond e4m3's range the largest."""
    if cache.dtype != E4M3:
        return values
    return values.clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)


def widen(taken: torch.Tensor, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What was taken from `as_bytes` of the cache, in `dtype`."""
    return taken.view(E4M3).to(dtype) if cache.dtype == E4M3 else taken


# e4m3's bits, moved to a float32's, are a number 2^120 times smaller.


@jit
def encode(values: tl.tensor) -> tl.tensor:
    """Float32 to the bits of e4m3, uint8: to nearest, to even between two, at most the largest."""
    bits = (tl.abs(values) * 7.52316384526264e-37).to(tl.uint32, bitcast=True)
    small = tl.minimum((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20, 0x7E)
    sign = (values.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (small | sign).to(tl.uint8)


@jit
def decode(code: tl.tensor) -> tl.tensor:
    """The bits of e4m3, uint8, to float32."""
    wide = code.to(tl.uint32)
    size = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((wide & 0x80) != 0, -size, size)
