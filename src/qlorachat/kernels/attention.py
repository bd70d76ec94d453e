"""Attention of one new token a sequence over its paged keys and values, split along the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from qlorachat.kernels import eight_bits
from qlorachat.kernels.device import (
    count_processors,
    dependent_launch,
    dot_precision,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)
from qlorachat.kernels.eight_bits import decode

_TILE = 32  # positions of one load
_LONG_SPAN = 1024  # positions that one program should not exceed: the others would wait for it
_PROGRAMS_PER_PROCESSOR = 4
_MOST_SPLITS = 32
_LOG2_E = 1.4426950408889634


def paged_decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    splits: int | None = None,
) -> None:
    """softmax(scale * q @ keys^T) @ values of each row's own context, written to `out`.

    q, out: [B, H, D], contiguous. key_cache, value_cache: [blocks, block_size, G, D], contiguous;
    query head h reads key head h // (H // G). All of one dtype, or the caches in 8 bits
    (`eight_bits`); sums are in float32.
    block_tables: int32 [B, max_blocks]; what lies beyond a row's context is not looked at.
    context_lengths: int32 [B], the new token included; 0 for a padding row, whose output is 0.
    splits: a power of two, how many programs share one context; None chooses by card, B and
    max_blocks. On a card nothing waits for the lengths, so a CUDA graph may hold this.
    """
    _check(q, key_cache, value_cache, block_tables, context_lengths)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    context = (key_cache, value_cache, block_tables, context_lengths)
    if not runs_triton(q):
        out.copy_(paged_decode_attention_reference(q, *context, scale))
        return
    splits = splits or _choose_splits(q, key_cache, block_tables)
    if splits == 1:
        _attend(q, *context, scale, out, None)
        return
    rows, heads, head_dim = q.shape
    means = q.new_empty(rows, heads, splits, head_dim, dtype=torch.float32)
    sums = q.new_empty(rows, heads, splits, dtype=torch.float32)
    _attend(q, *context, scale, means, sums)
    shape = {"heads": heads, "head_dim": head_dim, "splits": splits}
    tile = {"tile": _TILE, "column_block": triton.next_power_of_2(head_dim), "num_warps": 2}
    _combine_kernel[(heads, rows)](
        *(means, sums, context_lengths, out),
        **shape,
        **tile,
        **dependent_launch(q),
    )


def paged_decode_attention_reference(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `paged_decode_attention` writes, in plain torch; on a card it never waits either."""
    places = list_places(block_tables, context_lengths, key_cache.shape[1])
    mixed = gathered_decode_attention(q, key_cache, value_cache, places, scale)
    return mixed.masked_fill(context_lengths[:, None, None] == 0, 0)


def read_blocks(
    cache: torch.Tensor, blocks: torch.Tensor | slice, dtype: torch.dtype
) -> torch.Tensor:
    """Keys or values of these blocks, [positions, G, D], in `dtype`; blocks: int64, or a slice.

    Of a slice, where nothing has to be widened, a view.
    """
    return eight_bits.widen(cache[blocks], dtype).flatten(0, 1)


class Places(NamedTuple):
    """Where the positions of each row's context are in a cache; the same for every layer."""

    slots: torch.Tensor  # int [B, positions]: block * block_size + offset
    seen: torch.Tensor | None  # bool [B, positions]: is it in the context; None: all are


def list_places(
    block_tables: torch.Tensor, context_lengths: torch.Tensor, block_size: int
) -> Places:
    """The places of all positions that a decode step may look at.

    Beyond a row's context it is the slot of position 0: old numbers there may be infinite, which
    no weight of 0 would stop. On a CPU the lengths may be looked at, and spare what is unused.
    """
    offsets = torch.arange(block_size, dtype=torch.int32, device=block_tables.device)
    slots = (block_tables[:, :, None] * block_size + offsets).flatten(1)
    if not slots.is_cuda:
        lengths = context_lengths.tolist()
        slots = slots[:, : max(1, *lengths)]
        if min(lengths) == max(lengths) > 0:
            return Places(slots, None)
    positions = torch.arange(slots.shape[1], device=slots.device)
    first = torch.where(context_lengths > 0, slots[:, 0], 0)
    seen = positions < context_lengths[:, None]
    return Places(torch.where(seen, slots, first[:, None]), seen)


def gathered_decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    places: Places,
    scale: float,
) -> torch.Tensor:
    """Attention of q [B, H, D] to the keys and values at `places`, [B, H, D], in plain torch."""
    kv_heads, at = key_cache.shape[2], eight_bits.find(key_cache, places.slots.reshape(-1))
    keys, values = (
        eight_bits.take(cache, at, q.dtype).view(*places.slots.shape, kv_heads, -1).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )
    # the query heads of one key head become its rows
    grouped = q.view(len(q), kv_heads, -1, q.shape[2])
    mask = None if places.seen is None else places.seen[:, None, None, :]
    mixed = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=mask, scale=scale
    )
    return mixed.reshape(q.shape)


def _check(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
) -> None:
    kv_heads, head_dim = key_cache.shape[2], eight_bits.head_dim_of(key_cache)
    assert q.shape == (len(q), q.shape[1], head_dim)
    assert q.shape[1] % kv_heads == 0, "query heads are no multiple of the key heads"
    assert key_cache.shape == value_cache.shape
    assert key_cache.dtype == value_cache.dtype
    assert eight_bits.fits(key_cache, q.dtype)
    assert all(tensor.is_contiguous() for tensor in (q, key_cache, value_cache))
    assert block_tables.stride(1) == 1
    assert len(block_tables) == len(context_lengths) == len(q)
    assert block_tables.dtype == context_lengths.dtype == torch.int32


def _choose_splits(q: torch.Tensor, key_cache: torch.Tensor, block_tables: torch.Tensor) -> int:
    """Enough programs to fill the card, and no long span; rounded down to a power of two."""
    block_size, kv_heads = key_cache.shape[1:3]
    longest = block_tables.shape[1] * block_size
    filling = _PROGRAMS_PER_PROCESSOR * count_processors(q.device) // (len(q) * kv_heads)
    splits = min(max(filling, longest // _LONG_SPAN, 1), -(-longest // _TILE), _MOST_SPLITS)
    return 1 << (splits.bit_length() - 1)


def _attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
    means: torch.Tensor,
    sums: torch.Tensor | None,
) -> None:
    """Each split's mean, [B, H, splits, D], and log2 of its sum; without `sums` there is one."""
    block_size, kv_heads = key_cache.shape[1:3]
    group, head_dim = q.shape[1] // kv_heads, q.shape[2]
    splits = 1 if sums is None else sums.shape[2]
    shape = {"block_size": block_size, "kv_heads": kv_heads, "group": group, "head_dim": head_dim}
    shape |= {"width": key_cache.shape[3]}
    scales = map(eight_bits.find_scales, (key_cache, value_cache))
    tile = {
        "tile": _TILE,
        "group_block": max(16, triton.next_power_of_2(group)),  # tensor cores take 16 rows
        "column_block": triton.next_power_of_2(head_dim),
        "precision": dot_precision(q.dtype),
    }
    _attend_kernel[(kv_heads, splits, len(q))](
        *(q, key_cache, value_cache, *scales, block_tables, context_lengths, means, sums),
        *(scale * _LOG2_E, block_tables.stride(0)),
        **shape,
        splits=splits,
        **tile,
        num_warps=4,
        num_stages=5,
        **dependent_launch(q),
    )


@jit
def _attend_kernel(
    q: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    block_tables: tl.tensor,
    context_lengths: tl.tensor,
    means: tl.tensor,
    sums: tl.tensor,
    scale: float,
    table_stride: int,
    block_size: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    splits: tl.constexpr,
    tile: tl.constexpr,
    group_block: tl.constexpr,
    column_block: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr,
) -> None:
    kv_head, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lengths + row)  # an input of the step: no kernel writes it
    wait_for_previous(early)
    span = _span(length, splits, tile)
    start = split * span
    if sums is not None and start >= length:
        return
    stop = tl.minimum(start + span, length)

    member = tl.arange(0, group_block)
    column = tl.arange(0, column_block)[None, :]
    head = (row * kv_heads + kv_head) * group + member
    mine = (member < group)[:, None] & (column < head_dim)
    at = head[:, None] * head_dim + column
    queries = tl.load(q + at, mask=mine, other=0.0).to(tl.float32)

    peak = tl.full([group_block], float("-inf"), tl.float32)
    total = tl.zeros([group_block], tl.float32)
    mixed = tl.zeros([group_block, column_block], tl.float32)
    for first in range(start, stop, tile):
        position = first + tl.arange(0, tile)
        seen = position < stop
        table = block_tables + row * table_stride + position // block_size
        block = tl.load(table, mask=seen, other=0).to(tl.int64)
        place, block_width = position % block_size, block_size * kv_heads * width
        kept = block * block_width + (place * kv_heads + kv_head) * head_dim
        cached = kept[:, None] + column
        loaded = seen[:, None] & (column < head_dim)
        keys = tl.load(key_cache + cached, mask=loaded, other=0)
        values = tl.load(value_cache + cached, mask=loaded, other=0)
        if key_scales is not None:
            scale_at = (block * (block_width // 4) + kv_head * block_size + place)[:, None]
            key_scale = tl.load(key_scales + scale_at, mask=seen[:, None], other=0.0)
            value_scale = tl.load(value_scales + scale_at, mask=seen[:, None], other=0.0)
            keys = decode(keys, key_scale).to(q.dtype.element_ty)
            values = decode(values, value_scale).to(q.dtype.element_ty)

        scores = tl.dot(queries, tl.trans(keys.to(tl.float32)), input_precision=precision)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        fading = tl.exp2(peak - new_peak)
        shares = tl.exp2(scores - new_peak[:, None])
        total = total * fading + tl.sum(shares, axis=1)
        # rounded to 16 bit where the values are, since TF32 would cut off
        shares = shares.to(values.dtype).to(tl.float32)
        mixed *= fading[:, None]
        mixed = tl.dot(shares, values.to(tl.float32), mixed, input_precision=precision)
        peak = new_peak

    mean = (mixed / tl.where(total > 0, total, 1.0)[:, None]).to(means.dtype.element_ty)
    part = head * splits + split
    tl.store(means + part[:, None] * head_dim + column, mean, mask=mine)
    if sums is not None:
        tl.store(sums + part, peak + tl.log2(total), mask=member < group)


@jit
def _combine_kernel(
    means: tl.tensor,
    sums: tl.tensor,
    context_lengths: tl.tensor,
    out: tl.tensor,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    splits: tl.constexpr,
    tile: tl.constexpr,
    column_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """The splits' means, weighted by their sums of exponentials."""
    row = tl.program_id(1)
    head = row * heads + tl.program_id(0)
    split = tl.arange(0, splits)
    length = tl.load(context_lengths + row)  # an input of the step: no kernel writes it
    wait_for_previous(early)
    written = split * _span(length, splits, tile) < length
    column = tl.arange(0, column_block)
    wide = column < head_dim

    part = head * splits + split
    # a padding row has nothing but the finite `other`: no difference of infinities
    logs = tl.load(sums + part, mask=written, other=-1e30)
    shares = tl.where(written, tl.exp2(logs - tl.max(logs, axis=0)), 0.0)
    total = tl.sum(shares, axis=0)
    at = means + part[:, None] * head_dim + column[None, :]
    mixed = tl.load(at, mask=written[:, None] & wide[None, :], other=0.0) * shares[:, None]
    mean = tl.sum(mixed, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * head_dim + column, mean.to(out.dtype.element_ty), mask=wide)


@jit
def _span(length: tl.tensor, splits: tl.constexpr, tile: tl.constexpr) -> tl.tensor:
    """Positions of one split: whole tiles, shared out evenly."""
    return tl.cdiv(tl.cdiv(length, tile), splits) * tile
