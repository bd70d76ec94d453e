"""Rotary embedding of a fused q|k|v row, and its key and value written to the paged cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import eight_bits
from qlorachat.kernels.device import (
    dependent_launch,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)
from qlorachat.kernels.eight_bits import encode, scale_of

_HEADS = 4  # of a program and warp
_FEW_ROWS = 64  # up to here more programs are better, then larger ones


def rope_and_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """The rotated queries [T, H, D]; rotated keys and plain values go to their cache slots.

    qkv: [T, (H + 2G) * D], contiguous: H query heads, G key heads, G value heads.
    cos, sin: [positions, D] of any floating dtype, as LlamaRotaryEmbedding makes them; they are
    cast to qkv's dtype, and each product and sum is rounded to it, as in apply_rotary_pos_emb.
    positions, slots: int32 [T]; slot = block * block_size + offset, all different, and -1 for a
    padding row, which writes nothing.
    key_cache, value_cache: [blocks, block_size, G, D], contiguous, of qkv's dtype, or in 8 bits
    (`eight_bits`).
    """
    _check(qkv, cos, sin, positions, slots, key_cache, value_cache)
    if not runs_triton(qkv):
        return rope_and_cache_reference(qkv, cos, sin, positions, slots, key_cache, value_cache)
    kv_heads, head_dim = key_cache.shape[2], eight_bits.head_dim_of(key_cache)
    half, all_heads = head_dim // 2, qkv.shape[1] // head_dim
    q = qkv.new_empty(len(qkv), all_heads - 2 * kv_heads, head_dim)
    warps = 1 if len(qkv) <= _FEW_ROWS else 4
    grid = (len(qkv), triton.cdiv(all_heads, warps * _HEADS))
    shape = {"heads": q.shape[1], "kv_heads": kv_heads, "half": half}
    shape |= {"block_size": key_cache.shape[1], "width": key_cache.shape[3]}
    tile = {"head_block": warps * _HEADS, "half_block": triton.next_power_of_2(half)}
    _rope_kernel[grid](
        qkv,
        cos,
        sin,
        positions,
        slots,
        q,
        key_cache,
        value_cache,
        *map(eight_bits.find_scales, (key_cache, value_cache)),
        **shape,
        **tile,
        num_warps=warps,
        **dependent_launch(qkv),
    )
    return q


def rope_and_cache_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> torch.Tensor:
    """`rope_and_cache` in plain torch; like it, it never waits for the device."""
    kv_heads, head_dim = key_cache.shape[2], eight_bits.head_dim_of(key_cache)
    turning, values = qkv.view(len(qkv), -1, head_dim).split_with_sizes(
        [qkv.shape[1] // head_dim - kv_heads, kv_heads], dim=1
    )
    cosines, sines = (table[positions].to(qkv.dtype)[:, None] for table in (cos, sin))
    first, second = turning.chunk(2, dim=2)
    turned = turning * cosines + torch.cat((-second, first), dim=2) * sines
    places = _repeat_real(slots) if slots.is_cuda else _find_real(slots)
    at = eight_bits.find(key_cache, places.target)
    _write(key_cache, turned[:, -kv_heads:], places, at)
    _write(value_cache, values, places, at)
    return turned[:, :-kv_heads].contiguous()


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    head_dim = eight_bits.head_dim_of(key_cache)
    assert qkv.dim() == 2
    assert qkv.shape[1] % head_dim == head_dim % 2 == 0
    assert cos.shape == sin.shape == (len(cos), head_dim)
    assert positions.shape == slots.shape == qkv.shape[:1]
    assert positions.dtype == slots.dtype == torch.int32
    assert key_cache.shape == value_cache.shape
    assert key_cache.dtype == value_cache.dtype
    assert eight_bits.fits(key_cache, qkv.dtype)
    assert all(tensor.is_contiguous() for tensor in (qkv, cos, sin, key_cache, value_cache))


class _Places(NamedTuple):
    """Which rows to write to which slots; no slot twice with different rows."""

    source: torch.Tensor | None  # None: all rows
    target: torch.Tensor
    real: torch.Tensor | None  # bool []; False: no row is, and slot 0 gets what it has


def _write(
    cache: torch.Tensor, rows: torch.Tensor, places: _Places, at: tuple[torch.Tensor, ...]
) -> None:
    """at: of the places' targets."""
    chosen = rows if places.source is None else rows.index_select(0, places.source)
    eight_bits.put(cache, at, chosen, places.real)


def _find_real(slots: torch.Tensor) -> _Places:
    """The rows that are no padding; a card would be waited for."""
    if int(slots.min()) >= 0:
        return _Places(None, slots.long(), None)
    source = (slots >= 0).nonzero()[:, 0]
    return _Places(source, slots.index_select(0, source).long(), None)


def _repeat_real(slots: torch.Tensor) -> _Places:
    """As many rows as there are, where a real row stands in for the padding."""
    last = slots.argmax(keepdim=True)
    source = torch.where(slots >= 0, torch.arange(len(slots), device=slots.device), last)
    target = slots.index_select(0, source).clamp(min=0).long()
    return _Places(source, target, (slots.index_select(0, last) >= 0)[0])


@jit
def _rope_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    q: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    block_size: tl.constexpr,
    width: tl.constexpr,
    head_block: tl.constexpr,
    half_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * head_block + tl.arange(0, head_block))[:, None]
    column = tl.arange(0, half_block)[None, :]
    narrow = column < half
    inside = narrow & (head < heads + 2 * kv_heads)
    at = head * (2 * half) + column
    row = qkv + token * ((heads + 2 * kv_heads) * 2 * half) + at
    first = tl.load(row, mask=inside, other=0.0)
    second = tl.load(row + half, mask=inside, other=0.0)

    angle = tl.load(positions + token).to(tl.int64) * (2 * half) + column
    turned_first = _product(first, cos + angle, narrow) - _product(second, sin + angle, narrow)
    angle += half
    turned_second = _product(second, cos + angle, narrow) + _product(first, sin + angle, narrow)

    query = q + token * (heads * 2 * half) + at
    _store_halves(query, turned_first, turned_second, half, inside & (head < heads))
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    block, place = slot // block_size, slot % block_size
    block_width: tl.constexpr = block_size * kv_heads * width
    key_head, value_head = head - heads, head - heads - kv_heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    is_value = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads)
    if key_scales is not None:  # of what is rounded, as in another cache
        turned_first = turned_first.to(first.dtype).to(tl.float32)
        turned_second = turned_second.to(first.dtype).to(tl.float32)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        key_scale = scale_of(turned_first, turned_second)
        value_scale = scale_of(first, second)
        scale_at = block * (block_width // 4) + place
        tl.store(key_scales + scale_at + key_head * block_size, key_scale, mask=is_key)
        tl.store(value_scales + scale_at + value_head * block_size, value_scale, mask=is_value)
        turned_first = encode(turned_first, key_scale)
        turned_second = encode(turned_second, key_scale)
        first = encode(first, value_scale)
        second = encode(second, value_scale)
    row_at = block * block_width + place * (kv_heads * 2 * half) + column
    keys = key_cache + row_at + key_head * (2 * half)
    _store_halves(keys, turned_first, turned_second, half, is_key & narrow)
    values = value_cache + row_at + value_head * (2 * half)
    _store_halves(values, first, second, half, is_value & narrow)


@jit
def _product(values: tl.tensor, factors: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """In float32, with the factors and the product rounded to the values' dtype."""
    loaded = tl.load(factors, mask=mask, other=0.0).to(values.dtype).to(tl.float32)
    return (values.to(tl.float32) * loaded).to(values.dtype).to(tl.float32)


@jit
def _store_halves(
    at: tl.tensor, first: tl.tensor, second: tl.tensor, half: tl.tensor, mask: tl.tensor
) -> None:
    tl.store(at, first.to(at.dtype.element_ty), mask=mask)
    tl.store(at + half, second.to(at.dtype.element_ty), mask=mask)
