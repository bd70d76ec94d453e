"""adapter_model.safetensors by its header alone: each tensor's name, shape and use in a LoRA."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qlorachat.adapters.folder import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    contents,
    disguise,
    find_file,
    first_five,
    plain,
)
from qlorachat.errors import AdapterError

PREFIX = "base_model.model."  # PEFT's, before a module's name in the base model

_TYPES = {"F32", "F16", "BF16"}
_KEY = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>\w+(?:\.\w+)*?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?"
    r"|lora_embedding_[AB]|base_layer\.weight|base_layer\.bias|weight|bias)"
)
# parts of a wrapped module that PEFT leaves out of the names it saves
_WRAPPER = re.compile(r"(?:^|\.)(?:lora_\w+|base_layer|modules_to_save|original_module)(?:\.|$)")


@dataclass(frozen=True)
class Weight:
    """One tensor by its header; `part` is "" where PEFT has no place for such a key."""

    key: str
    shape: tuple[int, ...]
    module: str = ""  # its name in the base model
    part: str = ""

    @classmethod
    def parse(cls, key: str, shape: tuple[int, ...]) -> "Weight":
        """The use of a tensor, by the names that PEFT saves."""
        found = _KEY.fullmatch(key)
        if found is None or _WRAPPER.search(found["module"]):
            return cls(key, shape)
        return cls(key, shape, found["module"], found["part"])


@dataclass(frozen=True)
class WeightsHeader:
    """All tensors of an adapter's file."""

    path: Path
    size_bytes: int  # of the file
    weights: tuple[Weight, ...]

    @cached_property
    def lora(self) -> dict[str, dict[str, Weight]]:
        """Module -> `lora_A`, `lora_B` and, with DoRA, `lora_magnitude_vector`."""
        modules: dict[str, dict[str, Weight]] = {}
        for weight in self.weights:
            if weight.part.startswith(("lora_A", "lora_B", "lora_magnitude_vector")):
                modules.setdefault(weight.module, {})[weight.part.removesuffix(".weight")] = weight
        return modules

    @cached_property
    def saved(self) -> list[Weight]:
        """Whole weights and biases, the ones of modules_to_save."""
        return [weight for weight in self.weights if weight.part in ("weight", "bias")]

    @cached_property
    def copies(self) -> list[Weight]:
        """The base model's own weights, which PEFT saves along if lm_head is a target."""
        return [weight for weight in self.weights if weight.part.startswith("base_layer")]

    @cached_property
    def parameters(self) -> int:
        """How many numbers the adapter brings."""
        return sum(math.prod(it.shape) for it in self.weights if it not in self.copies)


def read_header(folder: Path) -> WeightsHeader:
    """The header of the weights in `folder`; no tensor is read, a pickle is never opened.

    AdapterError if there is no such file, if it is damaged, or not in a float type of 16 or 32 bit.
    """
    path = _require_weights(folder)
    try:
        return _read(path)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read(path: Path) -> WeightsHeader:
    size = path.stat().st_size
    try:
        with safe_open(path, "numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            types = {key: entry.get_dtype() for key, entry in slices.items()}
            shapes = {key: tuple(entry.get_shape()) for key, entry in slices.items()}
    except SafetensorError as error:
        raise AdapterError(f"{path} {_damage(path, error)}.") from None
    _require_floats(path, types)
    return WeightsHeader(path, size, tuple(map(Weight.parse, shapes, shapes.values())))


def _require_weights(folder: Path) -> Path:
    path = find_file(folder, WEIGHTS)
    if path is not None:
        return path
    if find_file(folder, PICKLED_WEIGHTS) is not None:
        raise AdapterError(
            f"{folder / PICKLED_WEIGHTS} is a pickle, which can run code and is never loaded; "
            f"expected {WEIGHTS}: load it with PEFT where you trust it and save it again."
        )
    raise AdapterError(
        f"{folder} has no {WEIGHTS}, the only kind of weights that is loaded; {contents(folder)}: "
        "save the adapter again."
    )


def _require_floats(path: Path, types: dict[str, str]) -> None:
    others = {key: kind for key, kind in types.items() if kind not in _TYPES}
    if others:
        raise AdapterError(
            f"{path}: {first_five(others)} is stored as {', '.join(sorted(set(others.values())))}; "
            "expected F32, F16 or BF16: save the adapter in one of these."
        )


def _damage(path: Path, error: SafetensorError) -> str:
    """What is wrong with a file that safetensors refuses, and what to do."""
    size = path.stat().st_size
    if size == 0:
        return "is empty: copy or save the adapter again"
    with path.open("rb") as file:
        head = file.read(512)
        if reason := disguise(head):
            return reason
        length = int.from_bytes(head[:8], "little")  # of the header that follows, in bytes
        if 8 + length > size:
            return (
                f"is cut off or not a safetensors file: its header has {length} bytes, "
                f"but the file {size}; copy it again"
            )
        file.seek(8)
        return _data_damage(file.read(length), size - 8 - length) or (
            f"is not a safetensors file ({plain(str(error))}): copy it again"
        )


def _data_damage(header: bytes, size: int) -> str | None:
    """Whether the tensors' `size` bytes are fewer or more than the header says."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        expected = max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
        return None
    if size < expected:
        return f"is cut off: {size} of {expected} bytes of tensors are there; copy it again"
    if size > expected:
        return f"has {size - expected} bytes after its last tensor; copy it again"
    return None
