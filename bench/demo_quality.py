"""Twenty simple questions to the demo model under several quantizations and sampling settings.

    python bench/demo_quality.py [--samples N] [--tokens N] [--output FILE]

Writes a JSON file and prints its table: the share of answers that hold the right word, answers
that run in circles, memory, and tokens a second of one answer at a time. Wording is no measure.
"""

import argparse
import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from qlorachat.checkpoints import Checkpoint, Recipe, load_model, locate
from qlorachat.config import QuantizationChoice

COLOURS = "red|blue|green|yellow|orange|purple|black|white|pink|brown|violet|indigo"
FRUITS = "apple|banana|orange|pear|grape|mango|cherry|strawberr|peach|pineapple|kiwi|lemon"
QUESTIONS = {
    "What is the capital of France?": r"\bparis\b",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of Italy?": r"\brome\b",
    "Name three colours.": rf"({COLOURS})\b.*\b({COLOURS})\b.*\b({COLOURS})",
    "Say hi.": r"\b(hi|hello|hey)\b",
    "What is 2 + 2?": r"\b(4|four)\b",
    "What is the opposite of hot?": r"\bcold\b",
    "What colour is the sky on a clear day?": r"\bblue\b",
    "How many days are in a week?": r"\b(7|seven)\b",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "What is the largest planet in our solar system?": "jupiter",
    "What is the chemical formula H2O called?": "water",
    "Name a fruit.": FRUITS,
    "How do you say hello in French?": "bonjour|salut",
    "Which language do people speak in Brazil?": "portuguese",
    "Which animal barks?": r"\bdogs?\b",
    "What is the first month of the year?": "january",
    "Write one sentence about a cat.": r"\bcats?\b",
    "At how many degrees Celsius does water boil?": r"\b100\b",
    "Who are you?": "smollm|assistant|ai\\b",
}
PARIS = next(iter(QUESTIONS))


def layers(*numbers: int) -> tuple[str, ...]:
    return tuple(f"model.layers.{number}" for number in numbers)


# label -> modules that stay in 16 bit; None leaves all of them there
QUANTIZATIONS: dict[str, tuple[str, ...] | None] = {
    "16 bit": None,
    "NF4": (),
    "NF4, layers 0-1, 28-29 in 16 bit": layers(0, 1, 28, 29),
    "NF4, attention in 16 bit": tuple(f"{layer}.self_attn" for layer in layers(*range(30))),
    "NF4, layers 0-1, 10-19, 28-29 in 16 bit": layers(0, 1, *range(10, 20), 28, 29),
}


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' generate; its own top_k of 50 is turned off."""
        penalty = {"repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {"do_sample": False, **penalty}
        heat = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, **heat, **penalty}

    def __str__(self) -> str:
        heat = f"t {self.temperature:g}, top_p {self.top_p:g}" if self.temperature else "greedy"
        return heat + (f", rep {self.repetition_penalty:g}" if self.repetition_penalty != 1 else "")


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.2, top_p=0.9),
    Sampling(temperature=0.2, top_p=0.9, repetition_penalty=1.05),
    Sampling(temperature=0.2, top_p=0.9, repetition_penalty=1.1),
    Sampling(temperature=0.7, top_p=0.9),
)


class Subject:
    """The demo model under one quantization."""

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self.label, kept = label, QUANTIZATIONS[label]
        recipe = Recipe(kept or ())
        choice: QuantizationChoice = "16bit" if kept is None else "auto"
        loaded = load_model(replace(checkpoint, recipe=recipe), device="cpu", quantization=choice)
        self.model, self.megabytes = loaded.model, loaded.memory_bytes / 1e6
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, padding_side="left")

    @torch.inference_mode()
    def answers(self, questions: list[str], sampling: Sampling, tokens: int) -> list[str]:
        """One answer for each question, written side by side."""
        dialogs = [[{"role": "user", "content": question}] for question in questions]
        batch = self.tokenizer.apply_chat_template(
            dialogs, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        torch.manual_seed(0)
        ids = self.model.generate(**batch, max_new_tokens=tokens, **sampling.arguments())
        new = ids[:, batch["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))

    @torch.inference_mode()
    def seconds(self, tokens: int) -> float:
        """Wall-clock time of one greedy answer of so many tokens to a prompt of two."""
        prompt = torch.tensor([[1, 2]])
        start = time.perf_counter()
        self.model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - start


def speeds(subjects: list[Subject], tokens: int = 24, rounds: int = 8) -> list[float]:
    """Tokens a second of each subject without the prompt's time.

    The best of rounds that take all subjects in turn, so that other work on the machine meets all.
    """
    best = [[math.inf, math.inf] for _ in subjects]
    for _ in range(rounds):
        for i, (subject, (first, whole)) in enumerate(zip(subjects, best, strict=True)):
            best[i] = [min(first, subject.seconds(1)), min(whole, subject.seconds(tokens))]
    return [(tokens - 1) / (whole - first) for first, whole in best]


def is_right(question: str, answer: str) -> bool:
    return re.search(QUESTIONS[question], answer.lower(), re.DOTALL) is not None


def runs_in_circles(answer: str) -> bool:
    """Whether four words in a row stand there three times or more."""
    words = answer.lower().split()
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return any(fours.count(four) >= 3 for four in set(fours))


def measure(subject: Subject, speed: float, samples: int, tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each sampling setting: all questions, and the first one `samples` times more.

    Sampled settings ask all questions twice.
    """
    for sampling in SAMPLINGS:
        rounds, more = (2, samples) if sampling.temperature else (1, 0)
        questions = list(QUESTIONS) * rounds
        answers = subject.answers(questions + [PARIS] * more, sampling, tokens)
        first, again = answers[: len(questions)], answers[len(questions) :]
        yield {
            "quantization": subject.label,
            "sampling": str(sampling),
            "settings": asdict(sampling),
            "right": sum(map(is_right, questions, first)),
            "questions": len(questions),
            "circles": sum(map(runs_in_circles, answers)),
            "answers_looked_at": len(answers),
            "paris": sum(is_right(PARIS, answer) for answer in again) if again else None,
            "paris_of": len(again) or None,
            "megabytes": round(subject.megabytes, 1),
            "tokens_per_second": round(speed, 1),
            "answers": dict(zip(QUESTIONS, first, strict=False)),
            "paris_answers": Counter(again),
        }


def row_text(row: dict[str, Any]) -> str:
    cells = (
        row["quantization"],
        row["sampling"],
        f"{row['right']}/{row['questions']}",
        f"{row['paris']}/{row['paris_of']}" if row["paris_of"] else "-",
        f"{row['circles']}/{row['answers_looked_at']}",
        f"{row['megabytes']:.0f}",
        f"{row['tokens_per_second']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=20, help="answers to the Paris question")
    parser.add_argument("--tokens", type=int, default=40, help="longest answer")
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / "demo_quality.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = locate("demo")
    rows = []
    print("| quantization | sampling | right | Paris | circles | MB | tok/s |")
    print("|---|---|---|---|---|---|---|")
    subjects = [Subject(checkpoint, label) for label in QUANTIZATIONS]
    for subject, speed in zip(subjects, speeds(subjects), strict=True):
        for row in measure(subject, speed, options.samples, options.tokens):
            rows.append(row)
            print(row_text(row), flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    machine = {"machine": platform.processor() or platform.machine(), "threads": options.threads}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(
        json.dumps({**machine, **versions, "rows": rows}, indent=1, ensure_ascii=False), "utf-8"
    )


if __name__ == "__main__":
    main()
