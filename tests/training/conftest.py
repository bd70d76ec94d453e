"""A tiny 4-bit base that trains in seconds, and rows for it."""

import json
from pathlib import Path

import pytest

from tests.tiny import write_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer knows bytes and ChatML's control tokens."""
    return write_folder(tmp_path_factory.mktemp("base") / "tiny", layers=2)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [
        {"instruction": f"Say {n}.", "input": "", "output": f"It is {n}" + ", nanoda" * (n % 5)}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path
