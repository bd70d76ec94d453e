"""Rope and attention of a fused decode step, from the sums of q|k|v to the next product's input."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source, eight_bits
from qlorachat.kernels.attention import paged_decode_attention_reference
from qlorachat.kernels.device import count_processors, starts_early
from qlorachat.kernels.rotary import rope_and_cache_reference
from qlorachat.kernels.sums import LateNorm, check_sums, take_sums_reference
from qlorachat.kernels.tiles import tiled_shape, write_tiled

SOURCE = "decode_attention.cu"
_THREADS = 128  # as in the source
_BLOCK_BYTES = 48 * 1024  # of shared memory, about
_MOST_SPLITS = 8  # blocks of a cluster, on every card that has them
_MOST_HEADS, _MOST_COLUMNS = 8, 1024  # queries of one key head: registers, shared memory
_LOG2_E = 1.4426950408889634


def why_not(heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why `attend_sums` has no kernel for a model; None: it has."""
    if head_dim not in (64, 128, 256):
        return f"attention heads are {head_dim} wide, not 64, 128 or 256"
    group = heads // kv_heads
    if group > _MOST_HEADS or group * head_dim > _MOST_COLUMNS:
        return f"{group} query heads of {head_dim} share a key head"
    return None


def definitions(
    heads: int, kv_heads: int, head_dim: int, cached: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """What `SOURCE` is compiled with."""
    return (
        f"HEAD_DIM={head_dim}",
        f"GROUP={heads // kv_heads}",
        f"IN_8_BITS={int(cached == eight_bits.INT8)}",
        f"STAGES={_stages(device)}",
        f"CLUSTERS={int(has_clusters(device))}",
    )


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of one context meet in a cluster: from Hopper on; else see `Meeting`."""
    return starts_early(device)


class PagedContext(NamedTuple):
    """Where M rows are in their contexts, and the paged cache of one layer.

    cos, sin: [positions, D]. positions, slots: int32 [M], of the new position, the last one of its
    context; slot -1: it is not kept. key_cache, value_cache: [blocks, block_size, G, D], in cos'
    dtype, or in 8 bits (`eight_bits`). block_tables: int32 [M, width]. context_lengths: int32 [M].
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lengths: torch.Tensor

    @property
    def head_dim(self) -> int:
        return eight_bits.head_dim_of(self.key_cache)

    def check(self, rows: int, dtype: torch.dtype) -> None:
        integers = (self.positions, self.slots, self.context_lengths)
        assert all(tensor.shape == (rows,) for tensor in integers)
        assert all(tensor.dtype == torch.int32 for tensor in (*integers, self.block_tables))
        assert len(self.block_tables) == rows
        assert self.block_tables.stride(1) == 1
        assert self.key_cache.shape == self.value_cache.shape
        assert self.key_cache.dtype == self.value_cache.dtype
        assert eight_bits.fits(self.key_cache, dtype)
        assert self.cos.shape == self.sin.shape == (len(self.cos), self.head_dim)
        assert self.cos.dtype == self.sin.dtype == dtype
        whole = (self.cos, self.sin, self.key_cache, self.value_cache)
        assert all(tensor.is_contiguous() for tensor in whole)


class Meeting(NamedTuple):
    """Where blocks that share a context meet on a card without clusters, as `make_meeting` does.

    sums: float32 [blocks, H / G * (D + 2)], what each has summed. arrived: int32 [M * G], how many
    of a context have; zero between launches.
    """

    sums: torch.Tensor
    arrived: torch.Tensor


def make_meeting(
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    splits: int | None = None,
) -> Meeting:
    """For steps of up to `rows` rows; `splits` as in `attend_sums`."""
    contexts = rows * kv_heads
    blocks = contexts * splits if splits else max(contexts, _most_blocks(device))
    sums = torch.empty(blocks, heads // kv_heads * (head_dim + 2), device=device)
    return Meeting(sums, torch.zeros(contexts, dtype=torch.int32, device=device))


def attend_sums(
    sums: torch.Tensor,
    norm: LateNorm,
    context: PagedContext,
    scale: float,
    out: torch.Tensor,
    meeting: Meeting | None = None,
    splits: int | None = None,
) -> None:
    """`rope_and_cache`, then `paged_decode_attention`, of q|k|v = sums / rms.

    sums: float32 [M, (H + 2G) * D], cleared; rounded once. norm: of [M]. out: tiled
    [blocks, P, 64], of [M, H * D], bfloat16 on a card; its padding stays as it is. meeting: must
    be there on a card without clusters. splits: a power of two up to 8, how many blocks share one
    context; None: chosen.
    """
    rows, columns = sums.shape
    block_size, kv_heads = context.key_cache.shape[1:3]
    head_dim = context.head_dim
    heads = columns // head_dim - 2 * kv_heads
    assert columns == (heads + 2 * kv_heads) * head_dim
    assert heads % kv_heads == 0
    assert out.shape == tiled_shape(heads * head_dim, out.shape[1])
    assert rows <= out.shape[1]
    assert out.is_contiguous()
    check_sums(sums)
    norm.check(rows)
    context.check(rows, out.dtype)
    if not out.is_cuda:
        attend_sums_reference(sums, norm, context, scale, out)
        return
    assert out.dtype == torch.bfloat16
    width = context.block_tables.shape[1]
    splits = splits or _choose_splits(rows * kv_heads, width, out.device)
    assert splits in (1, 2, 4, _MOST_SPLITS)
    cached = context.key_cache.dtype
    assert block_size >= _positions(cached)
    assert block_size.bit_count() == 1
    clusters = has_clusters(out.device)
    if not clusters:
        assert meeting is not None
        assert meeting.sums.numel() >= rows * splits * heads * (head_dim + 2)
        assert len(meeting.arrived) >= rows * kv_heads
    shape = definitions(heads, kv_heads, head_dim, cached, out.device)
    function = cuda_source.load_kernel(
        *(SOURCE, "attend", out.device, shape),
        shared_percent=cuda_source.STEP_SHARED,
    )
    arguments = (
        *(sums, norm.squares, context.key_cache, context.value_cache),
        *(context.block_tables, context.context_lengths, context.slots, context.positions),
        *(context.cos, context.sin, out),
        *(context.block_tables.stride(0), block_size.bit_length() - 1),
        *(1 / norm.width, norm.eps),
        *(scale * _LOG2_E, out.shape[1]),
        *((None, None) if clusters or meeting is None else meeting),
    )
    ring = _stages(out.device) * (_THREADS // 32) * _stage_bytes(head_dim, cached)
    cuda_source.launch(
        function,
        (splits, kv_heads, rows),
        _THREADS,
        ring,
        arguments,
        out.device,
        early=True,
        cluster=splits if clusters else 1,
    )


def attend_sums_reference(
    sums: torch.Tensor,
    norm: LateNorm,
    context: PagedContext,
    scale: float,
    out: torch.Tensor,
) -> None:
    """`attend_sums` in plain torch; scores and weights are float32, as the kernel's."""
    qkv = (take_sums_reference(sums) * norm.factors()).to(out.dtype)
    *places, tables, lengths = context
    q = rope_and_cache_reference(qkv, *places).float()
    keys, values = (
        eight_bits.widen(cache, torch.float32).float()
        for cache in (context.key_cache, context.value_cache)
    )
    mixed = paged_decode_attention_reference(q, keys, values, tables, lengths, scale)
    write_tiled(mixed.flatten(1).to(out.dtype), out)


def _choose_splits(contexts: int, width: int, device: torch.device) -> int:
    """Blocks enough to fill the card, of at least one block of the cache."""
    splits = min(max(_most_blocks(device) // contexts, 1), width, _MOST_SPLITS)
    return 1 << (splits.bit_length() - 1)


def _positions(cached: torch.dtype) -> int:
    """Of a warp at a time."""
    return 16 if cached == eight_bits.INT8 else 8


def _stage_bytes(head_dim: int, cached: torch.dtype) -> int:
    """Keys and values of a warp's positions, and their scales; it leaves float32 sums there."""
    scale = 4 if cached == eight_bits.INT8 else 0
    return 2 * _positions(cached) * (head_dim * cached.itemsize + scale)


def _stages(device: torch.device) -> int:
    """Of a warp's ring."""
    return 3 if cuda_source.is_roomy(device) else 2


def _most_blocks(device: torch.device) -> int:
    """As many as run at once; more are only launched where there are more contexts."""
    return cuda_source.shared_bytes(device) // _BLOCK_BYTES * count_processors(device)
