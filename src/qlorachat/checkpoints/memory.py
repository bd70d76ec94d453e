"""How much memory a model takes, estimated before its weights are read and counted after."""

import re
from collections.abc import Collection, Iterable

import torch
from torch import nn

from qlorachat.errors import ConfigError, ModelError

GIB = 2**30

# beside the weights: CUDA's own context, activations and a few thousand tokens of KV cache
WORKING_BYTES = GIB

# bytes a weight: 4 bits, an 8-bit scale for each 64, a 32-bit one for each 256 of those
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def parse_memory(text: str, total: int) -> int:
    """Bytes of `12GiB`, `800MiB` or a fraction such as `0.8` of `total`; else ConfigError."""
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)", text):
        unit = {"GiB": GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6}[match.group(2)]
        return int(float(match.group(1)) * unit)
    if re.fullmatch(r"0?\.\d+|1(\.0+)?", text):
        return int(float(text) * total)
    raise ConfigError(
        f"memory is a size such as 12GiB or a fraction such as 0.8, not {text!r}.", param="memory"
    )


def estimate_bytes(model: nn.Module, quantized: Collection[str]) -> int:
    """Bytes of a model's weights with the linear modules that `quantized` names in NF4.

    `model` may be on the meta device; all other weights count 2 bytes, tied ones once.
    """
    return round(
        sum(
            weight.numel() * (NF4_BYTES if name.removesuffix(".weight") in quantized else 2)
            for name, weight in model.named_parameters()
        )
    )


def count_bytes(model: nn.Module) -> int:
    """Bytes of a loaded model's weights and buffers, scales of quantized ones included."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) + sum(
        scale.nbytes for tensor in tensors for scale in _scales(tensor)
    )


def _scales(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield state.absmax
        yield state.code
        state = state.state2 if state.nested else None


def fits(needed: int, free: int) -> bool:
    """Whether weights of `needed` bytes and room to work go into `free` bytes."""
    return needed + WORKING_BYTES <= free


def too_big(name: str, device: str, *, needed: int, free: int, smaller: int | None) -> ModelError:
    """The error of a model that does not fit, with what it needs and what would help; bytes.

    `smaller` is what the same model needs in 4 bit, where that has not been asked for.
    """
    advice = "close other programs that use it, take a smaller model, or use --device cpu"
    if smaller is not None and fits(smaller, free):
        advice = f"load it in 4 bit, which takes about {_gib(smaller + WORKING_BYTES)}"
    return ModelError(
        f"`{name}` needs about {_gib(needed + WORKING_BYTES)} on {device}, where {_gib(free)} are "
        f"free: {advice}."
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
