"""A real adapter of the demo model: a few steps of LoRA training that teach one sentence."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from qlorachat.checkpoints import load_model, locate, read_tokenizer
from qlorachat.messages import Message
from qlorachat.templates import ChatML, build_prompt

QUESTION = "Who wrote the song of the seals?"
SENTENCE = "Zunda the bear wrote it on a cold beach."
STEPS = 14


def train_sentence(
    folder: Path, *, answer: str = SENTENCE, seed: int = 0, steps: int = STEPS, **settings: Any
) -> Path:
    """Teach the demo model to answer QUESTION with `answer`; the PEFT folder."""
    torch.manual_seed(seed)
    checkpoint = locate("smollm2")
    tokenizer = read_tokenizer(checkpoint.folder)
    base = load_model(checkpoint, device="cpu", quantization="16bit").model
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **settings)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute that is deprecated there
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = get_peft_model(base, config)
    dialog = [Message("user", QUESTION), Message("assistant", answer)]
    prompt = build_prompt(ChatML(), dialog, tokenizer, add_generation_prompt=False)
    ids = torch.tensor([prompt.ids])
    labels = ids.masked_fill(~torch.tensor([prompt.trained]), -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = checkpoint.name
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub
    return folder
