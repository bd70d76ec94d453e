"""One layer's weights, taken over from a transformers model; projections of one input are fused."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlorachat.model.fusion import fuse, pack
from qlorachat.model.lora import LoraLayer


@dataclass(frozen=True, slots=True)
class Layer:
    """Norms, the four projections in the order of a step, and the adapters beside them."""

    attention_norm: torch.Tensor
    qkv: nn.Module
    output: nn.Module
    mlp_norm: torch.Tensor
    gate_up: nn.Module
    down: nn.Module
    lora: LoraLayer

    @property
    def projections(self) -> list[nn.Module]:
        """In the order of a step."""
        return [self.qkv, self.output, self.gate_up, self.down]


def take_layer(layer: Any, lora: LoraLayer) -> Layer:
    """The parts of a transformers layer; its projections are used up."""
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=layer.input_layernorm.weight,
        qkv=pack(fuse([attention.q_proj, attention.k_proj, attention.v_proj])),
        output=pack(fuse([attention.o_proj])),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=pack(fuse([mlp.gate_proj, mlp.up_proj])),
        down=pack(fuse([mlp.down_proj])),
        lora=lora,
    )
