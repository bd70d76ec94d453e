"""On a card: Liger's Triton kernels for norms and SwiGLU in place of several passes of torch."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# whose norm is x / rms(x) in float32 times the weight, and whose MLP is down(silu(gate) * up)
_FAMILIES = frozenset({"llama", "mistral", "qwen2"})


def fuse_layers(model: "PreTrainedModel") -> None:
    """Replace the norms and MLPs of this model alone; nothing where Liger or a card is missing.

    Liger is the extra [train]'s on Linux, where Triton is. Its own patching would reach every
    later model of the process.
    """
    family = model.config.model_type in _FAMILIES and model.config.hidden_act == "silu"
    if model.device.type != "cuda" or not family or find_spec("liger_kernel") is None:
        return
    decoder = model.get_decoder()
    decoder.norm = _norm(decoder.norm)
    for layer in decoder.layers:
        layer.input_layernorm = _norm(layer.input_layernorm)
        layer.post_attention_layernorm = _norm(layer.post_attention_layernorm)
        layer.mlp = _mlp(layer.mlp, model.config)


def _norm(norm: Any) -> nn.Module:
    from liger_kernel.transformers import LigerRMSNorm  # needs Triton

    with torch.device("meta"):
        fused: nn.Module = LigerRMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
    fused.weight = norm.weight
    return fused


def _mlp(mlp: Any, config: Any) -> nn.Module:
    from liger_kernel.transformers import LigerSwiGLUMLP  # needs Triton

    with torch.device("meta"):
        fused: nn.Module = LigerSwiGLUMLP(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(fused, name, getattr(mlp, name))
    return fused
