"""The tensors of an adapter on the CPU: loaded from bytes, looked through and hashed."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from qlorachat.adapters.check import Finding
from qlorachat.adapters.folder import first_five
from qlorachat.adapters.weights import WeightsHeader
from qlorachat.errors import AdapterError

Tensors = Mapping[str, torch.Tensor]


def load_tensors(header: WeightsHeader, data: bytes) -> dict[str, torch.Tensor]:
    """The tensors in a file's bytes, by PEFT's key; those that repeat the base are left out.

    Bytes, since a mapped file would change under the model when someone trains into the folder.
    AdapterError if they are not those of `header`.
    """
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        tensors = {}
    if {key: tuple(it.shape) for key, it in tensors.items()} != {
        weight.key: weight.shape for weight in header.weights
    }:
        raise AdapterError(f"{header.path} changed while it was read: load it again.")
    copies = {weight.key for weight in header.copies}
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def tensor_findings(header: WeightsHeader, tensors: Tensors) -> Iterator[Finding]:
    """What only the numbers show: NaN, infinity, and a LoRA that changes nothing."""
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        yield Finding(
            "error",
            f"{header.path} has NaN or infinite numbers in {first_five(broken)}: the training "
            "diverged, or the file is damaged.",
        )
    silent = [module for module in header.lora if _is_silent(header, module, tensors)]
    if silent:
        yield from _silence(header, silent)


def _is_silent(header: WeightsHeader, module: str, tensors: Tensors) -> bool:
    parts = header.lora[module]
    return any(
        part in parts and not tensors[parts[part].key].any() for part in ("lora_A", "lora_B")
    )


def _silence(header: WeightsHeader, silent: list[str]) -> Iterator[Finding]:
    with_magnitude = any("lora_magnitude_vector" in parts for parts in header.lora.values())
    if len(silent) < len(header.lora) or header.saved or with_magnitude:
        yield Finding(
            "warning",
            f"{header.path} is all zero, so without effect, on {len(silent)} of "
            f"{len(header.lora)} modules: {first_five(silent)}.",
        )
    else:
        yield Finding(
            "error",
            f"{header.path} has no effect: lora_A or lora_B is all zero in every module; expected "
            "trained weights: train the adapter, or check that its training saved them.",
        )


def content_sha256(peft_config: Mapping[str, Any], tensors: Tensors) -> str:
    """A hash of what an adapter does: the same for equal numbers, wherever the folder lies."""
    digest = hashlib.sha256(json.dumps(peft_config, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
