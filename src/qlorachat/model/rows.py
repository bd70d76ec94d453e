"""What a step computes, and how its rows look at the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from qlorachat import kernels
from qlorachat.model.lora import LoraRows


class Attention(Protocol):
    """How the rows of a step look at the cache."""

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Queries (rows, heads, head_dim) on one layer's cache -> (rows, heads * head_dim)."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step computes; all tensors of length rows, on the device."""

    ids: torch.Tensor  # int64
    positions: torch.Tensor  # int32, in the sequence
    slots: torch.Tensor  # int32, block * block_size + offset in the cache; -1 writes nothing
    attention: Attention
    lora: LoraRows


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One row a sequence: attention over its blocks."""

    block_tables: torch.Tensor  # int32 (rows, blocks)
    context_lengths: torch.Tensor  # int32 (rows,), the row's own token included

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        scale, out = queries.shape[-1] ** -0.5, torch.empty_like(queries)
        kernels.paged_decode_attention(
            queries, keys, values, self.block_tables, self.context_lengths, scale, out
        )
        return out.view(queries.shape[0], -1)


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """As DecodeRows, with each row's places listed once for all layers: quicker on a CPU."""

    places: kernels.Places

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        scale = queries.shape[-1] ** -0.5
        out = kernels.gathered_decode_attention(queries, keys, values, self.places, scale)
        return out.view(queries.shape[0], -1)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Rows `start` to `end` are the last ones of `context_length` tokens in these blocks."""

    start: int
    end: int
    context_length: int
    blocks: torch.Tensor | slice  # int64 (blocks,); a slice where they follow each other


@dataclass(frozen=True, slots=True)
class PrefillChunks:
    """Rows of several sequences, one chunk after the other: causal attention, chunk by chunk."""

    chunks: Sequence[PrefillChunk]

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        parts = [_attend(chunk, queries, keys, values) for chunk in self.chunks]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend(
    chunk: PrefillChunk, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    rows, context = chunk.end - chunk.start, chunk.context_length
    q = queries[chunk.start : chunk.end].transpose(0, 1)[None]
    k, v = (
        kernels.read_blocks(cache, chunk.blocks, queries.dtype)[:context].transpose(0, 1)[None]
        for cache in (keys, values)
    )
    grouped = q.shape[1] != k.shape[1]
    whole = rows == context
    mask = None if whole else causal_lower_right(rows, context)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=grouped)
    return out[0].transpose(0, 1).reshape(rows, -1)
