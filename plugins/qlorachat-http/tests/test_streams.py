"""Streams to the byte: order, pings, errors; nothing lost among many; nothing runs for the gone."""

import json
import logging
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from qlorachat.errors import EngineError, OutOfMemory
from qlorachat.testing import FakeBackend
from qlorachat.tokens import FinishReason, TokenEvent, TokenRequest

Serve = Callable[..., str]
Connect = Callable[[str], socket.socket]
RawPost = Callable[..., bytes]
Eventually = Callable[[Callable[[], bool]], None]

CHAT = "/v1/chat/completions"
LONG = "長い答え。" * 40


class BreakingBackend(FakeBackend):
    """Ends a request with the given event in place of its third token."""

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(lambda request, prompt: "abcdef")
        self._event = event

    def submit(self, request: TokenRequest, sink: Callable[[TokenEvent], None]) -> None:
        seen: list[TokenEvent] = []

        def breaking(event: TokenEvent) -> None:
            seen.append(event)
            if len(seen) < 3:
                sink(event)
            elif len(seen) == 3:
                sink(TokenEvent(request.request_id, **self._event))

        super().submit(request, breaking)


class SilentBackend(FakeBackend):
    """Says nothing until told to."""

    def __init__(self) -> None:
        self.speak = threading.Event()

        def answer(request: TokenRequest, prompt: str) -> str:
            assert self.speak.wait(20)
            return "at last"

        super().__init__(answer)


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *parts, tail = response.text.split("\n\n")
    assert tail == ""
    return parts


def data(event: str) -> dict[str, Any]:
    assert event.startswith("data: ")
    assert "\n" not in event
    value: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return value


def test_order_of_events(url: str, http: httpx.Client, body: dict[str, Any]) -> None:
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    asked["messages"] = [{"role": "user", "content": "熊\n\n熊"}]
    response = http.post(url + CHAT, json=asked)
    *chunks, done = events(response)
    assert done == "data: [DONE]"
    assert "熊" in response.text  # not escaped
    heads = [{key: data(it)[key] for key in ("id", "created", "model", "object")} for it in chunks]
    assert heads == [heads[0]] * len(heads)
    choices = [data(chunk)["choices"] for chunk in chunks]
    assert choices[0][0]["delta"] == {"role": "assistant", "content": ""}
    assert [it[0]["delta"] for it in choices[1:-2]] == [{"content": c} for c in "熊\n\n熊"]
    assert choices[-2] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert choices[-1] == []
    assert [data(chunk)["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert data(chunks[-1])["usage"]["completion_tokens"] == 9


def test_usage_stays_out_of_a_stream_that_did_not_ask(
    url: str, http: httpx.Client, body: dict[str, Any]
) -> None:
    response = http.post(url + CHAT, json=body | {"stream": True})
    assert "usage" not in response.text


@pytest.mark.parametrize(
    ("event", "code", "kind"),
    [
        ({"error": EngineError("The card fell out.")}, "generation_failed", "server_error"),
        ({"error": OutOfMemory("No memory.")}, "out_of_memory", "unavailable_error"),
        ({"finish": FinishReason.ABORTED}, "generation_failed", "server_error"),
    ],
)
def test_a_failure_under_way_is_an_event_and_then_done(
    serve: Serve,
    http: httpx.Client,
    body: dict[str, Any],
    event: dict[str, Any],
    code: str,
    kind: str,
) -> None:
    address = serve(BreakingBackend(event))
    *chunks, error, done = events(http.post(address + CHAT, json=body | {"stream": True}))
    assert [data(chunk)["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "a", "b"]
    assert set(data(error)) == {"error"}
    assert (data(error)["error"]["code"], data(error)["error"]["type"]) == (code, kind)
    assert done == "data: [DONE]"
    whole = http.post(address + CHAT, json=body)
    assert whole.status_code == (503 if kind == "unavailable_error" else 500)
    assert whole.json()["error"]["code"] == code


def test_the_openai_client_raises_the_error_event(serve: Serve, body: dict[str, Any]) -> None:
    address = serve(BreakingBackend({"error": EngineError("The card fell out.")}))
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        stream = client.chat.completions.create(stream=True, **body)
        with pytest.raises(openai.APIError, match="The card fell out"):
            for _ in stream:
                pass


def test_silence_is_filled_with_pings(
    serve: Serve, http: httpx.Client, body: dict[str, Any]
) -> None:
    backend = SilentBackend()
    address = serve(backend, ping_seconds=0.05)
    with http.stream("POST", address + CHAT, json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        heard = [next(lines) for _ in range(8)]
        backend.speak.set()
        heard += list(lines)
    assert heard[2:8:2] == [": ping"] * 3
    assert heard[-2:] == ["data: [DONE]", ""]


def test_64_streams_lose_nothing(serve: Serve, body: dict[str, Any]) -> None:
    address = serve(FakeBackend(delay=0.001))
    texts = [f"{i}: " + "あいうえお漢字 text " * 7 + "。" for i in range(64)]  # 200 tokens each

    def ask(text: str) -> tuple[str, str]:
        asked = body | {"messages": [{"role": "user", "content": text}]}
        with httpx.Client(timeout=60) as client:
            chunks = events(client.post(address + CHAT, json=asked | {"stream": True}))
            whole = client.post(address + CHAT, json=asked).json()
        deltas = [data(chunk)["choices"][0]["delta"] for chunk in chunks[:-1]]
        streamed = "".join(delta.get("content", "") for delta in deltas)
        return streamed, whole["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, texts))
    assert answers == [(text, text) for text in texts]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_the_engine(
    serve: Serve,
    connect: Connect,
    raw_post: RawPost,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
    body: dict[str, Any],
    stream: bool,
    n: int,
) -> None:
    caplog.set_level(logging.INFO, "qlorachat.http")
    backend = FakeBackend(lambda request, prompt: LONG, delay=0.05)
    connection = connect(serve(backend))
    connection.sendall(raw_post(body | {"stream": stream, "n": n}))
    eventually(lambda: backend.running == n)
    if stream:
        connection.recv(100)
    connection.close()
    eventually(lambda: backend.running == 0)
    eventually(lambda: '"POST /v1/chat/completions" 499' in caplog.text)


def test_a_client_that_leaves_while_it_waits_frees_the_engine(
    serve: Serve, connect: Connect, raw_post: RawPost, eventually: Eventually, body: dict[str, Any]
) -> None:
    backend = SilentBackend()
    connection = connect(serve(backend))
    connection.sendall(raw_post(body))
    eventually(lambda: backend.running == 1)
    connection.close()
    backend.speak.set()
    eventually(lambda: backend.running == 0)


def test_200_leaving_clients_leave_nothing_behind(
    serve: Serve,
    connect: Connect,
    http: httpx.Client,
    raw_post: RawPost,
    eventually: Eventually,
    body: dict[str, Any],
) -> None:
    backend = FakeBackend(lambda request, prompt: LONG, delay=0.005)
    address = serve(backend)
    short = body | {"max_tokens": 3}
    assert http.post(address + CHAT, json=short).status_code == 200
    threads = threading.active_count()
    for i in range(200):
        connection = connect(address)
        connection.sendall(raw_post(body | {"stream": i % 2 == 0}))
        if i % 4 == 0:
            with suppress(OSError):
                connection.recv(1)
        connection.close()
    eventually(lambda: backend.running == 0)
    assert http.post(address + CHAT, json=short).json()["usage"]["completion_tokens"] == 3
    eventually(lambda: threading.active_count() <= threads + 8)  # asyncio's pool may have grown


def test_n_answers_arrive_side_by_side(
    serve: Serve, http: httpx.Client, body: dict[str, Any]
) -> None:
    address = serve(FakeBackend(delay=0.01))
    chunks = events(http.post(address + CHAT, json=body | {"stream": True, "n": 2}))[:-1]
    indexes = [data(chunk)["choices"][0]["index"] for chunk in chunks]
    assert sorted(indexes) == [0] * 7 + [1] * 7
    assert indexes[2:] != sorted(indexes[2:])
