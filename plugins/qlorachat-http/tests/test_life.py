"""From prepare to the end: the contract, options, health, a dead engine, and the last answers."""

import asyncio
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from qlorachat.cli.settings import EngineSettings, parse
from qlorachat.errors import AddressError, UnknownName
from qlorachat.plugins import create_manager
from qlorachat.testing import FakeBackend, check_frontend, fake_engine
from qlorachat_http.plugin import HttpFrontend, HttpOptions
from qlorachat_http.service import Service

Serve = Callable[..., str]
Eventually = Callable[[Callable[[], bool]], None]

CHAT = "/v1/chat/completions"


class Life:
    """A server whose end a test decides."""

    def __init__(self, backend: FakeBackend, **options: Any) -> None:
        self.engine = fake_engine(backend)
        self.frontend, chosen = HttpFrontend(), HttpOptions(port=0, **options)
        self.frontend.prepare(chosen)
        self.url = "http://{}:{}".format(*self.frontend.address)
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=self.frontend.serve, args=(self.engine, chosen, self.stop)
        )
        self.thread.start()
        self.answers: list[httpx.Response] = []

    def ask(self, body: dict[str, Any]) -> threading.Thread:
        """Ask in the background; the answer comes into `answers`."""

        def run() -> None:
            with httpx.Client(timeout=20) as client:
                self.answers.append(client.post(self.url + CHAT, json=body))

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def live() -> Iterator[Callable[..., Life]]:
    lives: list[Life] = []

    def start(backend: FakeBackend, **options: Any) -> Life:
        lives.append(Life(backend, **options))
        return lives[-1]

    yield start
    for life in lives:
        life.stop.set()
        life.thread.join(20)
        assert not life.thread.is_alive()
        life.engine.close()


def test_the_contract_of_frontends() -> None:
    check_frontend(HttpFrontend(), HttpOptions(port=0))


def test_the_entry_point() -> None:
    frontends = create_manager(load=["http"]).frontends()
    assert frontends["http"].options is HttpOptions


def test_origins_are_a_list_in_the_environment_and_in_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def origins(*flags: str) -> list[str]:
        settings: Any = parse(EngineSettings, flags, command="serve", frontends=[HttpFrontend()])
        return list(settings.http.cors_origins)

    monkeypatch.setenv("QLORACHAT_HTTP_CORS_ORIGINS", "http://localhost:3000,http://a.example")
    assert origins() == ["http://localhost:3000", "http://a.example"]
    flags = ["--cors-origins", "http://b.example", "--cors-origins", "http://c.example"]
    assert origins(*flags) == ["http://b.example", "http://c.example"]


@pytest.mark.parametrize("seconds", [math.inf, math.nan])
def test_seconds_are_finite(seconds: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        HttpOptions(drain_seconds=seconds)


def test_a_busy_port_is_found_before_the_model_loads(url: str) -> None:
    port = httpx.URL(url).port
    assert port is not None
    with pytest.raises(AddressError, match=f"http can't listen on 127.0.0.1:{port}"):
        HttpFrontend().prepare(HttpOptions(port=port))


def test_an_unknown_default_adapter_ends_it_at_once() -> None:
    options = HttpOptions(port=0, default_adapter="zundamon")
    frontend = HttpFrontend()
    frontend.prepare(options)
    with fake_engine() as engine, pytest.raises(UnknownName, match="`zundamon` does not exist"):
        frontend.serve(engine, options, threading.Event())


def test_health_and_a_dead_engine(
    live: Callable[..., Life],
    http: httpx.Client,
    body: dict[str, Any],
    eventually: Eventually,
) -> None:
    backend = FakeBackend(lambda request, prompt: "x" * 1000, delay=0.01)
    life = live(backend)
    assert http.get(life.url + "/health").json() == {"status": "ok"}
    waiting = [life.ask(body), life.ask(body | {"stream": True})]
    eventually(lambda: backend.running == 2)
    backend.fail("The card fell out.")
    health = http.get(life.url + "/health")
    assert (health.status_code, health.json()["error"]["type"]) == (503, "unavailable_error")
    for thread in waiting:
        thread.join(10)
    whole, stream = sorted(life.answers, key=lambda answer: answer.status_code, reverse=True)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "engine_dead")
    assert stream.text.endswith(
        'data: {"error":{"message":"The card fell out.","type":"unavailable_error","param":null,'
        '"code":"engine_dead"}}\n\ndata: [DONE]\n\n'
    )
    late = http.post(life.url + CHAT, json=body)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_dead")


def test_answers_under_way_are_finished_and_no_new_ones_begun(
    live: Callable[..., Life], body: dict[str, Any], eventually: Eventually
) -> None:
    backend = FakeBackend(lambda request, prompt: "x" * 60, delay=0.02)
    life = live(backend)
    waiting = [life.ask(body), life.ask(body | {"stream": True})]
    eventually(lambda: backend.running == 2)
    life.stop.set()
    with httpx.Client() as client:
        eventually(lambda: client.get(life.url + "/health").status_code == 503)
        refused = client.post(life.url + CHAT, json=body)
    assert refused.json()["error"]["code"] == "draining"
    for thread in waiting:
        thread.join(10)
    assert [answer.status_code for answer in life.answers] == [200, 200]
    for answer in life.answers:
        assert answer.text.count("x") >= 60
        assert "error" not in answer.text
    life.thread.join(5)
    assert not life.thread.is_alive()


def test_answers_too_long_to_wait_for_end_in_an_error(
    live: Callable[..., Life], body: dict[str, Any], eventually: Eventually
) -> None:
    backend = FakeBackend(lambda request, prompt: "x" * 4000, delay=0.02)
    life = live(backend, drain_seconds=0.2)
    waiting = [life.ask(body), life.ask(body | {"stream": True})]
    eventually(lambda: backend.running == 2)
    life.stop.set()
    for thread in waiting:
        thread.join(10)
    whole, stream = sorted(life.answers, key=lambda answer: answer.status_code, reverse=True)
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "draining")
    assert '"code":"draining"' in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    eventually(lambda: backend.running == 0)
    life.thread.join(5)
    assert not life.thread.is_alive()


def test_a_busy_loop_does_not_stretch_the_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    sleep = asyncio.sleep

    async def late(seconds: float) -> None:
        naps.append(seconds)
        time.sleep(0.05)  # noqa: ASYNC251  the loop is busy
        await sleep(seconds)

    async def drain() -> None:
        service.active = 1
        monkeypatch.setattr(asyncio, "sleep", late)
        await service.drain(0.1)

    monkeypatch.setattr("qlorachat_http.service.POLL_SECONDS", 0.01)
    with fake_engine() as engine:
        service = Service(engine, HttpOptions())
        asyncio.run(drain())
    assert len(naps) < 40  # of 110 in 1.1 s
    assert service.ending.is_set()


def test_silent_connections_do_not_hold_up_the_end(
    live: Callable[..., Life], body: dict[str, Any]
) -> None:
    life = live(FakeBackend())
    with httpx.Client() as client:
        assert client.get(life.url + "/health").status_code == 200
        life.stop.set()
        life.thread.join(5)
        assert not life.thread.is_alive()


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    code = "import sys, qlorachat_http.plugin; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"fastapi", "starlette", "uvicorn", "torch"} & set(result.stdout.split())
