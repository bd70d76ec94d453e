"""Llama-shaped NF4 models and adapters with random weights: speed doesn't depend on the values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, LlamaConfig

from qlorachat.adapters import Adapter, LoraSettings
from qlorachat.opening import OpenedModel
from qlorachat.protocols import ModelInfo
from qlorachat.testing import ByteTokenizer
from qlorachat.tokens import SamplingParams

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40},
    "8b": {  # Llama 3's, with fewer tokens in its vocabulary
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
}
HEAD_DIM = {"7b": 128, "13b": 128, "8b": 128, "tiny": 64}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(size: str, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers model in NF4 with double quantization, quantized layer by layer."""
    shape = SHAPES[size]
    heads = shape["hidden_size"] // HEAD_DIM[size]
    config = LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5,
        num_attention_heads=heads, **{"num_key_value_heads": heads, **shape},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(parent, name, _quantized(child, device, dtype))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                value = _random(parameter.shape, device, dtype)
                value = torch.ones_like(value) if parameter.ndim == 1 else value
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    return model.eval()


def opened(model: Any, name: str) -> OpenedModel:
    """What a backend takes, around a built model."""
    shapes = {
        module_name: (module.out_features, module.in_features)
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    info = ModelInfo(
        name=name,
        context_length=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        stop_ids=frozenset(),
        sampling=SamplingParams(temperature=0.0),
        shapes=shapes,
        device=str(model.device),
        dtype="bfloat16",
        quantization="nf4+dq",
        memory_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
    return OpenedModel(model, ByteTokenizer(), info)


def adapter(model: Any, *, rank: int, seed: int) -> Adapter:
    """A random adapter on all linear layers, alpha twice the rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    modules = [n for n, m in model.named_modules() if n.endswith(PROJECTIONS)]
    for name in modules:
        module = model.get_submodule(name)
        a = torch.randn(rank, module.in_features, generator=generator) * 0.01
        b = torch.randn(module.out_features, rank, generator=generator) * 0.01
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    settings = LoraSettings(
        rank=rank, alpha=2.0 * rank, use_rslora=False, use_dora=False, fan_in_fan_out=False,
        target_modules=tuple(modules), rank_pattern={}, alpha_pattern={}, modules_to_save=(),
        base_model_name_or_path=None, revision=None,
    )  # fmt: skip
    return Adapter(
        path=Path(f"random-{seed}"), sha256=f"{seed:064x}", settings=settings,
        peft_config=settings.peft_config(), tensors=tensors, card=None, warnings=(),
    )  # fmt: skip


def scaled(base: Adapter, seed: int) -> Adapter:
    """The same weights as another adapter: cheap to make, and as dear to serve."""
    return replace(base, sha256=f"{seed:064x}")


def _quantized(child: torch.nn.Linear, device: str, dtype: torch.dtype) -> Linear4bit:
    weight = _random(torch.Size((child.out_features, child.in_features)), device, dtype)
    layer = Linear4bit(
        child.in_features, child.out_features, bias=False, compute_dtype=dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    parameter = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.weight = parameter._quantize(device)
    return layer


def _random(shape: torch.Size, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype) * 0.02
