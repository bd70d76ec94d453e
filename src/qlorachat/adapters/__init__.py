"""PEFT LoRA folders, checked headers first and then tensors before anything touches a model.

Importing this imports no torch: the command line asks it for the base model's name.
"""

from qlorachat.adapters.adapter import Adapter, LoraSettings
from qlorachat.adapters.card import AdapterCard, base_model_of, write_card
from qlorachat.adapters.check import Finding
from qlorachat.adapters.examination import Inspection, check_header, inspect_adapter, read_adapter
from qlorachat.adapters.locate import locate_adapter

__all__ = [
    "Adapter",
    "AdapterCard",
    "Finding",
    "Inspection",
    "LoraSettings",
    "base_model_of",
    "check_header",
    "inspect_adapter",
    "locate_adapter",
    "read_adapter",
    "write_card",
]
