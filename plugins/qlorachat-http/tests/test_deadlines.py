"""Peers that send or read too slowly, or too much, are cut off; others notice nothing."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorachat.testing import FakeBackend

Serve = Callable[..., str]
Connect = Callable[[str], socket.socket]
RawPost = Callable[..., bytes]
Eventually = Callable[[Callable[[], bool]], None]

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes; the connection's timeout is an error."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.fixture(scope="module")
def hasty(serve: Serve) -> str:
    """A server that waits a fraction of a second for headers and bodies."""
    return serve(None, head_seconds=0.3, body_seconds=0.3)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"GET /health HTTP/1.1\r\nHost: local",
        HEAD + b"Content-Length: 10\r\n\r\n",
        HEAD + b'Content-Length: 10\r\n\r\n{"a"',
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc",
    ],
    ids=lambda sent: repr(sent[-20:]),
)
def test_a_request_that_stops_is_cut_off(hasty: str, connect: Connect, sent: bytes) -> None:
    connection = connect(hasty)
    connection.sendall(sent)
    assert received(connection) == b""


@pytest.mark.parametrize(
    "start", [b"GET /health HTTP/1.1\r\nX: ", HEAD + b"Content-Length: 999\r\n\r\n"]
)
def test_trickling_bytes_win_no_time(hasty: str, connect: Connect, start: bytes) -> None:
    connection = connect(hasty)
    connection.sendall(start)
    pause = threading.Event()
    sent = 0
    with suppress(OSError):
        for _ in range(100):  # ten seconds, were it let
            connection.sendall(b"x")
            sent += 1
            pause.wait(0.1)
    assert sent < 20


def test_an_idle_connection_is_closed_after_its_answer(serve: Serve, connect: Connect) -> None:
    connection = connect(serve(None, head_seconds=2))
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert received(connection).startswith(b"HTTP/1.1 200")


def test_a_kept_connection_serves_on(serve: Serve, connect: Connect) -> None:
    connection = connect(serve(None, head_seconds=3))
    pause = threading.Event()
    for _ in range(5):  # longer than one deadline together
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            part = connection.recv(65536)
            assert part, "the connection was closed"
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        pause.wait(0.8)


def test_a_long_answer_is_not_cut_off(
    serve: Serve, http: httpx.Client, body: dict[str, Any]
) -> None:
    backend = FakeBackend(lambda request, prompt: "slow", delay=0.6)
    address = serve(backend, head_seconds=1.5, body_seconds=1.5, stall_seconds=1.5)
    for stream in (False, True):
        response = http.post(address + "/v1/chat/completions", json=body | {"stream": stream})
        assert response.text.endswith("[DONE]\n\n" if stream else "}")


def test_200_slow_peers_keep_nobody_out(serve: Serve, connect: Connect, http: httpx.Client) -> None:
    address = serve(None, head_seconds=600, body_seconds=600)
    for i in range(200):
        connect(address).sendall(HEAD + (b"Content-Length: 9\r\n\r\n{" if i % 2 else b"X: "))
    assert http.get(address + "/health").status_code == 200


@pytest.fixture
def narrow() -> Iterator[socket.socket]:
    """A connection to be, whose end takes little."""
    with socket.socket() as connection:
        connection.settimeout(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        yield connection


def test_a_reader_that_stops_reading_is_cut_off(
    serve: Serve,
    narrow: socket.socket,
    http: httpx.Client,
    raw_post: RawPost,
    eventually: Eventually,
    body: dict[str, Any],
) -> None:
    backend = FakeBackend(lambda request, prompt: "x" * 500_000, delay=1e-6, context_length=2**20)
    address = serve(backend, stall_seconds=1)
    parts = httpx.URL(address)
    narrow.connect((parts.host, parts.port))
    narrow.sendall(raw_post(body | {"stream": True, "max_tokens": 2**19}))
    eventually(lambda: backend.running == 1)
    other = http.post(address + "/v1/chat/completions", json=body | {"max_tokens": 1})
    assert other.status_code == 200
    eventually(lambda: backend.running == 0)


def test_a_slow_reader_is_not_cut_off(
    serve: Serve, narrow: socket.socket, raw_post: RawPost, body: dict[str, Any]
) -> None:
    backend = FakeBackend(lambda request, prompt: "x" * 2500, delay=1e-6, context_length=2**14)
    address = httpx.URL(serve(backend, stall_seconds=2))
    narrow.connect((address.host, address.port))
    narrow.sendall(raw_post(body | {"stream": True, "max_tokens": 3000}))
    pause = threading.Event()
    parts = []
    while part := narrow.recv(65536):
        parts.append(part)
        if b"[DONE]" in part:
            break
        pause.wait(0.03)
    assert b"".join(parts).count(b"chat.completion.chunk") == 2502


def test_a_body_over_the_limit_is_413_and_not_read_on(serve: Serve, connect: Connect) -> None:
    address = serve(None, max_body=1024)
    connection = connect(address)
    connection.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n" + b"x" * 100)
    assert received(connection).startswith(b"HTTP/1.1 413")
    connection = connect(address)
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n1\r\nx\r\n")
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"request_too_large"' in answer
    assert b"\r\nconnection: close\r\n" in answer


def test_a_large_body_gets_its_413_through(url: str) -> None:
    with httpx.Client(timeout=10) as client:
        response = client.post(
            url + "/v1/chat/completions",
            content=b"x" * 2**25,
            headers={"content-type": "application/json"},
        )
    assert response.status_code == 413


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"A" * 100_000,
    ],
    ids=lambda sent: repr(sent[-20:]),
)
def test_what_is_no_http_gets_an_error_in_shape(url: str, connect: Connect, sent: bytes) -> None:
    connection = connect(url)
    with suppress(OSError):
        connection.sendall(sent)
    answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'{"error":{"message":' in answer


def test_garbage_behind_a_request_harms_nothing(
    url: str, connect: Connect, http: httpx.Client, raw_post: RawPost, body: dict[str, Any]
) -> None:
    connection = connect(url)
    connection.sendall(raw_post(body) + b"\x00garbage\r\n\r\n")
    assert received(connection).count(b"HTTP/1.1 ") == 2
    assert http.get(url + "/health").status_code == 200


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    position=st.integers(0, 300),
    junk=st.binary(max_size=12) | st.sampled_from([b"\r\n", b"\x00", b": ", b"%00", b"../"]),
    cut=st.integers(0, 20),
)
def test_mutated_requests_break_nothing(
    hasty: str,
    http: httpx.Client,
    raw_post: RawPost,
    body: dict[str, Any],
    position: int,
    junk: bytes,
    cut: int,
) -> None:
    good = raw_post(body)
    sent = good[:position] + junk + good[position + cut :]
    parts = httpx.URL(hasty)
    with socket.create_connection((parts.host, parts.port or 80), 10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = received(connection)
    assert answer[:10] in (b"", b"HTTP/1.1 2", b"HTTP/1.1 4"), answer
    assert http.get(hasty + "/health").status_code == 200
