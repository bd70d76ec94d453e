"""An adapter becomes part of its base: merged in float32 into dequantized weights, rounded once.

One tensor at a time: beside the 4-bit model no more than one file's weights are in memory.
"""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from shutil import copy

import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub import split_state_dict_into_shards_factory
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qlorachat.adapters import Adapter
from qlorachat.checkpoints import Checkpoint
from qlorachat.checkpoints.architecture import build_skeleton, read_config
from qlorachat.checkpoints.cache import MANIFEST
from qlorachat.checkpoints.convert import write_json
from qlorachat.errors import AdapterError

DTYPE = torch.bfloat16
SHARD_BYTES = 10**9  # of weights in one file; in memory twice while it is written

_NAME = "default"  # of the adapter within PEFT's model
_SAME_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def attach(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The base with the adapter beside its weights, ready for inference.

    AdapterError where PEFT cannot do that exactly.
    """
    _refuse_saved_4bit(base, adapter)
    config = LoraConfig(**adapter.peft_config, inference_mode=True)
    with warnings.catch_warnings():
        # of an adapter on one of two tied layers, which write_model unties
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        model = PeftModel(base, config, _NAME)
    result = set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=_NAME)
    missing = [key for key in result.missing_keys if f".{_NAME}." in key]
    if strange := [*missing, *result.unexpected_keys]:
        raise AdapterError(
            f"{adapter.path}: PEFT misses or does not expect these tensors: "
            f"{', '.join(strange[:5])}."
        )
    return model.eval()


def _refuse_saved_4bit(base: PreTrainedModel, adapter: Adapter) -> None:
    """PEFT copies modules_to_save as they are in the base, and trained weights fit no 4 bits."""
    for name in adapter.settings.modules_to_save:
        if any(isinstance(module, Linear4bit) for module in base.get_submodule(name).modules()):
            raise AdapterError(
                f"{adapter.path} brings whole weights of {name} (modules_to_save), which the base "
                "has in 4 bit: export it on a 16-bit base, with --quantization 16bit."
            )


def write_model(folder: Path, model: PeftModel, checkpoint: Checkpoint) -> list[Path]:
    """Fill `folder` with the merged model in Hugging Face layout; the files of its weights.

    Raises OSError.
    """
    skeleton = build_skeleton(read_config(checkpoint))
    tied = _is_tied(skeleton, model)
    files = _write_weights(folder, _weight_sizes(skeleton, tied=tied), model)
    _write_config(folder, checkpoint, tied=tied)
    for pattern in _SAME_FILES:
        for file in filter(Path.is_file, checkpoint.folder.glob(pattern)):
            copy(file, folder)
    if skipped := checkpoint.recipe.skip_modules:
        write_json(folder / MANIFEST, {"quantization": {"skip_modules": skipped}})
    return files


def _is_tied(skeleton: PreTrainedModel, model: PeftModel) -> bool:
    """Whether embedding and output layer still share one weight."""
    ends = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    if ends[0].weight is not ends[1].weight:
        return False
    base = model.get_base_model()
    live = base.get_input_embeddings(), base.get_output_embeddings()
    return not any(isinstance(module, LoraLayer | ModulesToSaveWrapper) for module in live)


def _weight_sizes(skeleton: PreTrainedModel, *, tied: bool) -> dict[str, int]:
    """Every weight to write -> its bytes, a tied one under its first name alone."""
    weights = skeleton.state_dict(keep_vars=True)
    if tied:
        first_names = {id(weight): name for name, weight in reversed(weights.items())}
        weights = {name: weight for name, weight in weights.items() if name in first_names.values()}
    return {name: weight.numel() * DTYPE.itemsize for name, weight in weights.items()}


def _write_weights(folder: Path, sizes: dict[str, int], model: PeftModel) -> list[Path]:
    """As many files as SHARD_BYTES asks for, and the index of more than one."""
    base = model.get_base_model()
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, base, names)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return [folder / file for file in split.filename_to_tensors]


def _write_file(file: Path, base: nn.Module, names: Iterable[str]) -> None:
    try:
        save_file(dict(_merged(base, names)), file, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, which it reports in its own class
        raise OSError(str(error)) from error


@torch.no_grad()
def _merged(base: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        module, _, part = name.rpartition(".")
        weight = _merged_weight(base.get_submodule(module), part)
        yield name, weight.to("cpu", DTYPE).contiguous()


def _merged_weight(module: nn.Module, part: str) -> torch.Tensor:
    """A module's own weight or bias, with what the adapter adds to it; float32 if it does."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[_NAME]
    layer = module if isinstance(module, LoraLayer) else None
    source = layer.get_base_layer() if layer else module
    own: torch.Tensor = (
        dequantize_module_weight(source) if part == "weight" else getattr(source, part)
    )
    return _with_adapter(layer, own.float()) if layer and part == "weight" else own


def _with_adapter(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """PEFT's own sum; its `merge` would put it into 4 bits again."""
    variant = layer.lora_variant.get(_NAME)  # DoRA's
    merged: torch.Tensor = (
        variant.merge_safe(layer, _NAME, weight)
        if variant
        else weight + layer.get_delta_weight(_NAME)
    )
    return merged


def _write_config(folder: Path, checkpoint: Checkpoint, *, tied: bool) -> None:
    """The base's config.json without its quantization and without keys that choose code to run."""
    left_out = {"quantization_config", "torch_dtype", "auto_map"}
    config = {key: value for key, value in checkpoint.config.items() if key not in left_out}
    config["dtype"] = str(DTYPE).removeprefix("torch.")
    if not tied:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
