"""A real data set of 15,015 rows goes through reading, templates and packing, and none is lost."""

import hashlib
from pathlib import Path

import pytest

from qlorachat.protocols import Tokenizer
from qlorachat.templates import Elyza
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import plan_schedule
from qlorachat.training.data.rows import Rows, read_rows
from qlorachat.training.data.samples import Samples, build_samples

DOLLY = Path(__file__).parents[3].parent / "shared" / "data" / "dolly-15k-ja.jsonl.gz"
ROWS, WITH_INPUT = 15_015, 4_598
MAX_LENGTH = 1024


@pytest.fixture(scope="module")
def rows() -> Rows:
    if not DOLLY.exists():
        pytest.skip(f"no data set at {DOLLY}")
    return read_rows(str(DOLLY), separator="\n\n<input>\n\n")


@pytest.fixture(scope="module")
def samples(rows: Rows, llama2: Tokenizer) -> Samples:
    return build_samples(rows.rows, Elyza(), llama2, max_length=MAX_LENGTH)


def test_every_row_is_read(rows: Rows) -> None:
    assert [row.line for row in rows.rows] == list(range(1, ROWS + 1))
    assert rows.bad == ()
    questions = [row.messages[0].content for row in rows.rows]
    assert sum("\n\n<input>\n\n" in question for question in questions) == WITH_INPUT
    assert rows.sha256 == hashlib.sha256(DOLLY.read_bytes()).hexdigest()


def test_every_row_is_a_sample_or_bad(samples: Samples, llama2: Tokenizer) -> None:
    end = llama2.control_tokens["</s>"]
    lines = [sample.line for sample in samples.samples] + [bad.line for bad in samples.bad]
    assert sorted(lines) == list(range(1, ROWS + 1))
    assert len(samples.lengths) == ROWS
    assert all("its prompt alone has" in bad.reason for bad in samples.bad)
    for sample in samples.samples:
        assert sample.truncated or (sample.ids[-1] == end and sample.trained[-1])
        assert not sample.trained[0]
    too_long = sum(length > MAX_LENGTH for length in samples.lengths)
    assert samples.truncated + len(samples.bad) == too_long
    assert 0 < samples.trained_tokens < samples.tokens


def test_packs_are_full(samples: Samples) -> None:
    lengths = [len(sample.ids) for sample in samples.samples]
    config = TrainConfig(packing=True, epochs=1, max_length=MAX_LENGTH)
    steps = plan_schedule(lengths, config).steps
    packs = [row for step in steps for micro_batch in step for row in micro_batch]
    assert sorted(index for row in packs for index in row) == list(range(len(lengths)))
    assert sum(lengths) > 0.99 * MAX_LENGTH * len(packs)
