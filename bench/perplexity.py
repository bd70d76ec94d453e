"""Perplexity of the demo model in NF4, decoded token by token in batches, beside transformers.

    python bench/perplexity.py [--device cuda]

The text is Python's own documentation, 20,480 tokens of it in 64 passages. What is exact is
computed in float32 on the weights as NF4 has them. transformers reads each passage at once on
bitsandbytes' kernels; PagedLlama takes one token of every passage of a batch at a time. Writes
bench/results/perplexity.json, named further on a card and with keys and values in 8 bits, and ends
with status 1 if PagedLlama is more than 0.1 % off without these.
"""

import argparse
import json
import math
import pydoc_data.topics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from decode import machine
from qlorachat.checkpoints import Checkpoint, Recipe, linear_shapes, load_model, locate
from qlorachat.kernels.eight_bits import INT8
from qlorachat.model import DecodeRows, KVCache, PagedLlama, Rows
from qlorachat.model.lora import AdapterStacks, LoraRows

RESULTS = Path(__file__).parent / "results"
BLOCK = 16  # tokens
ALLOWED = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--length", type=int, default=320, help="tokens to predict in each")
    parser.add_argument("--kv-cache", choices=["auto", "int8"], default="auto")
    arguments = parser.parse_args()
    checkpoint = replace(locate("demo"), recipe=Recipe(()))  # every projection in NF4
    device = arguments.device
    ids = passages(checkpoint, arguments.passages, arguments.length).to(device)
    exact = whole_loss(in_float32(load(checkpoint, device)), ids)
    theirs = whole_loss(load(checkpoint, device), ids)
    cached = INT8 if arguments.kv_cache == "int8" else None
    model = paged(load(checkpoint, device), checkpoint, cached)
    losses = {batch: decoded_loss(model, ids, batch) for batch in arguments.batches}
    off = {f"batches of {batch}": math.expm1(loss - exact) for batch, loss in losses.items()}
    record = {
        "machine": machine() if ids.is_cuda else "CPU",
        "tokens": ids[:, 1:].numel(),
        "keys and values": str(model.cached),
        "perplexity": round(math.exp(exact), 4),
        "transformers is off by, %": round(100 * math.expm1(theirs - exact), 4),
        "PagedLlama is off by, %": {name: round(100 * value, 4) for name, value in off.items()},
    }
    name = "perplexity" + ("_cuda" if ids.is_cuda else "")
    name += "_int8" if arguments.kv_cache == "int8" else ""
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    return 1 if arguments.kv_cache == "auto" and max(map(abs, off.values())) > ALLOWED else 0


def load(checkpoint: Checkpoint, device: str) -> Any:
    return load_model(checkpoint, device=device, quantization="nf4").model


def passages(checkpoint: Checkpoint, count: int, length: int) -> torch.Tensor:
    """[count, length + 1] tokens of English."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = AutoTokenizer.from_pretrained(checkpoint.folder)(text).input_ids
    return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)


def in_float32(model: Any) -> Any:
    """The model with its NF4 weights written out, every operation in float32."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                state = child.weight.quant_state
                state.dtype = torch.float32
                plain = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                weight = dequantize_4bit(child.weight.data, state)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                setattr(parent, name, plain)
    return nn.Module.float(model)  # transformers has a cast of its own, which refuses


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """The sum over all tokens, in nats."""
    return float(functional.cross_entropy(logits.float(), ids, reduction="sum"))


@torch.inference_mode()
def whole_loss(model: Any, ids: torch.Tensor) -> float:
    losses = (
        loss_of(model(input_ids=each[None, :-1], use_cache=False).logits[0], each[1:])
        for each in ids
    )
    return sum(losses) / ids[:, 1:].numel()


def paged(model: Any, checkpoint: Checkpoint, cached: torch.dtype | None) -> PagedLlama:
    shapes = linear_shapes(checkpoint)
    stacks = AdapterStacks(
        model.config.num_hidden_layers, shapes, dtype=model.dtype, device=model.device
    )
    return PagedLlama(model, stacks, cached)


@torch.inference_mode()
def decoded_loss(model: PagedLlama, ids: torch.Tensor, batch: int) -> float:
    length = ids.shape[1] - 1
    blocks = -(-length // BLOCK)
    cache = KVCache(
        layers=model.config.num_hidden_layers,
        blocks=batch * blocks,
        block_size=BLOCK,
        kv_heads=model.config.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=model.cached,
        device=model.device,
    )
    numbers = torch.arange(batch * blocks, dtype=torch.int32, device=model.device)
    tables, first, loss = numbers.view(batch, blocks), numbers[::blocks] * BLOCK, 0.0
    for rows in torch.split(ids, batch):
        for step in range(length):
            inputs = Rows(
                ids=rows[:, step].contiguous(),
                positions=torch.full_like(first, step),
                slots=first + step,
                attention=DecodeRows(tables, torch.full_like(first, step + 1)),
                lora=LoraRows(active=False),
            )
            logits = model.logits(model.hidden(inputs, cache))
            loss += loss_of(logits, rows[:, step + 1])
    return loss / ids[:, 1:].numel()


if __name__ == "__main__":
    sys.exit(main())
