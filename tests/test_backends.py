"""Both backends on the real demo model keep the same promises: answers, adapters, ends, deaths."""

import asyncio
import gc
import json
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch

from qlorachat import ChatEngine, FinishReason, Reply
from qlorachat.config import BackendChoice
from qlorachat.engine.backend import PagedBackend
from qlorachat.errors import AdapterError, ConfigError, EngineError, ModelError, QueueFull
from qlorachat.reference import TransformersBackend
from tests.near_ties import LOGPROBS, assert_same
from tests.tiny import write_folder
from tests.trained import QUESTION, SENTENCE

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": LOGPROBS}
PROMPTS = ["What is the capital of France?", "Name three colours.", QUESTION]


@pytest.fixture(scope="module", params=["transformers", "paged"])
def backend(request: pytest.FixtureRequest) -> BackendChoice:
    return "paged" if request.param == "paged" else "transformers"


@pytest.fixture(scope="module")
def engine(backend: BackendChoice, trained: Path, other: Path) -> Iterator[ChatEngine]:
    adapters = {"zunda": trained, "other": other}
    with ChatEngine("smollm2", backend=backend, adapters=adapters) as engine:
        yield engine


def test_the_base_names_paris(engine: ChatEngine) -> None:
    assert "Paris" in engine.chat(PROMPTS[0]).text
    assert "Paris" in engine.chat(PROMPTS[0], **GREEDY).text


def test_adapters_answer_as_they_were_trained_and_the_base_does_not(engine: ChatEngine) -> None:
    assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE
    assert engine.chat(QUESTION, adapter="other", **GREEDY).text == "Nobody knows."
    assert engine.chat(QUESTION, **GREEDY).text not in (SENTENCE, "Nobody knows.")


def test_many_threads_get_the_answers_of_one(engine: ChatEngine) -> None:
    jobs = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, "zunda", "other")]

    def ask(job: tuple[str, str | None]) -> Reply:
        return engine.chat(job[0], adapter=job[1], max_tokens=8, **GREEDY)

    alone = [ask(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        for mine, theirs in zip(pool.map(ask, jobs), alone, strict=True):
            assert_same(mine, theirs)


def test_a_seed_repeats_and_touches_no_global_state(
    engine: ChatEngine, backend: BackendChoice
) -> None:
    def ask(seed: int) -> str:
        return engine.chat("Tell me a story.", seed=seed, temperature=1.0, max_tokens=20).text

    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    alone = [ask(seed) for seed in (1, 2, 3)]
    assert len(set(alone)) > 1
    if backend == "transformers":
        # the engine's logits are rounded by who is beside; its Sampler has tests of its own
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, (1, 2, 3))) == alone
    assert torch.equal(torch.random.get_rng_state(), before)


def test_strength_zero_is_the_base_and_one_the_adapter(engine: ChatEngine) -> None:
    base = engine.chat(QUESTION, max_tokens=16, **GREEDY)
    off = engine.chat(QUESTION, adapter="zunda", adapter_scale=0.0, max_tokens=16, **GREEDY)
    full = engine.chat(QUESTION, adapter="zunda", adapter_scale=1.0, **GREEDY).text
    assert_same(off, base)
    assert full == SENTENCE


def test_penalties_biases_and_logprobs(engine: ChatEngine) -> None:
    plain = engine.chat("Say hi.", max_tokens=12, **{**GREEDY, "logprobs": 3})
    tokens = [entry.token for entry in plain.logprobs]
    assert "".join(tokens) == plain.text
    assert all(entry.logprob <= 0.0 and len(entry.top) == 3 for entry in plain.logprobs)
    assert all(entry.top[0][0] == entry.token for entry in plain.logprobs)  # greedy
    tokenizer = engine._backend.tokenizer
    first = tokenizer.encode(tokens[0])[0][0]
    biased = engine.chat("Say hi.", max_tokens=12, logit_bias={first: -100.0}, **GREEDY)
    assert not biased.text.startswith(tokens[0])
    loop = engine.chat("Repeat: la la la la", max_tokens=40, frequency_penalty=2.0, **GREEDY)
    assert loop.text != engine.chat("Repeat: la la la la", max_tokens=40, **GREEDY).text


def test_closing_stops_the_model_within_a_token(engine: ChatEngine) -> None:
    stream = engine.stream("Count to one thousand.", max_tokens=500, temperature=0.0)
    next(stream)
    stream.close()
    started = monotonic()
    engine.chat("hi", max_tokens=1)
    assert monotonic() - started < 30  # 500 tokens take longer on any CPU that runs this
    assert stream.reply.usage.completion_tokens < 10


def test_async_answers_equal_sync_ones(engine: ChatEngine) -> None:
    async def ask(prompt: str) -> Reply:
        stream = engine.astream(prompt, max_tokens=12, **GREEDY)
        text = "".join([delta.text async for delta in stream])
        assert text == stream.reply.text
        return stream.reply

    async def main() -> list[Reply]:
        return await asyncio.gather(*map(ask, PROMPTS))

    for mine, prompt in zip(asyncio.run(main()), PROMPTS, strict=True):
        assert_same(mine, engine.chat(prompt, max_tokens=12, **GREEDY))


def test_adapters_come_and_go_while_others_stream(engine: ChatEngine, trained: Path) -> None:
    alone = engine.chat(PROMPTS[1], max_tokens=24, **GREEDY)
    stream = engine.stream(PROMPTS[1], max_tokens=24, **GREEDY)
    next(stream)
    engine.load_adapter("again", trained)
    assert engine.chat(QUESTION, adapter="again", **GREEDY).text == SENTENCE
    engine.unload_adapter("again")  # its weights are zunda's too, and stay
    assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE
    for _ in stream:
        pass
    assert_same(stream.reply, alone)


def test_a_replaced_adapter_answers_anew_under_its_name(
    engine: ChatEngine, trained: Path, other: Path
) -> None:
    engine.load_adapter("changing", trained)
    with pytest.raises(AdapterError, match="in use"):
        engine.load_adapter("changing", other)
    engine.load_adapter("changing", other, replace=True)
    assert engine.chat(QUESTION, adapter="changing", **GREEDY).text == "Nobody knows."
    engine.unload_adapter("changing")


def test_the_last_adapter_may_leave(backend: BackendChoice, trained: Path) -> None:
    with ChatEngine("smollm2", backend=backend, adapters={"zunda": trained}) as engine:
        before = engine.chat(QUESTION, max_tokens=8, **GREEDY)
        engine.unload_adapter("zunda")
        assert_same(engine.chat(QUESTION, max_tokens=8, **GREEDY), before)
        engine.load_adapter("zunda", trained)
        assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE


def test_the_model_is_settled_by_the_adapter(trained: Path) -> None:
    with ChatEngine(adapters={"zunda": trained}) as engine:
        assert "SmolLM2" in engine.info.name
        assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE


def test_a_full_queue_refuses_and_the_engine_lives(backend: BackendChoice) -> None:
    with ChatEngine("smollm2", backend=backend, max_queue=1, max_sequences=1) as engine:
        running = engine.stream("Count.", max_tokens=400)
        next(running)
        waiting = engine.stream("hi", max_tokens=2)
        with pytest.raises(QueueFull):
            engine.chat("hi")
        running.close()
        list(waiting)
        assert waiting.reply.usage.completion_tokens
        assert engine.chat("hi", max_tokens=2).text


def test_whole_numbers_do_for_sampling(engine: ChatEngine) -> None:
    options: dict[str, Any] = {"temperature": 2, "top_p": 1, "min_p": 0, "repetition_penalty": 2}
    assert engine.chat("hi", max_tokens=2, **options).usage.completion_tokens
    assert engine.alive


def test_who_leaves_the_queue_leaves_a_place(backend: BackendChoice) -> None:
    with ChatEngine("smollm2", backend=backend, max_queue=1, max_sequences=1) as engine:
        running = engine.stream("Count.", max_tokens=400)
        next(running)
        engine.stream("hi", max_tokens=2).close()
        end = monotonic() + 20
        while True:  # the thread of the paged engine has yet to hear of it
            try:
                waiting = engine.stream("hi", max_tokens=2)
                break
            except QueueFull:
                assert monotonic() < end
        running.close()
        list(waiting)
        assert waiting.reply.usage.completion_tokens


def test_an_adapter_that_is_unloaded_and_loaded_again_is_there(
    backend: BackendChoice, trained: Path
) -> None:
    with (
        ChatEngine("smollm2", backend=backend, adapters={"zunda": trained}) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        running = engine.stream("Count.", adapter="zunda", max_tokens=400, temperature=0.0)
        next(running)
        adapter = engine.adapters["zunda"].adapter
        served = engine._backend
        assert isinstance(served, PagedBackend | TransformersBackend)
        wanted = served._loaded if isinstance(served, PagedBackend) else served._wanted
        leaves = pool.submit(served.unload_adapter, adapter.sha256)
        while adapter.sha256 in wanted:
            sleep(0.01)
        served.load_adapter(adapter)
        running.close()
        leaves.result(20)
        assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE


def test_a_dead_thread_tells_everyone(
    backend: BackendChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise SystemError("the card fell off the bus")

    with ChatEngine("smollm2", backend=backend, max_sequences=1) as engine:
        stream = engine.stream("Count.", max_tokens=400)
        next(stream)
        waiting = engine.stream("hi")
        if isinstance(engine._backend, TransformersBackend):
            monkeypatch.setattr(engine._backend._model, "logits", fail)
        else:
            assert isinstance(engine._backend, PagedBackend)
            monkeypatch.setattr(engine._backend._runner, "launch", fail)
        for ended in (stream, waiting):
            with pytest.raises(EngineError, match="fell off the bus"):
                list(ended)
        assert not engine.alive


def test_closing_the_engine_ends_every_stream(backend: BackendChoice) -> None:
    engine = ChatEngine("smollm2", backend=backend)
    stream = engine.stream("Count.", max_tokens=400)
    next(stream)
    waiting = engine.stream("hi")
    engine.close()
    engine.close()
    for ended in (stream, waiting):
        with pytest.raises(EngineError, match="closed"):
            list(ended)
    with pytest.raises(EngineError, match="closed"):
        engine.chat("hi")


def test_an_engine_is_closed_when_nothing_refers_to_it(
    backend: BackendChoice, tmp_path: Path
) -> None:
    model = write_folder(tmp_path, layers=1)
    engine = ChatEngine(model, backend=backend, device="cpu", template="chatml")
    whole, cut = (engine.stream("Count.", max_tokens=200, temperature=0.0) for _ in range(2))
    inner = engine._backend
    assert isinstance(inner, PagedBackend | TransformersBackend)
    thread, seen = inner._thread, weakref.ref(inner)
    del engine, inner
    gc.collect()
    for _ in whole:  # streams keep it
        pass
    assert whole.reply.usage.completion_tokens > 0
    next(cut)
    del whole, cut
    end = monotonic() + 20
    while seen() is not None and monotonic() < end:
        gc.collect()
        sleep(0.01)
    assert seen() is None
    assert not thread.is_alive()


def test_finish_reasons_are_the_real_causes(engine: ChatEngine) -> None:
    whole = engine.chat(QUESTION, adapter="zunda", **GREEDY)
    assert whole.finish_reason is FinishReason.STOP
    count = whole.usage.completion_tokens
    exact = engine.chat(QUESTION, adapter="zunda", max_tokens=count, **GREEDY)
    assert exact.finish_reason is FinishReason.STOP
    cut = engine.chat(QUESTION, adapter="zunda", max_tokens=count - 1, **GREEDY)
    assert cut.finish_reason is FinishReason.LENGTH
    assert cut.text == SENTENCE


def test_several_answers_are_compared_side_by_side(engine: ChatEngine) -> None:
    names = [None, "zunda", "other"]
    alone = {n: engine.chat(QUESTION, adapter=n, max_tokens=16, **GREEDY) for n in names}
    with engine.compare(QUESTION, adapters=names, max_tokens=16, **GREEDY) as stream:
        texts: dict[str | None, str] = dict.fromkeys(names, "")
        for name, delta in stream:
            texts[name] += delta.text
        for name, reply in stream.replies.items():
            assert texts[name] == reply.text
            assert_same(reply, alone[name])
    assert texts["zunda"] == SENTENCE
    assert texts["other"] == "Nobody knows."


def test_a_text_is_scored_token_by_token(engine: ChatEngine) -> None:
    text = f"{QUESTION} {SENTENCE}"
    base, tuned = engine.score(text), engine.score(text, adapter="zunda")
    assert "".join(base.tokens) == text
    assert len(base.logprobs) == len(base.tokens) - 1
    assert 1.0 < tuned.perplexity < base.perplexity
    assert engine.score("The capital of France is Paris.").logprobs[-2] > -2.0


def test_keys_and_values_in_8_bits(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlorachat")
    options: dict[str, Any] = {"device": "cpu", "adapters": {"zunda": trained}, "memory": "700MiB"}
    for choice in ("auto", "int8"):
        ChatEngine("smollm2", backend="paged", kv_cache=choice, **options).close()
    wide, narrow = (
        int(found[1].replace(",", ""))
        for found in map(re.compile(r"KV cache .* for ([\d,]+) tokens").search, caplog.messages)
        if found
    )
    assert 1.88 * wide <= narrow <= 1.89 * wide  # 2 x 64 bytes, and 68
    with ChatEngine("smollm2", backend="paged", kv_cache="int8", **options) as engine:
        assert "Paris" in engine.chat(PROMPTS[0], **GREEDY).text
        assert engine.chat(QUESTION, adapter="zunda", **GREEDY).text == SENTENCE
        prompts = [*PROMPTS, PROMPTS[0]]  # prefixes are found again in the cache
        alone = [engine.chat(prompt, max_tokens=8, **GREEDY) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            ask = lambda prompt: engine.chat(prompt, max_tokens=8, **GREEDY)  # noqa: E731
            for mine, theirs in zip(pool.map(ask, prompts), alone, strict=True):
                assert_same(mine, theirs)


def test_transformers_take_no_bound_of_memory() -> None:
    with pytest.raises(ConfigError, match="leave memory out") as refused:
        ChatEngine("smollm2", backend="transformers", memory="4GiB")
    assert refused.value.param == "memory"


def test_transformers_have_no_8_bits() -> None:
    with pytest.raises(ConfigError, match="leave kv_cache at auto") as refused:
        ChatEngine("smollm2", backend="transformers", kv_cache="int8")
    assert refused.value.param == "kv_cache"


def test_a_wrong_config_is_one_line(tmp_path: Path) -> None:
    file = write_folder(tmp_path, layers=1) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_scaling": "dynamic"}))
    with pytest.raises(ModelError, match=r"config\.json of .* is wrong \(.*rope_parameters"):
        ChatEngine(tmp_path, device="cpu")
