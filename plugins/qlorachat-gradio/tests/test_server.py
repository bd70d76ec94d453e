"""The page as a server: its door, its routes, its end; Gradio's own client instead of people."""

import base64
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from gradio_client import Client  # type: ignore[import-untyped]
from pydantic import SecretStr

from qlorachat import RequestRecord, hookimpl
from qlorachat.errors import AddressError, ConfigError
from qlorachat.plugins import create_manager
from qlorachat.testing import FakeBackend, check_frontend, fake_engine
from qlorachat_gradio.plugin import GradioFrontend, GradioOptions

Serve = Callable[..., str]
MakeAdapter = Callable[..., Path]


def test_the_frontend_keeps_the_contract() -> None:
    check_frontend(GradioFrontend(), GradioOptions(port=0), seconds=30)


def test_the_host_finds_it_by_name() -> None:
    assert create_manager(load=["gradio"]).frontend("gradio").options is GradioOptions


def test_its_plugin_module_is_light() -> None:
    heavy = "{'gradio', 'torch', 'fastapi', 'uvicorn'} & set(sys.modules)"
    code = f"import sys, qlorachat_gradio.plugin; sys.exit(str({heavy} or '') or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_busy_port_is_found_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"gradio can't listen on 127.0.0.1:{port}"):
            GradioFrontend().prepare(GradioOptions(port=port))


def test_beyond_this_machine_it_wants_a_password() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        GradioFrontend().prepare(GradioOptions(host="0.0.0.0", port=0))


def test_it_shows_the_page_when_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    with fake_engine() as engine:
        url = serve(engine, open_browser=True)
        assert httpx.get(url).status_code == 200
        assert shown == [url]


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={__file__}",
        "gradio_api/file=pyproject.toml",
        "gradio_api/file/pyproject.toml",
        "gradio_api/file=http://127.0.0.1:9/",
        "gradio_api/proxy=http://127.0.0.1:9/",
        "static/../../../../pyproject.toml",
        "static/%2e%2e/%2e%2e/%2e%2e/pyproject.toml",
        "docs",
        "openapi.json",
        "gradio_api/runs",
    ],
)
def test_no_file_leaves_by_the_page(resident: str, path: str) -> None:
    assert httpx.get(resident + path).status_code in (403, 404)


def test_no_adapter_file_leaves_by_the_page(resident: str, make_adapter: MakeAdapter) -> None:
    path = f"gradio_api/file={make_adapter('mine', 4, 4) / 'adapter_config.json'}"
    assert httpx.get(resident + path).status_code in (403, 404)


def test_no_file_comes_in_by_the_page(resident: str) -> None:
    reply = httpx.post(resident + "gradio_api/upload", files={"files": b"x"})
    assert reply.status_code == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:7860", 200),
        ("127.0.0.1", 200),
        ("[::1]:7860", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:7860", 403),
        ("[", 403),
    ],
)
def test_on_loopback_only_its_own_names_answer(resident: str, host: str, status: int) -> None:
    assert httpx.get(resident, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1.evil.example", "http://[", ""]
)
def test_other_sites_are_refused(resident: str, origin: str) -> None:
    for method, path in [("GET", "config"), ("POST", "gradio_api/queue/join"), ("OPTIONS", "")]:
        reply = httpx.request(method, resident + path, headers={"Origin": origin}, json={})
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers


def test_its_own_page_is_not_another_site(resident: str) -> None:
    headers = {"Origin": resident.rstrip("/")}
    assert httpx.get(resident + "config", headers=headers).status_code == 200


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_every_route_asks_for_the_password(serve: Serve) -> None:
    strangers: list[dict[str, str]] = [
        {},
        basic("user", "wrong"),
        basic("user", "秘密"),
        basic("user", "秘密の言葉でも"),
        basic("other", "秘密の言葉"),
        {"Authorization": "Basic ###"},
        {"Authorization": "Basic"},
        {"Authorization": basic("user", "秘密の言葉")["Authorization"].replace("Basic", "Bearer")},
    ]
    with fake_engine() as engine:
        url = serve(engine, password=SecretStr("秘密の言葉"))
        for path in ["", "config", "theme.css", "static/x", "gradio_api/info", "gradio_api/upload"]:
            for headers in strangers:
                assert httpx.get(url + path, headers=headers).status_code == 401
        headers = basic("user", "秘密の言葉")
        assert httpx.get(url + "config", headers=headers).status_code == 200


def test_nothing_is_shared_recorded_or_reported(resident: str) -> None:
    config = httpx.get(resident + "config").json()
    assert config["analytics_enabled"] is False
    assert config["run_history"] is False
    assert config["footer_links"] == []


def test_gradios_own_client_chats(serve: Serve) -> None:
    with fake_engine() as engine:
        client = Client(serve(engine), verbose=False)
        _, chat, status, *_ = client.predict("hello", temperature=0.5, api_name="/chat")
        assert [turn["content"][0]["text"] for turn in chat] == ["hello", "hello"]
        assert "tokens/s" in status


def test_gradios_own_client_names_an_adapter(serve: Serve, make_adapter: MakeAdapter) -> None:
    records: list[RequestRecord] = []
    host = create_manager(load=())
    host.register(Observer(records), "observer")
    with fake_engine(plugins=host, adapters={"mine": make_adapter("mine", 4, 4)}) as engine:
        client = Client(serve(engine), verbose=False)
        client.predict("hello", adapter="mine", api_name="/chat")
        client.predict("hello", api_name="/chat")
    assert [record.adapter for record in records] == ["mine", None]


class Observer:
    """Keeps what is said of finished requests."""

    def __init__(self, records: list[RequestRecord]) -> None:
        self._records = records

    @hookimpl
    def request_finished(self, record: RequestRecord) -> None:
        self._records.append(record)


def test_a_full_context_can_forget_its_oldest_turns(serve: Serve) -> None:
    with fake_engine(FakeBackend(context_length=300)) as engine:
        client = Client(serve(engine), verbose=False)
        client.predict("a" * 90, drop_oldest=True, api_name="/chat")
        _, _, status, *_ = client.predict("b" * 90, drop_oldest=True, api_name="/chat")
        assert "The 2 oldest messages no longer fit" in status


def test_an_answer_cut_by_the_context_says_so(serve: Serve) -> None:
    with fake_engine(FakeBackend(context_length=150)) as engine:
        client = Client(serve(engine), verbose=False)
        _, _, status, *_ = client.predict("a" * 90, api_name="/chat")
        assert "the context of 150 tokens is full" in status
