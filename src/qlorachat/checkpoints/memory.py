"""How much memory a model takes, estimated before its weights are read and counted after."""

from collections.abc import Collection, Iterable

import torch
from torch import nn

from qlorachat.errors import ModelError

GIB = 2**30

# beside the weights: CUDA's own context, activations and a few thousand tokens of KV cache
WORKING_BYTES = GIB

# bytes a weight: 4 bits, an 8-bit scale for each 64, a 32-bit one for each 256 of those
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


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
