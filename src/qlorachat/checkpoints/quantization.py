"""Which linear modules become NF4: decided from the config and the choice, before any weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from qlorachat.checkpoints.architecture import build_skeleton, is_linear, read_config
from qlorachat.checkpoints.checkpoint import Checkpoint, Recipe, weight_files
from qlorachat.checkpoints.memory import estimate_bytes
from qlorachat.config import QuantizationChoice
from qlorachat.errors import ModelError


@dataclass(frozen=True, slots=True)
class Plan:
    """Linear modules by full name; a checkpoint that is stored in 4 bit has an empty plan."""

    label: str
    quantized: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()  # in 16 bit

    def settings(self, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
        """What transformers is told: NF4 with double quantization, blocks of 64 weights."""
        if not self.quantized:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            # full names: transformers takes a name for a prefix and for a suffix too
            llm_int8_skip_modules=sorted(self.kept),
        )


def plan_quantization(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, choice: QuantizationChoice
) -> Plan:
    """The plan of a choice; the output layer always stays in 16 bit. Raises ModelError."""
    if stored := checkpoint.config.get("quantization_config"):
        return Plan(label=_stored_label(checkpoint.name, stored, choice))
    if choice == "16bit":
        return Plan(label="none")
    recipe = checkpoint.recipe if choice == "auto" else Recipe()
    head = skeleton.get_output_embeddings()
    linear = {name: module for name, module in skeleton.named_modules() if is_linear(module)}
    kept = frozenset(name for name, m in linear.items() if m is head or recipe.skips(name))
    quantized = frozenset(linear) - kept
    share = f" in {len(quantized)} of {len(linear)} linear layers" if recipe.skip_modules else ""
    return Plan(label=f"nf4+dq{share}", quantized=quantized, kept=kept)


def estimate_memory(checkpoint: Checkpoint, choice: QuantizationChoice) -> int:
    """Bytes that the weights will take; nothing is read but sizes. Raises ModelError."""
    skeleton = build_skeleton(read_config(checkpoint))
    plan = plan_quantization(checkpoint, skeleton, choice)
    if "quantization_config" in checkpoint.config:
        return sum(file.stat().st_size for file in weight_files(checkpoint.folder))
    return estimate_bytes(skeleton, plan.quantized)


def _stored_label(name: str, stored: Mapping[str, Any], choice: QuantizationChoice) -> str:
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not stored.get("load_in_4bit"):
        raise ModelError(
            f"`{name}` is stored in the quantization `{method}`: take the original in 16 bit, or "
            "one in bitsandbytes 4 bit."
        )
    if choice == "16bit":
        raise ModelError(f"`{name}` is stored in 4 bit: take the original to have it in 16 bit.")
    double = "+dq" if stored.get("bnb_4bit_use_double_quant") else ""
    return f"{stored.get('bnb_4bit_quant_type', 'fp4')}{double}, as stored"
