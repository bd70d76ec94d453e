"""ChatEngine over the fake backend: everything between text and tokens, in milliseconds."""

import asyncio
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlorachat import ChatEngine, FinishReason, Message, RequestRecord, TokenLogprob, hookimpl
from qlorachat.adapters.card import AdapterCard, write_card
from qlorachat.config import EngineConfig
from qlorachat.errors import (
    AdapterError,
    ConfigError,
    ContextOverflow,
    DialogError,
    EngineError,
    QueueFull,
    UnknownName,
    UsageError,
)
from qlorachat.plugins import create_manager
from qlorachat.streams import AsyncChatStream
from qlorachat.templates import Prompt
from qlorachat.testing import FakeBackend, fake_engine
from qlorachat.tokens import TokenEvent, TokenRequest

JAPANESE = "こんにちは、ありがとうございます。"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(value=1, system=None)`: a folder with weights that are that value."""
    numbers = count()

    def make(value: float = 1, system: str | None = None) -> Path:
        folder = tmp_path / f"adapter{next(numbers)}"
        folder.mkdir()
        names = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "fake"}
        config = {**names, "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        a, b = torch.full((2, 8), float(value)), torch.full((8, 2), float(value))
        weights = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        save_file(weights, folder / "adapter_model.safetensors")
        write_card(folder, AdapterCard(system=system))
        return folder

    return make


def test_a_question_is_answered() -> None:
    with fake_engine() as engine:
        reply = engine.chat("Hello")
    assert reply.text == "Hello"
    assert reply.finish_reason is FinishReason.STOP
    assert reply.usage.completion_tokens == len("Hello") + 1  # and the end-of-turn token
    assert reply.usage.prompt_tokens == len(b"user\nHello\nassistant\n") + 3
    assert reply.timings.first_token >= 0.0


def test_a_stream_joins_to_the_reply_and_breaks_no_character() -> None:
    with fake_engine() as engine:
        stream = engine.stream([Message("user", JAPANESE)])
        pieces = [delta.text for delta in stream]
        assert "".join(pieces) == JAPANESE == stream.reply.text
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) == len(JAPANESE)


def test_max_tokens_ends_with_length_and_an_end_of_turn_on_the_last_token_with_stop() -> None:
    with fake_engine() as engine:
        assert engine.chat("Hello", max_tokens=3).finish_reason is FinishReason.LENGTH
        assert engine.chat("Hello", max_tokens=6).finish_reason is FinishReason.STOP


def test_what_the_fake_cannot_answer_ends_that_request_alone() -> None:
    def answer(request: TokenRequest, prompt: str) -> str:
        assert "good" in prompt, "no good prompt"
        return "fine"

    backend = FakeBackend(answer)
    with fake_engine(backend) as engine:
        with pytest.raises(EngineError, match="no good prompt"):
            engine.chat("bad")
        assert backend.running == 0
        assert engine.chat("good").text == "fine"


def test_the_fake_reports_log_probabilities_that_are_asked_for() -> None:
    with fake_engine() as engine:
        told = engine.chat("Hi", logprobs=2).logprobs
        assert told[0] == TokenLogprob("H", 0.0, (("H", 0.0),))
        assert not engine.chat("Hi").logprobs
        assert engine.score("abc").logprobs == (0.0, 0.0)


@pytest.mark.parametrize("stop", ["lo w", ["x", "lo w"]])
def test_a_stop_string_ends_the_answer_and_never_shows(stop: str | list[str]) -> None:
    backend = FakeBackend(delay=0.001)
    with fake_engine(backend) as engine:
        stream = engine.stream("hello world", stop=stop)
        assert [delta.text for delta in stream] == list("hel")
        assert stream.reply.finish_reason is FinishReason.STOP
        _until(lambda: backend.running == 0)


def test_closing_stops_the_model_and_keeps_the_text() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.001)
    with fake_engine(backend) as engine, engine.stream("go", max_tokens=4000) as stream:
        next(stream)
        stream.close()
        assert stream.reply.text == "a"
        assert stream.reply.finish_reason is FinishReason.ABORTED
        _until(lambda: backend.running == 0)
        assert list(stream) == []


def test_a_dropped_stream_stops_the_model() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.001)
    with fake_engine(backend) as engine:
        next(engine.stream("go", max_tokens=4000))
        _until(lambda: backend.running == 0)


def test_a_dropped_comparison_stops_the_model() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.01)
    with fake_engine(backend) as engine:
        next(engine.compare("go", adapters=[None], max_tokens=4000))
        _until(lambda: backend.running == 0)


def test_the_messages_of_a_comparison_may_come_once(make_adapter: Callable[..., Path]) -> None:
    with fake_engine(adapters={"a": make_adapter()}) as engine:
        stream = engine.compare(iter([Message("user", "hello")]), adapters=[None, "a"])
        for _ in stream:
            pass
        assert [reply.text for reply in stream.replies.values()] == ["hello"] * 2


def test_the_reply_of_an_unfinished_answer_is_an_error() -> None:
    with fake_engine(FakeBackend(delay=0.01)) as engine, engine.stream("hello") as stream:
        next(stream)
        with pytest.raises(EngineError, match="no reply"):
            _ = stream.reply


def test_async_streams_run_side_by_side() -> None:
    async def ask(engine: ChatEngine, question: str) -> str:
        return "".join([delta.text async for delta in engine.astream(question)])

    async def main() -> list[str]:
        with fake_engine(FakeBackend(delay=0.001)) as engine:
            return await asyncio.gather(*(ask(engine, f"question {n}") for n in range(20)))

    assert asyncio.run(main()) == [f"question {n}" for n in range(20)]


def test_an_async_stream_that_two_tasks_open_asks_once() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.001)

    async def main() -> None:
        with fake_engine(backend) as engine:
            stream = engine.astream("go", max_tokens=4000)
            await asyncio.gather(stream.open(), stream.open())
            assert backend.running == 1
            await stream.aclose()
            _until(lambda: backend.running == 0)

    asyncio.run(main())


def test_a_dropped_async_stream_stops_the_model() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.01)

    async def main() -> None:
        with fake_engine(backend) as engine:
            stream = engine.astream("go", max_tokens=4000)
            await anext(stream)
            assert backend.running == 1
            del stream
            _until(lambda: backend.running == 0)

    asyncio.run(main())


def test_an_async_stream_raises_before_its_first_delta() -> None:
    async def main() -> None:
        with fake_engine() as engine:
            stream = engine.astream("hello", adapter="nobody")
            with pytest.raises(UnknownName):
                await stream.open()

    asyncio.run(main())


def test_a_cancelled_async_caller_frees_the_backend() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 10_000, delay=0.001)

    async def main() -> None:
        with fake_engine(backend) as engine:

            async def read() -> None:
                async with engine.astream("go", max_tokens=4000) as stream:
                    async for _ in stream:
                        pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            _until(lambda: backend.running == 0)

    asyncio.run(main())


def test_an_async_caller_that_is_behind_leaves_others_their_turn() -> None:
    backend = FakeBackend(lambda request, prompt: "a" * 1000)
    seen = 0

    async def read(stream: AsyncChatStream) -> None:
        nonlocal seen
        async for _ in stream:
            seen += 1

    async def main() -> None:
        with fake_engine(backend) as engine:
            stream = engine.astream("go", max_tokens=2000)
            await stream.open()
            _until(lambda: backend.running == 0)
            reading = asyncio.create_task(read(stream))
            for _ in range(10):
                await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(main())
    assert 0 < seen < 20


def test_many_threads_get_their_own_answers() -> None:
    with fake_engine(FakeBackend(delay=0.0005)) as engine, ThreadPoolExecutor(16) as pool:
        questions = [f"question number {n}" for n in range(64)]
        assert [reply.text for reply in pool.map(engine.chat, questions)] == questions


def test_a_mistyped_option_names_the_nearest() -> None:
    with fake_engine() as engine, pytest.raises(UsageError, match="`temperature`"):
        engine.chat("hi", temprature=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3.0}, "temperature"),
        ({"adapter_scale": 2.5}, "adapter_scale"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": None}, "stop"),
        ({"stop": 5}, "stop"),
        ({"overflow": "drop_oldest_turn"}, "overflow"),
        ({"tags": "strip"}, "tags"),
        ({"logit_bias": {258: 1.0}}, "logit_bias"),
    ],
)
def test_a_wrong_option_names_itself(options: dict[str, Any], param: str) -> None:
    with fake_engine() as engine, pytest.raises(UsageError) as caught:
        engine.chat("hi", **options)
    assert caught.value.param == param


@pytest.mark.parametrize("ids", [(), (258,), (-1, 65)])
def test_a_prompt_that_the_model_has_no_tokens_for(ids: tuple[int, ...]) -> None:
    prompt = Prompt("x", ids, (False,) * len(ids))
    with fake_engine() as engine:
        for ask in (engine.chat, engine.score):
            with pytest.raises(DialogError, match="prompt"):
                ask(prompt)


def test_a_text_too_long_to_be_scored() -> None:
    with fake_engine(FakeBackend(context_length=64)) as engine, pytest.raises(ContextOverflow):
        engine.score("x" * 64)


def test_an_unknown_adapter_is_an_error_and_never_the_base() -> None:
    with fake_engine() as engine, pytest.raises(UnknownName, match="adapter `zundamom`"):
        engine.chat("hi", adapter="zundamom")


def test_a_mistyped_template_is_found_before_the_model_loads() -> None:
    with pytest.raises(UnknownName, match="did you mean `chatml`"):
        fake_engine(template="chatlm")


def test_a_model_without_a_template_says_which_there_are() -> None:
    with fake_engine(template=None) as engine, pytest.raises(ConfigError, match="chatml, elyza"):
        engine.chat("hi")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "robot", "content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        ["hi"],
        [],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ],
)
def test_a_dialog_that_cannot_be_is_one_clear_error(messages: Any) -> None:
    with fake_engine() as engine, pytest.raises(DialogError) as caught:
        engine.chat(messages)
    assert "\n" not in str(caught.value)


def test_overflow_is_an_error_with_both_counts() -> None:
    with fake_engine(FakeBackend(context_length=100)) as engine:
        with pytest.raises(ContextOverflow) as caught:
            engine.chat("x" * 200)
        assert caught.value.prompt_tokens > 200
        assert caught.value.context_length == 100
        with pytest.raises(ContextOverflow):
            engine.chat("hi", max_tokens=99)


def test_an_unasked_max_tokens_shrinks_to_what_the_context_leaves() -> None:
    with fake_engine(FakeBackend(lambda r, p: "a" * 500, context_length=100)) as engine:
        reply = engine.chat("hi")
        assert reply.finish_reason is FinishReason.LENGTH
        assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 100


def test_old_turns_are_dropped_on_request_and_reported() -> None:
    dialog: list[Message] = [Message("system", "Be brief.")]
    for n in range(10):
        dialog += [Message("user", f"question {n}"), Message("assistant", f"answer {n}")]
    dialog.append(Message("user", "the last"))
    with fake_engine(FakeBackend(context_length=200), overflow="drop_oldest_turns") as engine:
        reply = engine.chat(dialog, max_tokens=20)
    dropped = reply.usage.dropped_messages
    assert dropped == tuple(range(1, len(dropped) + 1))
    assert len(dropped) % 2 == 0
    assert reply.usage.prompt_tokens <= 180
    assert reply.usage.prompt_tokens_dropped > 0
    # one pair more would not have been needed
    pair = len(b"user\nquestion 0\nassistant\nanswer 0\n") + 4
    assert reply.usage.prompt_tokens + pair > 180


def test_what_can_never_fit_overflows_even_when_turns_may_be_dropped() -> None:
    backend = FakeBackend(context_length=100)
    engine = fake_engine(backend, overflow="drop_oldest_turns")
    with engine, pytest.raises(ContextOverflow):
        engine.chat([{"role": "user", "content": "x" * 300}])


def test_the_system_prompt_serves_dialogs_that_bring_none() -> None:
    with fake_engine(FakeBackend(lambda r, p: p), system="SYSTEM") as engine:
        assert "SYSTEM" in engine.render("hi").text
        own = [{"role": "system", "content": "OWN"}, {"role": "user", "content": "hi"}]
        assert "SYSTEM" not in engine.render(own).text


def test_an_empty_system_prompt_is_one(make_adapter: Callable[..., Path]) -> None:
    adapters = {"empty": make_adapter(system=""), "full": make_adapter(system="SYSTEM")}
    empty = "<|im_start|>system\n<|im_end|>"
    with fake_engine(FakeBackend(lambda r, p: p), adapters=adapters) as engine:
        assert empty in engine.render("hi", adapter="empty").text
        assert "system" not in engine.render("hi").text
    with fake_engine(FakeBackend(lambda r, p: p), adapters=adapters, system="") as engine:
        assert empty in engine.render("hi", adapter="full").text


def test_rendered_and_raw_prompts_are_taken_as_they_are() -> None:
    seen: list[TokenRequest] = []

    def answer(request: TokenRequest, prompt: str) -> str:
        seen.append(request)
        return "ok"

    with fake_engine(FakeBackend(answer)) as engine:
        engine.chat(engine.render("hi"))
        engine.chat("hi")
        engine.chat(engine.raw("hi"))
    assert seen[0].prompt == seen[1].prompt
    assert seen[2].prompt == tuple(b"hi")


def test_control_text_in_messages_is_plain_text() -> None:
    with fake_engine() as engine:
        prompt = engine.render("a <|im_end|> b")
        assert list(prompt.ids).count(257) == engine.render("a").ids.count(257)


def test_a_full_queue_is_an_error_at_once() -> None:
    backend = FakeBackend(lambda r, p: "a" * 100, delay=0.01, max_queue=2)
    with fake_engine(backend) as engine:
        streams = [engine.stream("hi") for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.chat("hi")
        for stream in streams:
            stream.close()


def test_the_configs_sampling_takes_the_place_of_the_checkpoints() -> None:
    with fake_engine(max_tokens=3, temperature=0.5) as engine:
        assert engine.info.sampling.temperature == 0.5
        assert engine.chat("abcdef").text == "abc"
        assert engine.chat("abcdef", max_tokens=5).text == "abcde"
    with pytest.raises(UsageError, match="temperature"):
        fake_engine(temperature=9.0)


def test_a_dead_backend_tells_everyone() -> None:
    backend = FakeBackend(lambda r, p: "a" * 1000, delay=0.005)
    with fake_engine(backend) as engine:
        stream = engine.stream("hi")
        next(stream)
        backend.fail("The engine died.")
        with pytest.raises(EngineError, match="died"):
            list(stream)
        assert not engine.alive
        with pytest.raises(EngineError, match="died"):
            engine.chat("hi")


def test_observers_learn_of_every_end_and_a_broken_one_costs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    records: list[RequestRecord] = []

    class Observer:
        @hookimpl
        def request_finished(self, record: RequestRecord) -> None:
            records.append(record)

    class Broken:
        @hookimpl
        def request_finished(self, record: RequestRecord) -> None:
            raise RuntimeError("broken observer")

    host = create_manager(load=())
    host.register(Broken(), "broken")
    host.register(Observer(), "observer")
    host.register(Broken(), "broken2")
    with caplog.at_level(logging.ERROR), fake_engine(plugins=host) as engine:
        engine.chat("hello")
        stream = engine.stream("hello")
        stream.close()
        assert stream._generation.feed(TokenEvent(1, finish=FinishReason.STOP)) is None
    reasons = [record.finish_reason for record in records]
    assert reasons == [FinishReason.STOP, FinishReason.ABORTED]
    assert records[0].completion_tokens == 6
    assert "broken observer" in caplog.text


def test_a_successor_answers_a_prompt_of_its_own(
    make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that is replaced while its prompt is made."""
    old, new = make_adapter(1, "OLD"), make_adapter(2, "NEW")
    with fake_engine(adapters={"a": old}) as engine:
        render = engine._render

        def replaced(*arguments: Any) -> Prompt:
            monkeypatch.undo()
            prompt = render(*arguments)
            engine.load_adapter("a", new, replace=True)
            return prompt

        monkeypatch.setattr(engine, "_render", replaced)
        stream = engine.stream("hello", adapter="a")
        text = engine._backend.tokenizer.decode(stream._generation.request.prompt)
        assert "NEW" in text
        assert "OLD" not in text


class SlowBackend(FakeBackend):
    """Whose adapters take until `go` to load."""

    def __init__(self) -> None:
        super().__init__()
        self.loading, self.go = Event(), Event()

    def load_adapter(self, adapter: Any) -> None:
        super().load_adapter(adapter)
        self.loading.set()
        assert self.go.wait(30)


def test_weights_that_are_loaded_again_meanwhile_stay(make_adapter: Callable[..., Path]) -> None:
    folder, backend = make_adapter(), SlowBackend()
    backend.go.set()
    with fake_engine(backend, adapters={"one": folder}) as engine, ThreadPoolExecutor(2) as pool:
        backend.go.clear()
        backend.loading.clear()
        loads = pool.submit(engine.load_adapter, "two", folder)
        assert backend.loading.wait(30)
        unloads = pool.submit(engine.unload_adapter, "one")
        _until(lambda: "one" not in engine.adapters)
        sleep(0.05)
        backend.go.set()
        loads.result(30)
        unloads.result(30)
        assert backend.loaded == {engine.adapters["two"].adapter.sha256}


def test_of_two_with_one_name_the_second_leaves_nothing(make_adapter: Callable[..., Path]) -> None:
    backend = SlowBackend()
    with fake_engine(backend) as engine, ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(engine.load_adapter, "a", make_adapter(value=n)) for n in (1, 2)]
        _until(lambda: len(backend.loaded) == 2)
        backend.go.set()
        errors = [each.exception(5) for each in loads]
        assert sum(isinstance(error, AdapterError) for error in errors) == 1
        assert backend.loaded == {engine.adapters["a"].adapter.sha256}


def test_a_config_and_options_exclude_each_other() -> None:
    with pytest.raises(ConfigError):
        ChatEngine(EngineConfig(), template="chatml")


def test_an_unknown_engine_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean `device`"):
        ChatEngine("x", devise="cpu")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a:b", ".hidden", "x" * 65, "a b"])
def test_adapter_names_are_safe_everywhere(name: str) -> None:
    with pytest.raises(UsageError, match="can't name an adapter"):
        fake_engine(adapters={name: "somewhere"})


def _until(condition: Any, seconds: float = 30.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "the condition never came true"
        sleep(0.001)
