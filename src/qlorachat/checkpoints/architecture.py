"""What a config.json builds, known without its weights: a model on torch's meta device."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qlorachat.checkpoints.checkpoint import Checkpoint
from qlorachat.errors import ModelError

# keys of config.json that choose code or kernels to run rather than shapes
_CODE_KEYS = {"auto_map", "attn_implementation", "experts_implementation", "use_kernels"}


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """transformers' config of a checkpoint, without the keys that would choose code to run.

    Raises ModelError for an architecture that transformers does not know itself.
    """
    kind = checkpoint.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        brings = (
            "brings its own code, which is never run, and its" if _has_code(checkpoint) else "has"
        )
        raise ModelError(
            f"The model `{checkpoint.name}` {brings} model_type {kind!r}, which this version of "
            "transformers does not know: update transformers or take a model it knows."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"The model `{checkpoint.name}` (model_type {kind!r}) writes no text from left to "
            "right: take a causal language model."
        )
    values = {
        key: value
        for key, value in checkpoint.config.items()
        if key not in _CODE_KEYS and not key.startswith("_")
    }
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # validators of many config classes, each with its own errors
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"The config.json of `{checkpoint.name}` is wrong ({reason}): bring it again."
        ) from error


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, tied where the config ties; costs no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def linear_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Every linear or embedding module by full name -> (out_features, in_features).

    An embedding counts as PEFT has it: in is the vocabulary, out the hidden size. No weight is
    read. Raises ModelError.
    """
    modules = build_skeleton(read_config(checkpoint)).named_modules()
    return {name: shape for name, module in modules if (shape := _shape(module))}


def is_linear(module: nn.Module) -> bool:
    """Whether transformers would put a 4-bit layer in this module's place (5.24: no subclasses)."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    match module:
        case nn.Linear():
            return module.out_features, module.in_features
        case nn.Embedding():
            return module.embedding_dim, module.num_embeddings
        case Conv1D():  # GPT-2's linear layer, its weight is (in, out)
            return module.weight.shape[1], module.weight.shape[0]
    return None


def _has_code(checkpoint: Checkpoint) -> bool:
    return "auto_map" in checkpoint.config
