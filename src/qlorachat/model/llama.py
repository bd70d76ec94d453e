"""PagedLlama: the forward pass of a Llama-style model, taken over from a transformers model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from qlorachat import kernels
from qlorachat.model.cache import KVCache
from qlorachat.model.fusion import fuse, pack
from qlorachat.model.lora import AdapterStacks, LoraLayer, LoraRows
from qlorachat.model.nf4_linear import why_not

log = logging.getLogger(__name__)


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
    blocks: torch.Tensor  # int64 (blocks,)


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
    k = keys[chunk.blocks].flatten(0, 1)[:context].transpose(0, 1)[None]
    v = values[chunk.blocks].flatten(0, 1)[:context].transpose(0, 1)[None]
    grouped = q.shape[1] != k.shape[1]
    whole = rows == context
    mask = None if whole else causal_lower_right(rows, context)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=whole, enable_gqa=grouped)
    return out[0].transpose(0, 1).reshape(rows, -1)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: nn.Module
    output: nn.Module
    mlp_norm: torch.Tensor
    gate_up: nn.Module
    down: nn.Module
    lora: LoraLayer


class PagedLlama:
    """Weights of a transformers Llama, projections that share an input fused; inference only.

    The transformers model is used up: its projections are moved, not copied.
    """

    def __init__(self, model: Any, adapters: AdapterStacks) -> None:
        _say_whose_kernels(model)
        self.config = model.config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.adapters = adapters
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self._embedding: torch.Tensor = model.get_input_embeddings().weight
        self._head: nn.Module = model.get_output_embeddings()
        self._norm: torch.Tensor = model.model.norm.weight
        self._epsilon: float = model.config.rms_norm_eps
        self._cos, self._sin = _rope_tables(model)
        self._layers = [
            _take(layer, adapters.layer(index)) for index, layer in enumerate(model.model.layers)
        ]

    def hidden(self, rows: Rows, cache: KVCache) -> torch.Tensor:
        """The final hidden state of every row, (rows, hidden), its keys and values cached."""
        residual = self._embedding[rows.ids]
        x = kernels.rms_norm(residual, self._layers[0].attention_norm, self._epsilon)
        for index, layer in enumerate(self._layers):
            keys, values = cache.keys[index], cache.values[index]
            x = self._attention(layer, x, rows, keys, values)
            x, residual = kernels.add_rms_norm(x, residual, layer.mlp_norm, self._epsilon)
            x = self._mlp(layer, x, rows.lora)
            x, residual = kernels.add_rms_norm(x, residual, self._next_norm(index), self._epsilon)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) from (rows, hidden)."""
        logits: torch.Tensor = self._head(hidden)
        return logits

    def _attention(
        self, layer: _Layer, x: torch.Tensor, rows: Rows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        qkv = layer.lora.qkv.add(layer.qkv(x), x, rows.lora)
        queries = kernels.rope_and_cache(
            qkv, self._cos, self._sin, rows.positions, rows.slots, keys, values
        )
        attended = rows.attention(queries, keys, values)
        return layer.lora.output.add(layer.output(attended), attended, rows.lora)

    def _mlp(self, layer: _Layer, x: torch.Tensor, lora: LoraRows) -> torch.Tensor:
        inner = kernels.silu_mul(layer.lora.gate_up.add(layer.gate_up(x), x, lora))
        return layer.lora.down.add(layer.down(inner), inner, lora)

    def _next_norm(self, index: int) -> torch.Tensor:
        """The norm after a layer: the next layer's first, or the final one."""
        last = index + 1 == len(self._layers)
        return self._norm if last else self._layers[index + 1].attention_norm


def _say_whose_kernels(model: Any) -> None:
    """On a card, one line if the NF4 products stay with bitsandbytes."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if layers and model.device.type == "cuda" and (reason := why_not(layers)):
        log.info("the NF4 weights are multiplied by bitsandbytes, which is slower: %s", reason)


def _take(layer: Any, lora: LoraLayer) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm.weight,
        qkv=pack(fuse([attention.q_proj, attention.k_proj, attention.v_proj])),
        output=pack(fuse([attention.o_proj])),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=pack(fuse([mlp.gate_proj, mlp.up_proj])),
        down=pack(fuse([mlp.down_proj])),
        lora=lora,
    )


def _rope_tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, (positions, head_dim), from transformers' own module."""
    positions = torch.arange(model.config.max_position_embeddings, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    cos, sin = model.model.rotary_emb(like, positions)
    return cos[0].contiguous(), sin[0].contiguous()
