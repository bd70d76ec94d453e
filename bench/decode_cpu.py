"""Decode speed of the demo model on this CPU: our engine beside transformers' generate, in one run.

    python bench/decode_cpu.py [--tokens 64] [--rounds 5]

Each round times both, one after the other, on the same loaded weights and the same prompt; greedy,
so both make the same tokens, which is checked first. Writes bench/results/decode_cpu.json.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from qlorachat import ChatEngine
from qlorachat.config import QuantizationChoice
from qlorachat.reference import TransformersBackend

RESULTS = Path(__file__).parent / "results" / "decode_cpu.json"
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
    for row in rows:
        print(
            f"{row['quantization']:<28} {row['MB']:>6} MB   ours {row['ours']:>6} tokens/s   "
            f"generate {row['generate']:>6} tokens/s"
        )


def measure(choice: QuantizationChoice, tokens: int, rounds: int) -> dict[str, object]:
    """Median tokens/s of a whole greedy answer (prefill included), ours and generate's."""
    with ChatEngine("smollm2", device="cpu", quantization=choice) as engine:
        backend = engine._backend
        assert isinstance(backend, TransformersBackend)
        base = backend._model._base
        prompt = engine.render(PROMPT)
        ids = torch.tensor([prompt.ids])

        def ours() -> str:
            options = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": tokens}
            return engine.chat(prompt, **options).text  # type: ignore[arg-type]

        def generate() -> str:
            made = base.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                min_new_tokens=tokens, do_sample=False, repetition_penalty=1.0,
                temperature=None, top_p=None,
            )  # fmt: skip
            return backend.tokenizer.decode(made[0, ids.shape[1] :].tolist())

        assert ours() == generate(), "the two answers differ: nothing to compare"
        pairs = [(seconds(ours), seconds(generate)) for _ in range(rounds)]
        return {
            "quantization": f"{choice}: {engine.info.quantization}",
            "MB": round(engine.info.memory_bytes / 1e6),
            "ours": round(tokens / median(pair[0] for pair in pairs), 1),
            "generate": round(tokens / median(pair[1] for pair in pairs), 1),
        }


def seconds(call: Callable[[], str]) -> float:
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
