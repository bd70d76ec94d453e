"""Training speed and memory on a card, 7B NF4 with random weights: ours beside transformers + PEFT.

python bench/train.py [--size 7b] [--output FILE]

The peer is what people write: PEFT's LoRA under bf16 autocast, transformers' loss over all logits,
non-reentrant checkpointing, bitsandbytes' paged 8-bit AdamW. Both train on every token of random
ids. Gradients of the two are compared before anything is timed.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qlorachat.training.fused import fuse_layers
from qlorachat.training.lora_linear import LoraLinear4bit
from qlorachat.training.model import TrainedModel
from random_model import PROJECTIONS, build

STEPS, WARM_UP = 3, 1
GIB = 2**30


@dataclass(frozen=True)
class Case:
    rank: int
    rows: int  # in one pass
    tokens: int  # in one row
    accumulation: int


CASES = (Case(16, 16, 512, 1), Case(16, 1, 2048, 4), Case(64, 1, 512, 4))
Batch = dict[str, torch.Tensor]
Loss = Callable[[Batch], torch.Tensor]  # the mean over a batch's tokens


def peer(model: Any, rank: int) -> tuple[PeftModel, Loss]:
    """transformers and PEFT as they are."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    peft = get_peft_model(model, lora(rank)).train()

    def loss(batch: Batch) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16):
            value: torch.Tensor = peft(
                input_ids=batch["input_ids"], labels=batch["labels"].to(model.device)
            ).loss
            return value

    return peft, loss


def ours(model: Any, rank: int) -> tuple[PeftModel, Loss]:
    """What `qlorachat train` runs."""
    fuse_layers(model)
    settings = lora(rank)
    settings._register_custom_module({bitsandbytes.nn.Linear4bit: LoraLinear4bit})
    model.activation_checkpointing_enable({"use_reentrant": False})
    peft = get_peft_model(model, settings).train()
    trained = TrainedModel(peft, torch.bfloat16)

    def loss(batch: Batch) -> torch.Tensor:
        return trained.loss(batch) / (batch["labels"][:, 1:] >= 0).sum()

    return peft, loss


def lora(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )


def batches(case: Case, vocabulary: int, device: str, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (case.rows, case.tokens)
    made = [
        torch.randint(5, vocabulary, shape, generator=generator) for _ in range(case.accumulation)
    ]
    places = torch.arange(case.tokens).expand(shape)
    return [
        {"input_ids": ids.to(device), "labels": ids, "position_ids": places.to(device)}
        for ids in made
    ]


def gradients(build_side: Any, size: str, device: str, case: Case) -> dict[str, torch.Tensor]:
    """Of the first LoRA layers, with B filled so that A's are not zero."""
    model = build(size, device)
    peft, loss = build_side(model, case.rank)
    generator = torch.Generator().manual_seed(1)
    trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    loss(batches(case, model.config.vocab_size, device, 2)[0]).backward()
    return {name: p.grad.float().cpu() for name, p in trained.items() if p.grad is not None}


def compare(size: str, device: str, case: Case) -> float:
    """The largest relative difference of a gradient tensor between the two."""
    theirs = gradients(peer, size, device, case)
    clean()
    mine = gradients(ours, size, device, case)
    clean()
    assert mine.keys() == theirs.keys()
    return max(float((mine[n] - g).norm() / g.norm()) for n, g in theirs.items())


def measure(build_side: Any, model: Any, device: str, case: Case) -> dict[str, float]:
    """Seconds a step and the peak of allocated memory; the model is left without an adapter."""
    clean()
    peft, loss = build_side(model, case.rank)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(parameters, lr=1e-4)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(WARM_UP + STEPS):
        made = batches(case, model.config.vocab_size, device, step)
        torch.cuda.synchronize()
        began = perf_counter()
        for batch in made:
            (loss(batch) / case.accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(perf_counter() - began)
    peft.unload()
    spent = statistics.median(seconds[WARM_UP:])
    tokens = case.rows * case.tokens * case.accumulation
    return {
        "tokens_per_second": round(tokens / spent, 1),
        "seconds_per_step": round(spent, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
    }


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/train.json"))
    arguments = parser.parse_args()
    device = "cuda"
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel")
    record: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in libraries},
        "model": arguments.size,
        "gradients_differ_by": compare("tiny", device, Case(16, 2, 128, 1)),
    }
    print(f"largest relative difference of a gradient: {record['gradients_differ_by']:.4f}")
    model = build(arguments.size, device)
    record["cases"] = [{"case": asdict(case)} for case in CASES]
    # the peer first: what ours does to the layers stays
    for name, side in (("transformers + PEFT", peer), ("qlorachat", ours)):
        for case, row in zip(CASES, record["cases"], strict=True):
            row[name] = measure(side, model, device, case)
            print(case, name, row[name], flush=True)
            arguments.output.write_text(json.dumps(record, indent=1), "utf-8")


if __name__ == "__main__":
    main()
