"""Decode speed of the demo model on this CPU: our backends beside transformers' generate.

    python bench/decode_cpu.py [--tokens 64] [--rounds 5]

Greedy, so that all make the same tokens, which is checked first up to near-ties. Each round times
every row once, one after the other. Writes bench/results/decode_cpu.json.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from qlorachat import ChatEngine, Message
from qlorachat.config import QuantizationChoice
from qlorachat.reference import TransformersBackend

RESULTS = Path(__file__).parent / "results" / "decode_cpu.json"
STREAMS = 8
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # its template's
PROMPT = "Write a long story about a bear who makes friends with a seal."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    choices: tuple[QuantizationChoice, ...] = ("auto", "nf4", "16bit")
    rows = [measure(choice, arguments.tokens, arguments.rounds) for choice in choices]
    record = {"machine": machine(), "tokens": arguments.tokens, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def measure(choice: QuantizationChoice, tokens: int, rounds: int) -> dict[str, object]:
    """Median tokens/s of whole greedy answers, prefill included."""
    options: dict[str, Any] = {"device": "cpu", "quantization": choice}
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": tokens}
    reference = ChatEngine("smollm2", backend="transformers", **options)
    paged = ChatEngine("smollm2", backend="paged", **options)
    with reference, paged, ThreadPoolExecutor(STREAMS) as pool:
        calls: dict[str, Callable[[str], object]] = {
            "transformers generate": lambda name: generate(reference, ask(name), tokens),
            "TransformersBackend": lambda name: reference.chat(ask(name), **greedy),
            "PagedBackend": lambda name: paged.chat(ask(name), **greedy),
            f"PagedBackend, {STREAMS} streams": lambda name: list(
                pool.map(lambda n: paged.chat(ask(f"{n}, {name}"), **greedy), range(STREAMS))
            ),
        }
        answers = generate(reference, ask("x"), tokens), paged.chat(ask("x"), **greedy).text
        pairs = zip(*answers, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(partial(call, f"{number}")))
        made = {name: tokens * (STREAMS if "streams" in name else 1) for name in calls}
        return {
            "quantization": f"{choice}: {paged.info.quantization}",
            "MB": round(paged.info.memory_bytes / 1e6),
            "characters equal before a near-tie": f"{shared} of {len(answers[0])}",
            **{f"{n}, tokens/s": round(made[n] / median(t), 1) for n, t in times.items()},
        }


def ask(name: str) -> list[Message]:
    """A dialog that no other begins like: the prefix cache spares the engine no block of it."""
    return [Message("system", f"{name}. {SYSTEM}"), Message("user", PROMPT)]


def generate(engine: ChatEngine, dialog: list[Message], tokens: int) -> str:
    """transformers' own loop on the reference's weights."""
    backend = engine._backend
    assert isinstance(backend, TransformersBackend)
    ids = torch.tensor([engine.render(dialog).ids])
    made = backend._model._base.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
        min_new_tokens=tokens, do_sample=False, repetition_penalty=1.0,
        temperature=None, top_p=None,
    )  # fmt: skip
    return backend.tokenizer.decode(made[0, ids.shape[1] :].tolist())


def seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def machine() -> dict[str, object]:
    names = ("torch", "transformers", "bitsandbytes", "peft")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
