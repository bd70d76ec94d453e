"""What a plugin's own tests look like: the real frontend on qlorachat's fake backend."""

import json
from pathlib import Path
from threading import Event

import pytest
from qlorachat_batch import BatchFrontend, BatchOptions

from qlorachat.errors import ConfigError
from qlorachat.testing import check_frontend, fake_engine


def options(folder: Path) -> BatchOptions:
    (folder / "questions.txt").write_text("一つ目\n\nsecond <3\n", encoding="utf-8")
    return BatchOptions(input=folder / "questions.txt", output=folder / "answers.jsonl")


def test_every_question_is_answered_in_order(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    with fake_engine() as engine:
        BatchFrontend().serve(engine, chosen, Event())
    rows = [json.loads(line) for line in chosen.output.read_text(encoding="utf-8").splitlines()]
    assert [row["question"] for row in rows] == ["一つ目", "second <3"]
    assert [row["answer"] for row in rows] == ["一つ目", "second <3"]


def test_the_contract_is_kept(tmp_path: Path) -> None:
    check_frontend(BatchFrontend(), options(tmp_path))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    chosen.output.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        BatchFrontend().prepare(chosen)
