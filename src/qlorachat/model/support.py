"""Which checkpoints this forward pass computes exactly as transformers does; all else is said."""

from transformers import PreTrainedConfig

from qlorachat.model.lora import GROUPS

MODEL_TYPES = {"llama", "mistral"}
ROPE_TYPES = {"default", "linear", "llama3"}  # tables that depend on the position alone


def unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model can't be served here, in a few words; None when it can.

    `config` is transformers' reading of config.json, with its defaults for keys that are absent.
    """
    if config.model_type not in MODEL_TYPES:
        return f"its model type is {config.model_type}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if (rope := config.rope_parameters["rope_type"]) not in ROPE_TYPES:
        return f"its rope type is {rope}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its attention has a sliding window of {window} tokens"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "it splits its layers (pretraining_tp)"
    for modules in GROUPS.values():
        kept = [module for module in modules if _stays_in_16_bit(config, module)]
        if 0 < len(kept) < len(modules):
            return f"it has {kept[0]} in 16 bit and what is read with it in 4"
    return None


def _stays_in_16_bit(config: PreTrainedConfig, module: str) -> bool:
    """Whether a checkpoint that is stored in 4 bit leaves it out, in one layer at least."""
    stored = getattr(config, "quantization_config", None) or {}
    own = module.rpartition(".")[2]
    return any(name.rpartition(".")[2] == own for name in stored.get("llm_int8_skip_modules") or ())
