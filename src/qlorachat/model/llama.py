"""PagedLlama: the forward pass of a Llama-style model, taken over from a transformers model."""

import logging
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlorachat import kernels
from qlorachat.kernels.card import why_not_products
from qlorachat.kernels.nf4_matmul import MOST_ROWS
from qlorachat.model.cache import KVCache
from qlorachat.model.fused_decode import FusedDecode, why_not_fused
from qlorachat.model.layer import Layer, take_layer
from qlorachat.model.lora import AdapterStacks, LoraProjection, LoraRows
from qlorachat.model.nf4_linear import Nf4Linear, why_not
from qlorachat.model.rows import Rows

log = logging.getLogger(__name__)


class PagedLlama:
    """Weights of a transformers Llama, projections that share an input fused; inference only.

    The transformers model is used up: its projections are moved, not copied.
    """

    def __init__(
        self, model: Any, adapters: AdapterStacks, cached: torch.dtype | None = None
    ) -> None:
        """cached: the dtype of keys and values, `kernels.eight_bits.INT8` or the model's (None)."""
        _say_whose_kernels(model)
        self.config = model.config
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.cached: torch.dtype = cached or model.dtype
        self.adapters = adapters
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self._embedding: torch.Tensor = model.get_input_embeddings().weight
        self._head: nn.Module = model.get_output_embeddings()
        self._norm: torch.Tensor = model.model.norm.weight
        self._epsilon: float = model.config.rms_norm_eps
        self._cos, self._sin = _rope_tables(model)
        self._layers = [
            take_layer(layer, adapters.layer(index))
            for index, layer in enumerate(model.model.layers)
        ]
        self._fused: FusedDecode | None = None
        heads = (model.config.num_attention_heads, model.config.num_key_value_heads, self.head_dim)
        if (reason := why_not_fused(self._layers, self.dtype, self.cached, *heads)) is None:
            rope = (self._cos, self._sin)
            self._fused = FusedDecode(self._layers, self._embedding, rope, self._epsilon)
        elif why_not_products(self.device) is None:
            log.info("decode steps are not fused, which is slower: %s", reason)

    @property
    def most_decode_rows(self) -> int | None:
        """Rows that the fused kernels take: more decode in several steps; None: in one, of any."""
        return MOST_ROWS if self._fused is not None else None

    def hidden(self, rows: Rows, cache: KVCache) -> torch.Tensor:
        """The final hidden state of every row, (rows, hidden), its keys and values cached."""
        if self._fused is not None and self._fused.takes(rows):
            return kernels.rms_norm(self._fused(rows, cache), self._norm, self._epsilon)
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
        self, layer: Layer, x: torch.Tensor, rows: Rows, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        qkv = _project(layer.qkv, x, layer.lora.qkv, rows.lora)
        queries = kernels.rope_and_cache(
            qkv, self._cos, self._sin, rows.positions, rows.slots, keys, values
        )
        attended = rows.attention(queries, keys, values)
        return _project(layer.output, attended, layer.lora.output, rows.lora)

    def _mlp(self, layer: Layer, x: torch.Tensor, lora: LoraRows) -> torch.Tensor:
        inner = kernels.silu_mul(_project(layer.gate_up, x, layer.lora.gate_up, lora))
        return _project(layer.down, inner, layer.lora.down, lora)

    def _next_norm(self, index: int) -> torch.Tensor:
        """The norm after a layer: the next layer's first, or the final one."""
        last = index + 1 == len(self._layers)
        return self._norm if last else self._layers[index + 1].attention_norm


def _project(
    linear: nn.Module, x: torch.Tensor, lora: LoraProjection, rows: LoraRows
) -> torch.Tensor:
    """A projection of x with each row's adapter: in the weight or beside it."""
    of_all = lora.of_all(rows, len(x))
    if of_all is not None and isinstance(linear, Nf4Linear) and linear.takes_in(of_all, len(x)):
        whole: torch.Tensor = linear(x, of_all)
        return whole
    return lora.add(linear(x), x, rows)


def _say_whose_kernels(model: Any) -> None:
    """On a card, one line if NF4 products stay with bitsandbytes."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if model.device.type != "cuda" or not layers:
        return
    reasons = [reason for layer in layers if (reason := why_not([layer]))]
    if reasons:
        log.info(
            "bitsandbytes, which is slower, multiplies %d of %d NF4 layers: %s",
            *(len(reasons), len(layers), reasons[0]),
        )


def _rope_tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, (positions, head_dim), from transformers' own module."""
    positions = torch.arange(model.config.max_position_embeddings, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    cos, sin = model.model.rotary_emb(like, positions)
    return cos[0].contiguous(), sin[0].contiguous()
