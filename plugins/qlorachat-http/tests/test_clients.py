"""OpenAI's own client, sync, async and streaming, finds what it knows."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from qlorachat.errors import QueueFull
from qlorachat.testing import FakeBackend
from qlorachat.tokens import TokenEvent, TokenRequest

Serve = Callable[..., str]

TEXT = "こんにちは。The answer is 42."
QUESTION = ChatCompletionUserMessageParam(role="user", content=TEXT)


class TellingBackend(FakeBackend):
    """Reports a log-probability for every token, minus infinity for the second likeliest."""

    def submit(self, request: TokenRequest, sink: Callable[[TokenEvent], None]) -> None:
        def tell(event: TokenEvent) -> None:
            token = event.token_id
            top = () if token is None else ((token, -0.5), (65, float("-inf")))
            sink(replace(event, logprob=-0.5, top=top[: request.sampling.logprobs]))

        super().submit(request, sink if request.sampling.logprobs is None else tell)


class CountingBackend(FakeBackend):
    """Refuses the first requests as a full queue does, and remembers what was asked."""

    def __init__(self, refusals: int = 0) -> None:
        super().__init__()
        self.refusals = refusals
        self.requests: list[TokenRequest] = []

    def submit(self, request: TokenRequest, sink: Callable[[TokenEvent], None]) -> None:
        self.requests.append(request)
        if len(self.requests) <= self.refusals:
            raise QueueFull("64 requests are waiting already; try again.")
        super().submit(request, sink)


def connected(url: str, **options: Any) -> openai.OpenAI:
    options.setdefault("api_key", "none")
    return openai.OpenAI(base_url=f"{url}/v1", **options)


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with connected(url, max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=[QUESTION])
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "fake"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(TEXT.encode()) + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake",
            messages=[QUESTION],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_async_client_streams_side_by_side(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, text: str) -> str:
        message = ChatCompletionUserMessageParam(role="user", content=text)
        stream = await client.chat.completions.create(model="fake", messages=[message], stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, f"質問{i}") for i in range(8)))

    assert asyncio.run(main()) == [f"質問{i}" for i in range(8)]


def test_text_completion(client: openai.OpenAI, serve: Serve) -> None:
    reply = client.completions.create(model="fake", prompt="abc")
    assert reply.object == "text_completion"
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("abc", "stop")
    chunks = client.completions.create(model="fake", prompt="abc", stream=True)
    texts = [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks]
    assert texts == [("a", None), ("b", None), ("c", None), ("", "stop")]


def test_several_prompts_and_answers(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake", prompt=["ab", "cde"], n=2)
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "cde", "cde"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 5
    assert reply.usage.completion_tokens == 3 + 3 + 4 + 4


def test_n_answers_have_seeds_of_their_own(serve: Serve) -> None:
    backend = CountingBackend()
    with connected(serve(backend)) as client:
        chunks = client.chat.completions.create(
            model="fake", messages=[QUESTION], n=3, seed=7, stream=True
        )
        texts = ["", "", ""]
        ends = []
        for chunk in chunks:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [TEXT] * 3
    assert ends == ["stop"] * 3
    assert [request.sampling.seed for request in backend.requests] == [7, 8, 9]


def test_every_parameter_reaches_the_engine(serve: Serve) -> None:
    backend = CountingBackend()
    with connected(serve(backend)) as client:
        client.chat.completions.create(
            model="fake",
            messages=[QUESTION],
            max_completion_tokens=9,
            max_tokens=5,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"65": 3},
            seed=3,
            logprobs=True,
            top_logprobs=2,
            stop=["zzz"],
            extra_body={"top_k": 4, "min_p": 0.125, "repetition_penalty": 1.5, "adapter_scale": 2},
        )
    sampling = backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.25)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.125, 1.5)
    assert (sampling.logit_bias, sampling.seed, sampling.logprobs) == ({65: 3.0}, 3, 2)
    assert backend.requests[0].adapter_scale == 2


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"stop": "answer"}, "こんにちは。The ", "stop"),
        ({"stop": ["x", "T"]}, "こんにちは。", "stop"),
        ({"max_tokens": 6}, "こん", "length"),
        ({"max_tokens": len(TEXT.encode()) + 1}, TEXT, "stop"),
    ],
)
def test_finish_reason_is_the_real_one(
    client: openai.OpenAI, options: dict[str, Any], text: str, reason: str
) -> None:
    reply = client.chat.completions.create(model="fake", messages=[QUESTION], **options)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text, reason)


def test_chat_logprobs(serve: Serve) -> None:
    with connected(serve(TellingBackend(lambda request, prompt: "aあ"))) as client:
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
        whole = client.chat.completions.create(model="fake", messages=[QUESTION], **options)
        chunks = list(
            client.chat.completions.create(
                model="fake", messages=[QUESTION], stream=True, **options
            )
        )
    assert whole.choices[0].logprobs is not None
    tokens = whole.choices[0].logprobs.content or []
    assert [token.bytes for token in tokens] == [[97], None, None, None]
    assert [token.logprob for token in tokens] == [-0.5] * 4
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [
        ("a", -0.5),
        ("A", -9999.0),
    ]
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_legacy_logprobs(serve: Serve) -> None:
    with connected(serve(TellingBackend(lambda request, prompt: "abc"))) as client:
        whole = client.completions.create(model="fake", prompt="x", logprobs=1)
        chunks = list(client.completions.create(model="fake", prompt="x", logprobs=1, stream=True))
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}]
    assert logprobs.text_offset == [0, 1, 2]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [part.text_offset for part in parts if part is not None] == [[0], [1], [2]]


def test_models(client: openai.OpenAI) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == ["fake"]
    card = client.models.retrieve("fake")
    assert card.owned_by == "qlorachat"
    assert card.model_extra == {"root": "fake", "parent": None, "max_model_len": 4096}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_unknown_model_is_404_and_never_the_base(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="zundamon", messages=[QUESTION])
    assert caught.value.body == {
        "message": "The model `zundamon` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_too_long_a_prompt_is_400_with_both_counts_before_the_stream(
    client: openai.OpenAI,
) -> None:
    long = ChatCompletionUserMessageParam(role="user", content="a" * 5000)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=[long], stream=True)
    assert isinstance(caught.value.body, dict)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert caught.value.body["n_prompt_tokens"] == 5019  # with ChatML's words and newlines
    assert caught.value.body["n_ctx"] == 4096
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="a" * 5000)
    assert caught.value.param == "prompt"


def test_dropped_turns_are_reported(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": role, "content": "x" * 1900} for role in ("user", "assistant") * 2]
    reply = client.chat.completions.create(
        model="fake",
        messages=[*turns, QUESTION],
        extra_body={"drop_oldest_turns": True, "max_tokens": 50},
    )
    assert reply.choices[0].message.content == TEXT
    assert reply.usage is not None
    assert reply.usage.model_extra is not None
    assert reply.usage.model_extra["prompt_tokens_dropped"] > 3800
    assert reply.usage.model_extra["dropped_messages"] == [0, 1]


def test_full_queue_is_429_and_the_client_comes_again(serve: Serve) -> None:
    backend = CountingBackend(refusals=1)
    url = serve(backend)
    with connected(url, max_retries=0) as client, pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="fake", messages=[QUESTION])
    assert caught.value.code == "overloaded"
    assert caught.value.type == "rate_limit_error"
    assert caught.value.response.headers["retry-after"] == "1"
    backend.refusals = 2
    with connected(url, max_retries=2) as client:
        reply = client.chat.completions.create(model="fake", messages=[QUESTION])
    assert reply.choices[0].message.content == TEXT
    assert len(backend.requests) == 3


def test_a_queue_too_short_for_n_keeps_none_of_them(
    serve: Serve, eventually: Callable[[Callable[[], bool]], None]
) -> None:
    backend = FakeBackend(delay=0.05, max_queue=2)
    with (
        connected(serve(backend), max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(model="fake", messages=[QUESTION], n=3)
    eventually(lambda: backend.running == 0)


def test_parts_of_text_are_joined(client: openai.OpenAI) -> None:
    parts: list[Any] = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    reply = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": parts}]
    )
    assert reply.choices[0].message.content == "abc"


def test_request_id_comes_back(client: openai.OpenAI) -> None:
    def sent(request_id: str) -> str:
        raw = client.models.with_raw_response.list(extra_headers={"x-request-id": request_id})
        return raw.headers["x-request-id"]

    assert sent("my-id_1.2") == "my-id_1.2"
    for bad in ("a b", "x" * 129, "a\tb", "<script>"):
        assert len(sent(bad)) == 32
