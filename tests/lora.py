"""Adapters of checkpoint folders as PEFT saves them, their weights random as after a training."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


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
