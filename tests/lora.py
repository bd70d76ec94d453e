"""Adapters of random weights: of checkpoint folders, as PEFT saves them, and of shapes alone."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlorachat.adapters import Adapter, LoraSettings


def write_lora(folder: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter of the model in `base`; `settings` are PEFT's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **settings})
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute that is deprecated there
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        # and tells of tied weights, which is what is tried here
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        peft = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        peft.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub
    return folder


def make_adapter(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], sha256: str = "0" * 64
) -> Adapter:
    """With these ranks of modules (outputs, inputs), alpha twice the rank everywhere."""
    tensors = {}
    for module, rank in ranks.items():
        outputs, inputs = shapes[module]
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank)
    settings = LoraSettings(
        rank=max(ranks.values()), alpha=1.0, use_rslora=False, use_dora=False,
        fan_in_fan_out=False, target_modules=tuple(ranks), modules_to_save=(),
        rank_pattern=dict(ranks), alpha_pattern={name: 2.0 * rank for name, rank in ranks.items()},
        base_model_name_or_path=None, revision=None,
    )  # fmt: skip
    return Adapter(
        path=Path("random"), sha256=sha256, settings=settings,
        peft_config=settings.peft_config(), tensors=tensors, card=None, warnings=(),
    )  # fmt: skip
