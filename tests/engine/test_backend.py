"""PagedBackend on the real demo model: the reference's answers, whoever else is in the batch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from qlorachat import ChatEngine, Message, Reply
from qlorachat.config import BackendChoice, QuantizationChoice
from qlorachat.engine.backend import PagedBackend
from qlorachat.engine.batch import Batch, ScheduledRow
from qlorachat.errors import AdapterError, ConfigError, EngineError
from tests.near_ties import LOGPROBS, assert_same
from tests.trained import QUESTION, SENTENCE, train_sentence

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": LOGPROBS}
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain what a bear eats in winter.",
    "Name three colours and an animal of each.",
]


@pytest.fixture(scope="module")
def engine(trained: Path, other: Path) -> Iterator[ChatEngine]:
    adapters = {"zunda": trained, "other": other}
    with ChatEngine("smollm2", backend="paged", adapters=adapters) as engine:
        yield engine


def paged(engine: ChatEngine) -> PagedBackend:
    assert isinstance(engine._backend, PagedBackend)
    return engine._backend


def recorded(engine: ChatEngine, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that is launched from now on."""
    batches: list[Batch] = []
    launch = paged(engine)._runner.launch

    def record(batch: Batch) -> object:
        batches.append(batch)
        return launch(batch)

    monkeypatch.setattr(paged(engine)._runner, "launch", record)
    return batches


@pytest.mark.parametrize("quantization", ["nf4", "16bit"])
def test_greedy_answers_are_the_references_up_to_a_near_tie(
    quantization: QuantizationChoice, trained: Path
) -> None:
    def answers(backend: BackendChoice) -> list[Reply]:
        options: dict[str, Any] = {"backend": backend, "quantization": quantization}
        with ChatEngine("smollm2", adapters={"zunda": trained}, **options) as engine:
            return [
                engine.chat(prompt, adapter=adapter, max_tokens=24, **GREEDY)
                for prompt in PROMPTS
                for adapter in (None, "zunda")
            ]

    for mine, theirs in zip(answers("paged"), answers("transformers"), strict=True):
        assert_same(mine, theirs)


def test_a_mixed_batch_equals_the_single_runs(
    engine: ChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [(p, a) for p in (PROMPTS[0], QUESTION) for a in (None, "zunda", "other")]

    def ask(job: tuple[str, str | None]) -> Reply:
        return engine.chat(job[0], adapter=job[1], max_tokens=12, **GREEDY)

    alone = [ask(job) for job in jobs]
    slots: list[list[int]] = []
    decode = paged(engine)._runner._decode

    def record(rows: Sequence[ScheduledRow]) -> object:
        slots.append([row.slot for row in rows])
        return decode(rows)

    monkeypatch.setattr(paged(engine)._runner, "_decode", record)
    with ThreadPoolExecutor(len(jobs)) as pool:
        for mine, theirs in zip(pool.map(ask, jobs), alone, strict=True):
            assert_same(mine, theirs)
    assert SENTENCE.startswith(alone[4].text)
    assert all(own == sorted(own) for own in slots), "rows with one adapter are neighbours"
    assert max(len(set(own)) for own in slots) == 3


def test_a_second_turn_computes_only_what_is_new(
    engine: ChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialog = [Message("user", "Tell me about bears. " * 8)]
    first = engine.chat(dialog, max_tokens=20, **GREEDY)
    batches = recorded(engine, monkeypatch)
    dialog += [Message("assistant", first.text), Message("user", "And seals?")]
    reply = engine.chat(dialog, max_tokens=1, **GREEDY)
    computed = sum(row.num_tokens for batch in batches for row in batch.prefills)
    assert computed < reply.usage.prompt_tokens - first.usage.prompt_tokens + 32


def test_the_prefix_cache_changes_no_answer(engine: ChatEngine) -> None:
    question = "Tell me about bears. " * 8
    fresh = engine.chat(question, max_tokens=16, **GREEDY)
    assert_same(engine.chat(question, max_tokens=16, **GREEDY), fresh)
    tuned = engine.chat(question, adapter="zunda", max_tokens=16, **GREEDY)
    assert tuned.text != fresh.text
    assert_same(engine.chat(question, max_tokens=16, **GREEDY), fresh)


def test_a_replaced_adapter_never_meets_its_old_blocks(
    engine: ChatEngine, trained: Path, other: Path
) -> None:
    engine.load_adapter("name", trained)
    assert engine.chat(QUESTION, adapter="name", **GREEDY).text == SENTENCE
    engine.load_adapter("name", other, replace=True)
    assert engine.chat(QUESTION, adapter="name", **GREEDY).text == "Nobody knows."
    engine.unload_adapter("name")


def test_more_adapters_than_slots_take_turns(trained: Path, other: Path) -> None:
    adapters = {"zunda": trained, "other": other}
    few = ChatEngine("smollm2", backend="paged", adapters=adapters, max_adapters=1)

    def ask(name: str) -> str:
        return few.chat(QUESTION, adapter=name, **GREEDY).text

    with few, ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(ask, ["zunda", "other", "zunda", "other"]))
    assert texts == [SENTENCE, "Nobody knows."] * 2


def test_sixty_four_streams_at_once_and_none_is_lost(engine: ChatEngine) -> None:
    def ask(number: int) -> Reply:
        question = f"{number}: {PROMPTS[number % len(PROMPTS)]}"
        return engine.chat(question, max_tokens=6, **GREEDY)

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert all(reply.text for reply in together)
    for number in range(3):
        assert_same(together[number], ask(number))


def test_who_leaves_frees_blocks_within_a_step(engine: ChatEngine) -> None:
    pool = paged(engine)._scheduler._blocks
    before = pool.num_free
    streams = [engine.stream(f"{n} Count to one thousand.", max_tokens=400) for n in range(4)]
    for stream in streams:
        next(stream)
    assert pool.num_free < before
    for stream in streams:
        stream.close()
    engine.chat("hi", max_tokens=1)
    end = monotonic() + 30
    while pool.num_free != before:
        assert monotonic() < end, "blocks are missing"
        sleep(0.01)


def test_a_batch_out_of_memory_ends_its_requests_alone(
    engine: ChatEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = paged(engine)._runner.launch

    def fail(batch: Batch) -> object:
        monkeypatch.setattr(paged(engine)._runner, "launch", launch)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(paged(engine)._runner, "launch", fail)
    with pytest.raises(EngineError, match="Out of memory"):
        engine.chat("hi")
    assert engine.chat("hi", max_tokens=2).text


def test_dora_falls_back_to_transformers_and_is_refused_later(
    tmp_path: Path, engine: ChatEngine, caplog: pytest.LogCaptureFixture
) -> None:
    folder = train_sentence(tmp_path / "dora", use_dora=True, steps=2)
    with pytest.raises(AdapterError, match="DoRA"):
        engine.load_adapter("dora", folder)
    with pytest.raises(ConfigError, match="DoRA"):
        ChatEngine("smollm2", backend="paged", adapters={"dora": folder})
    with caplog.at_level("INFO"), ChatEngine("smollm2", adapters={"dora": folder}) as fallback:
        assert "served by transformers" in caplog.text
        plain = fallback.chat(QUESTION, max_tokens=8, **GREEDY).text
        tuned = fallback.chat(QUESTION, adapter="dora", max_tokens=8, **GREEDY).text
    assert plain
    assert tuned
