"""Files on disk or on the hub become an NF4 model and a tokenizer; nothing here knows requests.

Importing this imports no torch: the cache and the tokenizer do without it.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlorachat.checkpoints.architecture import linear_shapes
    from qlorachat.checkpoints.cache import CacheEntry, clear, list_entries
    from qlorachat.checkpoints.checkpoint import Checkpoint, Recipe, locate
    from qlorachat.checkpoints.load import LoadedModel, keep_as_quantized, load_model
    from qlorachat.checkpoints.tokenizer import read_tokenizer

_HOMES = {
    "CacheEntry": "cache",
    "Checkpoint": "checkpoint",
    "LoadedModel": "load",
    "Recipe": "checkpoint",
    "clear": "cache",
    "keep_as_quantized": "load",
    "linear_shapes": "architecture",
    "list_entries": "cache",
    "load_model": "load",
    "locate": "checkpoint",
    "read_tokenizer": "tokenizer",
}
__all__ = [
    "CacheEntry",
    "Checkpoint",
    "LoadedModel",
    "Recipe",
    "clear",
    "keep_as_quantized",
    "linear_shapes",
    "list_entries",
    "load_model",
    "locate",
    "read_tokenizer",
]


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' line, at its import, that an optional CPU kernel is missing."""
    return "Failed to load CPU gemm_4bit_forward" not in record.getMessage()


# here, since whoever comes first to import bitsandbytes (PEFT does) must find it in place
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_saying)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlorachat.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qlorachat.checkpoints.{_HOMES[name]}"), name)
