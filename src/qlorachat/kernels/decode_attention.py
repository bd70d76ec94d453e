"""Rope and attention of a fused decode step, from the sums of q|k|v to the next product's input."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlorachat.kernels import cuda_source, eight_bits
from qlorachat.kernels.attention import paged_decode_attention_reference
from qlorachat.kernels.decode_lora import Shrinking, shrink_reference, shrinking_arguments
from qlorachat.kernels.device import count_processors, starts_early
from qlorachat.kernels.rotary import rope_and_cache_reference
from qlorachat.kernels.sums import (
    check_squares,
    check_sums,
    inverse_rms_reference,
    take_sums_reference,
)
from qlorachat.kernels.tiles import tiled_shape, write_tiled

SOURCE = "decode_attention.cu"
_THREADS, _STEP = 128, 8  # as in the source; _STEP: positions of a warp at a time
_ROOMY = 160 * 1024  # bytes of shared memory: Hopper and the A100 have them, others 99 kB
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
        f"IN_8_BITS={int(cached == eight_bits.E4M3)}",
        f"STAGES={_stages(device)}",
        f"CLUSTERS={int(has_clusters(device))}",
    )


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of one context meet in a cluster: from Hopper on; else see `Meeting`."""
    return starts_early(device)


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
    squares: torch.Tensor,
    width: int,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    shrinking: Shrinking | None,
    meeting: Meeting | None = None,
    splits: int | None = None,
) -> None:
    """`rope_and_cache`, then `paged_decode_attention`, of q|k|v = sums / rms; and A x of that.

    sums: float32 [M, (H + 2G) * D], cleared; rounded once. squares: float32 [M], sums over `width`
    columns. out: tiled [blocks, P, 64], of [M, H * D]; its padding stays as it is. The rest as in
    those two, all in out's dtype, bfloat16 on a card; the caches may be in 8 bits. A row's new
    position is the last of its context. shrinking: the adapters of the product that follows.
    meeting: must be there on a card without clusters.
    splits: a power of two up to 8, how many blocks share one context; None: chosen.
    """
    rows, columns = sums.shape
    kv_heads, head_dim = key_cache.shape[2:]
    heads = columns // head_dim - 2 * kv_heads
    assert columns == (heads + 2 * kv_heads) * head_dim
    assert heads % kv_heads == 0
    assert out.shape == tiled_shape(heads * head_dim, out.shape[1])
    assert rows <= out.shape[1]
    assert positions.shape == (rows,)
    assert eight_bits.fits(key_cache, out.dtype)
    assert out.is_contiguous()
    _check_context(cos, sin, positions, slots, key_cache, value_cache)
    _check_reach(block_tables, context_lengths, rows)
    check_sums(sums)
    check_squares(squares, rows)
    if shrinking is not None:
        shrinking.check(rows, heads * head_dim, out.dtype)
    if not out.is_cuda:
        attend_sums_reference(
            *(sums, squares, width, eps, cos, sin, positions, slots),
            *(key_cache, value_cache, block_tables, context_lengths, scale, out, shrinking),
        )
        return
    assert out.dtype == torch.bfloat16
    splits = splits or _choose_splits(rows * kv_heads, block_tables.shape[1], out.device)
    assert splits in (1, 2, 4, _MOST_SPLITS)
    block_size = key_cache.shape[1]
    assert block_size >= _STEP
    assert block_size.bit_count() == 1
    clusters = has_clusters(out.device)
    if not clusters:
        assert meeting is not None
        assert meeting.sums.numel() >= rows * splits * heads * (head_dim + 2)
        assert len(meeting.arrived) >= rows * kv_heads
    shape = definitions(heads, kv_heads, head_dim, key_cache.dtype, out.device)
    function = cuda_source.load_kernel(
        *(SOURCE, "attend", out.device, shape),
        shared_percent=cuda_source.STEP_SHARED,
    )
    arguments = (
        *(sums, squares, key_cache, value_cache, block_tables, context_lengths),
        *(slots, positions, cos, sin, out, *shrinking_arguments(shrinking)),
        *(block_tables.stride(0), block_size.bit_length() - 1, 1 / width, eps),
        *(scale * _LOG2_E, out.shape[1]),
        *((None, None) if clusters or meeting is None else meeting),
    )
    # bytes of keys and values; a warp leaves its float32 sums there
    stage = (_THREADS // 32) * 2 * _STEP * head_dim * key_cache.element_size()
    ring = _stages(out.device) * stage
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
    squares: torch.Tensor,
    width: int,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lengths: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    shrinking: Shrinking | None,
) -> None:
    """`attend_sums` in plain torch."""
    factors = inverse_rms_reference(squares, width, eps)
    qkv = (take_sums_reference(sums) * factors).to(out.dtype)
    caches = (key_cache, value_cache)
    q = rope_and_cache_reference(qkv, cos, sin, positions, slots, *caches)
    mixed = paged_decode_attention_reference(q, *caches, block_tables, context_lengths, scale)
    write_tiled(mixed.flatten(1), out)
    shrink_reference(mixed.flatten(1), shrinking)


def _check_context(
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
) -> None:
    assert cos.shape == sin.shape == (len(cos), key_cache.shape[3])
    assert positions.shape == slots.shape
    assert positions.dtype == slots.dtype == torch.int32
    assert key_cache.shape == value_cache.shape
    assert cos.dtype == sin.dtype
    assert key_cache.dtype == value_cache.dtype
    assert all(tensor.is_contiguous() for tensor in (cos, sin, key_cache, value_cache))


def _check_reach(block_tables: torch.Tensor, context_lengths: torch.Tensor, rows: int) -> None:
    assert context_lengths.shape == (rows,)
    assert len(block_tables) == rows
    assert block_tables.stride(1) == 1
    assert block_tables.dtype == context_lengths.dtype == torch.int32


def _choose_splits(contexts: int, width: int, device: torch.device) -> int:
    """Blocks enough to fill the card, of at least one block of the cache."""
    splits = min(max(_most_blocks(device) // contexts, 1), width, _MOST_SPLITS)
    return 1 << (splits.bit_length() - 1)


def _stages(device: torch.device) -> int:
    """Of a warp's ring."""
    return 3 if cuda_source.shared_bytes(device) >= _ROOMY else 2


def _most_blocks(device: torch.device) -> int:
    """As many as run at once; more are only launched where there are more contexts."""
    return cuda_source.shared_bytes(device) // _BLOCK_BYTES * count_processors(device)
