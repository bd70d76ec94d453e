"""The hub's client against a small hub of our own: what comes, and one line for what does not."""

import json
import logging
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest

from qlorachat import hub
from qlorachat.checkpoints import locate
from qlorachat.checkpoints.demo import SAMPLING, SKIP_MODULES
from qlorachat.errors import HubError, ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w" * 100}


class SmallHub(BaseHTTPRequestHandler):
    """Serves `someone/model` and refuses the others, as the real hub's answers are documented."""

    protocol_version = "HTTP/1.1"
    refusals: ClassVar[dict[str, tuple[int, str]]] = {
        "someone/gated": (403, "GatedRepo"),
        "someone/missing": (404, "RepoNotFound"),
        "someone/denied": (429, ""),
        "someone/down": (503, ""),
    }
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        for repository, (status, code) in self.refusals.items():
            if path.startswith((f"/api/models/{repository}", f"/api/datasets/{repository}")):
                return self.answer(status, b"{}", {"X-Error-Code": code})
        if path.startswith("/api/models/someone/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in FILES.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        if path in ("/api/models/someone/model", "/api/models/someone/model/revision/main"):
            return self.answer(200, json.dumps({"id": "someone/model", "sha": COMMIT}).encode())
        if path.startswith("/api/models/someone/model/revision/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        name = path.rpartition("/")[2]
        if name not in FILES:
            return self.answer(404, b"{}")
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, FILES[name], headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_TIMEOUT", 1.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that were asked of a hub on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SmallHub) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        point_to(monkeypatch, server.server_port)
        SmallHub.asked.clear()
        yield SmallHub.asked
        server.shutdown()


def point_to(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{port}{template}",
    )


def download(
    repository: str = "someone/model",
    *,
    revision: str | None = None,
    offline: bool = False,
    patterns: tuple[str, ...] = ("*.json",),
) -> Path:
    return hub.download(repository, revision=revision, offline=offline, patterns=patterns)


def test_what_matches_comes_and_is_there_offline(
    small_hub: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = download()
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert folder.name == COMMIT
    assert capfd.readouterr() == ("", "")
    small_hub.clear()
    assert download(offline=True) == folder
    with pytest.raises(HubError, match="is not fully on disk and the hub is not asked"):
        download(offline=True, patterns=("*.json", "*.safetensors"))
    assert small_hub == []
    assert len(list(download(patterns=("*",)).iterdir())) == 2


@pytest.mark.parametrize(
    ("repository", "revision", "message"),
    [
        ("someone/gated", None, "is gated: accept its licence .* `hf auth login` or set HF_TOKEN"),
        ("someone/missing", None, "no folder `someone/missing` here and no such repository"),
        ("someone/model", "v9", "has no revision `v9`: give one of its branches"),
        ("someone/denied", None, r"refused `someone/denied` \(status 429\)"),
        ("someone/down", None, r"cannot be reached \(it answers 503\) and `someone/down` is not"),
        ("some one/model", None, "is neither a folder here nor a repository id"),
    ],
)
def test_a_refusal_is_one_line(
    small_hub: list[str], repository: str, revision: str | None, message: str
) -> None:
    with pytest.raises(HubError, match=message) as caught:
        download(repository, revision=revision)
    assert "\n" not in str(caught.value)


def test_a_data_set_is_asked_for_as_one(small_hub: list[str]) -> None:
    with pytest.raises(HubError, match="no such repository on the hub"):
        hub.why_unreachable("someone/missing", dataset=True)
    assert hub.why_unreachable("someone/down", dataset=True) == "it answers 503"
    assert all(path.startswith("/api/datasets/") for path in small_hub)


def test_a_hub_that_refuses_connections_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, port=1)
    with pytest.raises(HubError, match=r"cannot be reached \(.*\) and .*or give a local folder"):
        download()


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, silent.getsockname()[1])
        with pytest.raises(HubError, match="cannot be reached"):
            download()


def test_what_is_on_disk_serves_while_the_hub_is_away(
    small_hub: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = download()
    point_to(monkeypatch, port=1)
    with caplog.at_level(logging.WARNING):
        assert download() == folder
    assert "The model hub cannot be reached" in caplog.text


def test_hf_hub_offline_asks_nothing(small_hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"the hub is not asked \(--offline or HF_HUB_OFFLINE\)"):
        download()
    assert small_hub == []


def test_the_demo_model_from_the_hub_has_its_own_settings(
    small_hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlorachat.checkpoints.checkpoint.DEMO_MODEL", "someone/model")
    monkeypatch.setattr("qlorachat.checkpoints.checkpoint.find_gguf", lambda: None)
    checkpoint = locate("demo", weights=False)
    assert checkpoint.revision == COMMIT
    assert checkpoint.generation.temperature == SAMPLING["temperature"]
    assert checkpoint.recipe.skip_modules == SKIP_MODULES


def test_locate_brings_texts_alone_unless_weights_are_wanted(small_hub: list[str]) -> None:
    checkpoint = locate("someone/model", weights=False)
    assert (checkpoint.name, checkpoint.revision) == ("someone/model", COMMIT)
    assert [file.name for file in checkpoint.folder.iterdir()] == ["config.json"]
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        locate("someone/model")
