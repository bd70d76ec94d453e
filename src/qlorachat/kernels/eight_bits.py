"""Keys and values in 8 bits, half of what 16 bit take: codes of int8 and a scale for each head.

A number is code * scale; a head's scale is its largest size over 127, in float32. A block of the
cache has all its codes first, [block_size, G, D], then all scales, [G, block_size], so that codes
are copied by whole lines and a head's scales together. Its tensor's shape, [block_size, G, D + 4],
says how many bytes these are, not where.
"""

from __future__ import annotations

from math import prod

import torch

from qlorachat.kernels.device import jit, tl

INT8 = torch.int8
SCALE_BYTES = 4
_LARGEST = 127.0
_TINY = 1e-38  # a scale that is not larger has codes of 0: one over it may be infinite


def fits(cache: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a cache may hold keys of `dtype`: in that dtype or in 8 bits."""
    return cache.dtype in (dtype, INT8)


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a cache of `dtype` has for `head_dim` numbers."""
    return head_dim + SCALE_BYTES if dtype == INT8 else head_dim


def head_dim_of(cache: torch.Tensor) -> int:
    """D of a cache [..., D], or [..., D + 4] in 8 bits."""
    return cache.shape[-1] - SCALE_BYTES if cache.dtype == INT8 else cache.shape[-1]


def codes_of(cache: torch.Tensor) -> torch.Tensor:
    """Of a cache in 8 bits, [..., block_size, G, D]."""
    shape = (*cache.shape[-3:-1], head_dim_of(cache))
    return cache.flatten(-3)[..., : prod(shape)].view(*cache.shape[:-3], *shape)


def scales_of(cache: torch.Tensor) -> torch.Tensor:
    """Of a cache in 8 bits, float32 [..., block_size, G]."""
    *blocks, block_size, heads, _ = cache.shape
    scales = cache.flatten(-3)[..., block_size * heads * head_dim_of(cache) :]
    return scales.view(torch.float32).view(*blocks, heads, block_size).transpose(-1, -2)


def find_scales(cache: torch.Tensor) -> torch.Tensor | None:
    """Where the first one is, for a kernel; None in 16 bit."""
    return scales_of(cache) if cache.dtype == INT8 else None


def encoded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of values [..., D]: [..., D] and float32 [...]."""
    wide = values.float()
    scales = wide.abs().amax(-1) * (1 / _LARGEST)
    inverse = 1 / torch.where(scales > _TINY, scales, 1)
    return torch.floor(wide * inverse[..., None] + 0.5).to(INT8), scales


def narrow(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values [..., block_size, G, D] as blocks of a cache of `dtype`; not in 8 bits: as given."""
    if dtype != INT8:
        return values
    blocks = values.new_empty((*values.shape[:-1], row_width(values.shape[-1], INT8)), dtype=INT8)
    for part, own in zip((codes_of(blocks), scales_of(blocks)), encoded(values), strict=True):
        part.copy_(own)
    return blocks


def widen(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of a cache, as numbers [..., block_size, G, D] in `dtype` where they are in 8 bits."""
    if blocks.dtype != INT8:
        return blocks
    return _decoded(codes_of(blocks), scales_of(blocks), dtype)


def find(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `take` and `put` know slots by, in all caches of one shape."""
    return (slots // cache.shape[1], slots % cache.shape[1]) if cache.dtype == INT8 else (slots,)


def take(cache: torch.Tensor, at: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Positions of a cache [blocks, block_size, G, D], as numbers: [slots, G, D]."""
    if cache.dtype == INT8:
        return _decoded(codes_of(cache)[at], scales_of(cache)[at], dtype)
    own = cache.view(-1, cache.shape[2] * cache.shape[3]).index_select(0, *at)
    return own.view(-1, *cache.shape[2:])


def put(
    cache: torch.Tensor,
    at: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    real: torch.Tensor | None = None,
) -> None:
    """Keys or values [slots, G, D] to their slots.

    real: bool []; False: there are none, all slots are 0, and that one gets what it has.
    """
    if cache.dtype == INT8:
        pairs = list(zip((codes_of(cache), scales_of(cache)), encoded(rows), strict=True))
    else:
        pairs = [(cache.flatten(0, 1), rows)]
    for part, own in pairs:
        part[at] = own if real is None else torch.where(real, own, part[(0,) * len(at)])


def _decoded(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return torch.mul(codes, scales[..., None], out=numbers)  # in float32, and rounded as it is kept


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
