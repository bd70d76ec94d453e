"""Adapters over HTTP: chosen by model id, loaded below one root, unloaded again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from qlorachat.testing import FakeBackend, fake_engine
from qlorachat.tokens import TokenRequest
from qlorachat_http.adapters import adapter_folder
from qlorachat_http.errors import ApiError

Serve = Callable[..., str]
WriteAdapter = Callable[[Path, int], Path]

CHAT, LOAD, UNLOAD = "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
ADMIN = {"authorization": "Bearer admin"}


def which(request: TokenRequest, prompt: str) -> str:
    """An answer that tells which adapter was asked for."""
    return f"{(request.adapter or 'base')[:8]} at {request.adapter_scale:g}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_adapter: WriteAdapter) -> Path:
    """Good adapters, a damaged one, and links: one within, two that lead out."""
    outside = write_adapter(tmp_path_factory.mktemp("disk") / "outside", 3)
    folder = outside.parent / "adapters"
    write_adapter(folder / "kuma", 1)
    write_adapter(folder / "azarashi", 2)
    damaged = write_adapter(folder / "damaged", 4) / "adapter_model.safetensors"
    damaged.write_bytes(b"version https://git-lfs")
    (folder / "alias").symlink_to(folder / "kuma", target_is_directory=True)
    (folder / "escape").symlink_to(outside.parent, target_is_directory=True)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "holder").mkdir()
    (folder / "holder" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    return folder


@pytest.fixture(scope="module")
def address(serve: Serve, root: Path) -> str:
    """A server with the adapter `kuma`, which may load more from `root`."""
    return start(serve, root)


def start(serve: Serve, root: Path, **options: Any) -> str:
    backend = FakeBackend(which)
    backend.info = replace(backend.info, shapes={"model.layers.0.self_attn.q_proj": (8, 8)})
    engine = fake_engine(backend, adapters={"kuma": root / "kuma"})
    return serve(engine, admin_key="admin", adapter_root=root, **options)


@pytest.fixture
def ask(http: httpx.Client, body: dict[str, Any]) -> Callable[..., str]:
    def send(address: str, **fields: Any) -> str:
        response = http.post(address + CHAT, json=body | fields)
        if response.status_code != 200:
            return f"{response.status_code} {response.json()['error']['param']}"
        return str(response.json()["choices"][0]["message"]["content"])

    return send


def test_the_model_id_chooses(address: str, ask: Callable[..., str]) -> None:
    adapted = ask(address, model="kuma")
    assert not adapted.startswith("base")
    assert ask(address, model="fake") == "base at 1"
    assert ask(address, model="fake:kuma") == adapted
    for unknown in (
        "azarashi",
        "fake:azarashi",
        "fake:",
        ":kuma",
        "other:kuma",
        "__base__",
        "KUMA",
    ):
        assert ask(address, model=unknown) == "404 model"


def test_lora_chooses_and_scales(address: str, ask: Callable[..., str]) -> None:
    adapted = ask(address, model="kuma")
    half = adapted.replace("at 1", "at 0.5")
    assert ask(address, model="kuma", adapter_scale=0.5) == half
    assert ask(address, lora=[{"name": "kuma", "scale": 0.5}]) == half
    assert ask(address, lora=[{"id": "kuma"}]) == adapted
    assert ask(address, model="kuma", lora=[{"name": "kuma"}]) == adapted
    assert ask(address, lora=[]) == "base at 1"
    assert ask(address, lora=[{"name": "azarashi"}]) == "404 lora"
    assert ask(address, lora=[{"scale": 1}]) == "404 lora"
    assert ask(address, lora=[{"name": "kuma", "scale": 3}]) == "400 adapter_scale"


def test_a_default_adapter_stands_behind_the_bases_name(
    serve: Serve, root: Path, ask: Callable[..., str], http: httpx.Client
) -> None:
    address = start(serve, root, default_adapter="kuma")
    assert ask(address, model="fake") == ask(address, model="kuma") != "base at 1"
    assert ask(address, model="__base__") == "base at 1"
    cards = http.get(address + "/v1/models").json()["data"]
    assert [(it["id"], it["root"], it["parent"]) for it in cards] == [
        ("fake", "fake", None),
        ("__base__", "fake", None),
        ("kuma", "kuma", "fake"),
    ]


def test_cards_hold_no_path(address: str, root: Path, http: httpx.Client) -> None:
    text = http.get(address + "/v1/models").text
    assert str(root.parent) not in text
    assert [card["id"] for card in json.loads(text)["data"]] == ["fake", "kuma"]


def test_a_folder_as_base_is_named_without_its_path(
    serve: Serve, tmp_path: Path, http: httpx.Client
) -> None:
    (tmp_path / "llama").mkdir()
    address = serve(FakeBackend(name=str(tmp_path / "llama")))
    assert [card["id"] for card in http.get(address + "/v1/models").json()["data"]] == ["llama"]


def test_load_use_replace_unload(
    address: str, root: Path, http: httpx.Client, ask: Callable[..., str]
) -> None:
    def change(path: str, **fields: Any) -> httpx.Response:
        return http.post(address + path, json={"lora_name": "new", **fields}, headers=ADMIN)

    card = change(LOAD, lora_path="azarashi")
    assert (card.status_code, card.json()["id"], card.json()["parent"]) == (200, "new", "fake")
    first = ask(address, model="new")
    taken = change(LOAD, lora_path="kuma")
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "adapter_in_use")
    assert ask(address, model="new") == first
    assert change(LOAD, lora_path=str(root / "kuma"), load_inplace=True).status_code == 200
    assert ask(address, model="new") == ask(address, model="kuma") != first
    assert change(UNLOAD).json() == {"id": "new", "object": "model", "deleted": True}
    assert ask(address, model="new") == "404 model"
    again = change(UNLOAD)
    assert (again.status_code, again.json()["error"]["code"]) == (404, "model_not_found")
    assert not ask(address, model="kuma").startswith("base")


@pytest.mark.parametrize(
    "name", ["fake", "__base__", "a/b", "../x", ".x", "a:b", "", "x" * 65, "a\nb"]
)
def test_names_that_cannot_be(address: str, http: httpx.Client, name: str) -> None:
    asked = {"lora_name": name, "lora_path": "azarashi"}
    response = http.post(address + LOAD, json=asked, headers=ADMIN)
    assert response.status_code == 400


def test_a_damaged_adapter_is_400_with_its_reason(
    address: str, http: httpx.Client, ask: Callable[..., str]
) -> None:
    asked = {"lora_name": "new", "lora_path": "damaged"}
    response = http.post(address + LOAD, json=asked, headers=ADMIN)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_error")
    assert "adapter_model.safetensors" in response.json()["error"]["message"]
    assert ask(address, model="new") == "404 model"
    assert ask(address, model="fake") == "base at 1"


BAD_PATHS = [
    "..",
    "../outside",
    "kuma/../../outside",
    "kuma/..",
    "..\\outside",
    "C:\\Windows",
    "\\\\server\\share",
    "/etc",
    "/",
    "~",
    "~root",
    "kuma\0",
    "CON",
    "http://192.0.2.1/x",
    "file:///etc",
    "%2e%2e/outside",
    "．．/outside",
    "elsewhere",
    "x" * 1024,
    "escape",
    "escape/outside",
    "circle",
    "kuma/x",
    "holder",
    "kuma/adapter_config.json",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path[:20]))
def test_paths_that_lead_out_or_nowhere(address: str, http: httpx.Client, path: str) -> None:
    asked = {"lora_name": "new", "lora_path": path}
    response = http.post(address + LOAD, json=asked, headers=ADMIN)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == "lora_path"


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "kuma/../../outside", "..\\outside", "a\0b"]
)
def test_no_look_at_the_disk_for_what_leads_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    def look(*args: object, **options: object) -> None:
        raise AssertionError("a look at the disk")

    for name in ("resolve", "stat", "exists", "is_dir", "iterdir"):
        monkeypatch.setattr(Path, name, look)
    with pytest.raises(ApiError):
        adapter_folder(root, path)


def test_links_within_the_root_are_followed(root: Path) -> None:
    assert adapter_folder(root, "alias") == root / "kuma"
