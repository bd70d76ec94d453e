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

from qlorachat import ChatEngine
from qlorachat.config import QuantizationChoice
from qlorachat.reference import TransformersBackend

RESULTS = Path(__file__).parent / "results" / "decode_cpu.json"
STREAMS = 8
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
        # every round asks something new, or the prefix cache would spare the engine its prefill
        calls: dict[str, Callable[[str], object]] = {
            "transformers generate": lambda ask: generate(reference, ask, tokens),
            "TransformersBackend": lambda ask: reference.chat(ask, **greedy),
            "PagedBackend": lambda ask: paged.chat(ask, **greedy),
            f"PagedBackend, {STREAMS} streams": lambda ask: list(
                pool.map(lambda n: paged.chat(f"{n}, {ask}", **greedy), range(STREAMS))
            ),
        }
        answers = generate(reference, PROMPT, tokens), paged.chat(PROMPT, **greedy).text
        pairs = zip(*answers, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds(partial(call, f"{number}. {PROMPT}")))
        made = {name: tokens * (STREAMS if "streams" in name else 1) for name in calls}
        return {
            "quantization": f"{choice}: {paged.info.quantization}",
            "MB": round(paged.info.memory_bytes / 1e6),
            "characters equal before a near-tie": f"{shared} of {len(answers[0])}",
            **{f"{n}, tokens/s": round(made[n] / median(t), 1) for n, t in times.items()},
        }


def generate(engine: ChatEngine, question: str, tokens: int) -> str:
    """transformers' own loop on the reference's weights."""
    backend = engine._backend
    assert isinstance(backend, TransformersBackend)
    ids = torch.tensor([engine.render(question).ids])
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
