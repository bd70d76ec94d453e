"""Do both backends give the same answers? Greedy, 20 prompts of 128 tokens, NF4 and 16 bit.

    python bench/parity.py [--prompts 20] [--tokens 128] [--device cpu]

The engine answers all prompts in one batch, the reference one by one. Up to the first token where
they differ, log-probabilities are compared; at that token, the reference's margin between its two
likeliest says whether it was a near-tie. Writes bench/results/parity.json, or parity_cuda.json.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import decode
import decode_cpu
from qlorachat import ChatEngine, TokenLogprob
from qlorachat.config import BackendChoice, QuantizationChoice

RESULTS = Path(__file__).parent / "results"
SUBJECTS = [
    *("the sea", "bears", "bread", "Paris", "the moon", "winter", "a river", "honey", "trains"),
    *("a library", "the piano", "chess", "whales", "the desert", "clocks", "tea", "maps"),
    *("a lighthouse", "volcanoes", "kites"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    prompts = [f"Write a paragraph about {subject}." for subject in SUBJECTS[: arguments.prompts]]
    choices: tuple[QuantizationChoice, ...] = ("nf4", "16bit")
    cuda = arguments.device != "cpu"
    rows = [compare(choice, prompts, arguments.tokens, arguments.device) for choice in choices]
    described = decode.machine() if cuda else decode_cpu.machine()
    record = {"machine": described, "tokens": arguments.tokens, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    results = RESULTS / ("parity_cuda.json" if cuda else "parity.json")
    results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


def compare(
    choice: QuantizationChoice, prompts: list[str], tokens: int, device: str
) -> dict[str, Any]:
    backends: tuple[BackendChoice, ...] = ("paged", "transformers")
    ours, reference = (answers(b, choice, prompts, tokens, device) for b in backends)
    lengths, margins, differences = [], [], [0.0]
    for mine, theirs in zip(ours, reference, strict=True):
        pairs = list(zip(mine, theirs, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a.token != b.token), len(pairs))
        lengths.append(same)
        differences += [abs(a.logprob - b.logprob) for a, b in pairs[:same]]
        if same < len(pairs):
            margins.append(theirs[same].top[0][1] - theirs[same].top[1][1])
    return {
        "quantization": choice,
        "prompts": len(prompts),
        "equal to the end": sum(n == len(r) for n, r in zip(lengths, reference, strict=True)),
        "tokens before the first difference": lengths,
        "margins there, natural-log probability": [round(margin, 4) for margin in margins],
        "largest difference of a log-probability": round(max(differences), 4),
    }


def answers(
    backend: BackendChoice,
    choice: QuantizationChoice,
    prompts: list[str],
    tokens: int,
    device: str,
) -> list[tuple[TokenLogprob, ...]]:
    options: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": 2}
    with (
        ChatEngine("smollm2", device=device, backend=backend, quantization=choice) as engine,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):
        ask = lambda prompt: engine.chat(prompt, max_tokens=tokens, **options).logprobs  # noqa: E731
        return list(pool.map(ask, prompts))


if __name__ == "__main__":
    main()
