"""Which checkpoints this forward pass computes exactly as transformers does; all else is said."""

from collections.abc import Mapping
from typing import Any

from qlorachat.model.lora import GROUPS

MODEL_TYPES = {"llama", "mistral"}
ROPE_TYPES = {"default", "linear", "llama3"}  # tables that depend on the position alone


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why a config.json can't be served here, in a few words; None when it can."""
    if (model_type := config.get("model_type")) not in MODEL_TYPES:
        return f"its model type is {model_type}"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        return f"its activation is {activation}"
    if (rope := _rope_type(config)) not in ROPE_TYPES:
        return f"its rope type is {rope}"
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        return f"its attention has a sliding window of {window} tokens"
    if config.get("pretraining_tp", 1) != 1:
        return "it splits its layers (pretraining_tp)"
    for modules in GROUPS.values():
        kept = [module for module in modules if _stays_in_16_bit(config, module)]
        if 0 < len(kept) < len(modules):
            return f"it has {kept[0]} in 16 bit and what is read with it in 4"
    return None


def _stays_in_16_bit(config: Mapping[str, Any], module: str) -> bool:
    """Whether a checkpoint that is stored in 4 bit leaves it out, in one layer at least."""
    stored = config.get("quantization_config") or {}
    own = module.rpartition(".")[2]
    return any(name.rpartition(".")[2] == own for name in stored.get("llm_int8_skip_modules") or ())


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return str(rope.get("rope_type") or rope.get("type") or "default")
