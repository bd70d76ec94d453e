"""What an adapter trained on examples/data/nanoda.jsonl has learned, and what it has forgotten.

    python bench/nanoda.py FOLDER [--train]

Asks the base and the adapter twenty questions that the set does not hold, greedy, and counts the
answers that end in "nanoda" and those that hold a right word. With --train, `qlorachat train`
makes FOLDER first; its time and its peak memory are taken. Writes bench/results/nanoda.json.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import psutil

from decode_cpu import machine
from nanoda_questions import QUESTIONS
from qlorachat import ChatEngine
from qlorachat.messages import Reply

ROOT = Path(__file__).parents[1]
DATA = Path("examples/data/nanoda.jsonl")
RESULTS = ROOT / "bench" / "results" / "nanoda.json"
BASE, ADAPTER = "base", "adapter"
TOKENS = 64  # of the longest answer


@dataclass(frozen=True)
class Answer:
    """One answer, and what is counted about it."""

    text: str
    styled: bool  # its last word is nanoda
    right: bool  # it holds a right word
    ended: bool  # by itself, within TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the adapter")
    parser.add_argument("--train", action="store_true", help="train it first")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    training = train(folder) if options.train else None
    print("| question | base | adapter |\n|---|---|---|")
    answers = {}
    for question, pair in ask(folder):
        answers[question] = {name: asdict(answer) for name, answer in pair.items()}
        print(f"| {question} | {cell(pair[BASE])} | {cell(pair[ADAPTER])} |", flush=True)
    counts = {name: count(answers, name) for name in (BASE, ADAPTER)}
    record = {
        "machine": machine(),
        "training": training,
        "files": describe(folder),
        "max_tokens": TOKENS,
        "questions": len(answers),
        "counts": counts,
        "answers": answers,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(summary(counts, len(answers), training))


def train(folder: Path) -> dict[str, Any]:
    """Run `qlorachat train` with its defaults; its wall-clock seconds and its peak memory."""
    command = ["train", "--model", "smollm2", "--data", DATA.as_posix(), "--output", str(folder)]
    start = perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "qlorachat", *command], cwd=ROOT)
    peak = peak_memory(process)
    if process.returncode:
        sys.exit(f"qlorachat train ended with exit status {process.returncode}.")
    command[-1] = folder.name
    return {
        "command": f"qlorachat {' '.join(command)}",
        "seconds": round(perf_counter() - start, 1),
        "peak MB": round(peak / 1e6),
    }


def peak_memory(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process; the most bytes of memory that it held, looked at ten times a second."""
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, watched.memory_info().rss)
        sleep(0.1)
    return peak


def ask(folder: Path) -> Iterator[tuple[str, dict[str, Answer]]]:
    """Each question with the base's and the adapter's greedy answer."""
    with ChatEngine("smollm2", device="cpu", adapters={ADAPTER: folder}) as engine:
        for question in QUESTIONS:
            stream = engine.compare(
                question, adapters=(None, ADAPTER), temperature=0.0, max_tokens=TOKENS
            )
            for _ in stream:
                pass
            replies = {name or BASE: reply for name, reply in stream.replies.items()}
            yield question, {name: judge(question, reply) for name, reply in replies.items()}


def judge(question: str, reply: Reply) -> Answer:
    text = reply.text
    return Answer(
        text=text,
        styled=re.search(r"\bnanoda\W*$", text.lower()) is not None,
        right=re.search(QUESTIONS[question], text.lower()) is not None,
        ended=reply.finish_reason == "stop",
    )


def count(answers: dict[str, dict[str, Any]], name: str) -> dict[str, int]:
    """How many of one model's answers are styled, right, and ended."""
    marks = ("styled", "right", "ended")
    return {mark: sum(pair[name][mark] for pair in answers.values()) for mark in marks}


def describe(folder: Path) -> dict[str, Any]:
    """What the adapter says of itself."""
    paths = (folder / name for name in ("adapter_config.json", "qlorachat.json"))
    return {path.name: json.loads(path.read_text("utf-8")) for path in paths if path.exists()}


def cell(answer: Answer) -> str:
    mark = "right" if answer.right else "wrong"
    return f"{mark}: {' '.join(answer.text.split()).replace('|', '/')}"


def summary(
    counts: dict[str, dict[str, int]], questions: int, training: dict[str, Any] | None
) -> str:
    rows = ["", "| | base | adapter |", "|---|---|---|"]
    for label, mark in (("end in nanoda", "styled"), ("right", "right"), ("ended", "ended")):
        rows.append(
            f"| {label} | {' | '.join(f'{c[mark]}/{questions}' for c in counts.values())} |"
        )
    if training:
        rows.append(f"\n{training['command']}: {training['seconds']} s, {training['peak MB']} MB")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
