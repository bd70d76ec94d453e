"""A checkpoint becomes a model on a device, in NF4 with double quantization unless it asks else."""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlorachat.checkpoints.architecture import build_skeleton, read_config
from qlorachat.checkpoints.checkpoint import Checkpoint, weight_files
from qlorachat.checkpoints.memory import count_bytes, fits, too_big
from qlorachat.checkpoints.quantization import estimate_memory, plan_quantization
from qlorachat.config import QuantizationChoice
from qlorachat.errors import ModelError, UsageError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for inference: in eval mode, no weight asks for gradients."""

    model: PreTrainedModel
    device: str  # "cpu" or "cuda:N"
    dtype: str  # what it computes in: "bfloat16" or "float16"
    quantization: str  # "nf4+dq", "nf4+dq in 112 of 211 linear layers", "nf4, as stored", "none"
    memory_bytes: int  # weights on the device


def load_model(
    checkpoint: Checkpoint, *, device: str, quantization: QuantizationChoice
) -> LoadedModel:
    """Read the weights onto `device` ("auto", "cpu", "cuda" or "cuda:N").

    "auto" quantizes as the checkpoint asks, else every linear layer; "nf4" every linear layer;
    "16bit" none. A checkpoint that is stored in bitsandbytes 4 bit is taken as it is. Computes in
    bfloat16 where the device can, else in float16. Raises ModelError (no such device, not enough
    memory, weights that are missing or do not fit the config) and UsageError (a device's name).
    """
    place = resolve_device(device)
    dtype = compute_dtype(place)
    config = read_config(checkpoint)
    skeleton = build_skeleton(config)
    plan = plan_quantization(checkpoint, skeleton, quantization)
    _check_shapes(checkpoint, skeleton)
    _check_memory(checkpoint, quantization, place)
    if stored := checkpoint.config.get("quantization_config"):
        config.quantization_config = {**stored, "bnb_4bit_compute_dtype": dtype}
    try:
        model = _read_weights(checkpoint, config, plan.settings(dtype), place, dtype)
    except torch.OutOfMemoryError:
        raise _too_big(checkpoint, quantization, place) from None
    if stored:
        _check_stored(checkpoint, model)
    return LoadedModel(
        model=model,
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        quantization=plan.label,
        memory_bytes=count_bytes(model),
    )


def keep_as_quantized(model: PreTrainedModel) -> None:
    """To be called before the first forward pass of a model that trains, or whose bytes are read.

    bitsandbytes packs a layer's 4-bit weights for AVX512-BF16 CPUs at its first forward without
    gradients: their scales are rounded, and gradients through them are wrong without an error.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def resolve_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first CUDA card, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return torch.device("cpu")
    if kind != "cuda" or not (index.isdecimal() or device == "cuda"):
        raise UsageError(
            f"The device is auto, cpu, cuda or cuda:N, not {device!r}.", param="device"
        )
    return _cuda_device(int(index or 0))


def _cuda_device(index: int) -> torch.device:
    if index < (count := torch.cuda.device_count()):
        return torch.device("cuda", index)
    if torch.version.cuda is None and torch.version.hip is None:
        raise ModelError(
            f"The installed torch {torch.__version__} is a build for the CPU alone: install "
            "PyTorch's CUDA build, or use --device cpu."
        )
    raise ModelError(
        f"There is no CUDA device {index}, torch sees {count}: check the driver with `nvidia-smi`, "
        "or use --device cpu."
    )


def compute_dtype(place: torch.device) -> torch.dtype:
    """bfloat16 on the CPU and on cards of compute capability 8.0 (Ampere) or later."""
    if place.type == "cuda" and torch.cuda.get_device_capability(place) < (8, 0):
        return torch.float16
    return torch.bfloat16


def _check_shapes(checkpoint: Checkpoint, skeleton: PreTrainedModel) -> None:
    """ModelError for weights that do not fit the config: transformers quantizes those unseen."""
    if "quantization_config" in checkpoint.config:
        return
    wanted = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
    inner = f"{skeleton.base_model_prefix}."  # which files of the inner model alone leave out
    wanted |= {name.removeprefix(inner): shape for name, shape in wanted.items()}
    for file in weight_files(checkpoint.folder):
        with safe_open(file, "pt") as tensors:
            for name in wanted.keys() & set(tensors.keys()):
                stored = tuple(tensors.get_slice(name).get_shape())
                if stored != wanted[name]:
                    raise ModelError(
                        f"{name} in {file} is {stored} but config.json asks for {wanted[name]}: "
                        "the files are of different models, bring them again."
                    )


def _check_stored(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """ModelError for a 4-bit weight that is not whole: it would compute with what is there."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and not _is_whole(module):
            raise ModelError(
                f"{name}.weight in {checkpoint.folder} is no whole 4-bit weight of "
                f"{module.out_features} x {module.in_features}, as config.json asks for: bring "
                "the model again."
            )


def _is_whole(module: Linear4bit) -> bool:
    """Whether bytes, scales and shape of a stored weight fit each other and the module."""
    state = module.weight.quant_state
    if state is None or tuple(state.shape) != (module.out_features, module.in_features):
        return False
    weights = module.out_features * module.in_features
    scales, outer = state.absmax, state.state2
    counts = [(2 * module.weight.nbytes, weights), (scales.numel(), weights / state.blocksize)]
    if outer:
        counts.append((outer.absmax.numel(), scales.numel() / outer.blocksize))
    # scales of 8 bits without scales of their own would be taken for the values that they index
    return (scales.dtype == torch.uint8) == state.nested and all(
        count == math.ceil(wanted) for count, wanted in counts
    )


def _check_memory(checkpoint: Checkpoint, choice: QuantizationChoice, place: torch.device) -> None:
    """ModelError when a card has too little memory free, before anything is read."""
    if place.type == "cuda" and not fits(estimate_memory(checkpoint, choice), _free_bytes(place)):
        raise _too_big(checkpoint, choice, place)


def _too_big(checkpoint: Checkpoint, choice: QuantizationChoice, place: torch.device) -> ModelError:
    return too_big(
        checkpoint.name,
        str(place),
        needed=estimate_memory(checkpoint, choice),
        free=_free_bytes(place),
        smaller=estimate_memory(checkpoint, "nf4") if choice == "16bit" else None,
    )


def _free_bytes(place: torch.device) -> int:
    return torch.cuda.mem_get_info(place)[0]


def _read_weights(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    settings: BitsAndBytesConfig | None,
    place: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    try:
        with _progress_on_terminals():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                quantization_config=settings,
                device_map={"": str(place)},
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"`{checkpoint.name}` cannot be loaded: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{checkpoint.folder} lacks weights that its config.json asks for ({len(missing)}, "
            f"first {missing[0]}): bring the model again."
        )
    if dropped := _dropped(model, report["unexpected_keys"]):
        raise ModelError(
            f"{checkpoint.folder} has weights that its config.json does not announce "
            f"({len(dropped)}, first {dropped[0]}): without them its answers would be wrong; bring "
            "the model's own config.json."
        )
    return model.eval().requires_grad_(False)


def _dropped(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights that modules of the model would compute with, a bias or a scale, did they know them.

    What belongs to no module of the model, as a layer for other tasks, transformers warns of.
    """
    known = {name for name, _ in model.named_parameters()}
    known |= {name.removeprefix(f"{model.base_model_prefix}.") for name in known}
    return sorted(
        name
        for name in unexpected
        if re.search(r"\.(weight|bias)\w*$", name) and f"{name.rpartition('.')[0]}.weight" in known
    )


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """No progress bars where stderr is a file or a pipe."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
