"""Nested state, such as an optimizer's, as safetensors and JSON: no pickle."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_TENSORS = "state.safetensors"
_VALUES = "state.json"

# the keys that stand for what JSON has not: a tensor by its number, a dict with keys of any kind
_TENSOR, _PAIRS = "$tensor", "$pairs"


def write_state(folder: Path, state: Any) -> None:
    """Dicts, lists, tensors and plain values; tuples come back as lists.

    Raises OSError and SafetensorError.
    """
    tensors: dict[str, torch.Tensor] = {}
    values = _plain(state, tensors, count())
    # clones, since safetensors refuses tensors that share memory
    copies = {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / _TENSORS)
    (folder / _VALUES).write_text(json.dumps(values), "utf-8")


def read_state(folder: Path) -> Any:
    """What `write_state` was given, tensors on the CPU."""
    tensors = load_file(folder / _TENSORS)
    return _whole(json.loads((folder / _VALUES).read_text("utf-8")), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor], numbers: Iterator[int]) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`."""
    if isinstance(value, torch.Tensor):
        key = str(next(numbers))
        tensors[key] = value
        return {_TENSOR: key}
    if isinstance(value, dict):
        return {_PAIRS: [[key, _plain(item, tensors, numbers)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors, numbers) for item in value]
    return value


def _whole(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _whole(item, tensors) for key, item in value[_PAIRS]}
    return value
