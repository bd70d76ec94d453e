"""Who may call, with what: keys, hosts, origins, content types, sizes; and what the log holds."""

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from qlorachat.errors import ConfigError
from qlorachat.testing import FakeBackend, fake_engine
from qlorachat_http.app import create_app
from qlorachat_http.plugin import HttpFrontend, HttpOptions
from qlorachat_http.service import Service

Serve = Callable[..., str]
Locked = Callable[..., httpx.Response]

KEY = "sk-canary-5e1f"
ADMIN_KEY = "sk-admin-77aa"
CHAT = "/v1/chat/completions"


def bearer(key: str | bytes) -> dict[str, Any]:
    token = key.encode() if isinstance(key, str) else key
    return {"authorization": b"Bearer " + token}


@pytest.fixture(scope="module")
def locked(serve: Serve, http: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Locked:
    """`locked(method, path, **more)` asks a server with both keys."""
    root = tmp_path_factory.mktemp("adapters")
    address = serve(None, api_key=KEY, admin_key=ADMIN_KEY, adapter_root=root)
    return lambda method, path, **more: http.request(method, address + path, **more)


def refused(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


def test_every_route_but_health_needs_the_key(locked: Locked) -> None:
    with fake_engine() as engine:
        paths = all_paths(create_app(Service(engine, HttpOptions())))
    assert {"/health", "/v1/models", CHAT, "/v1/load_lora_adapter"} <= paths
    for path in paths | {"/docs", "/openapi.json", "/", "/v1", "/nothing"}:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            response = locked(method, path.replace("{name:path}", "fake"), json={})
            expected = {200, 405} if path == "/health" else {401}
            assert response.status_code in expected, (method, path)


def all_paths(app: Any) -> set[str]:
    paths: set[str] = set()
    waiting = list(app.routes)
    while waiting:
        route = waiting.pop()
        if isinstance(route, APIRoute):
            paths.add(route.path)
        waiting += getattr(getattr(route, "original_router", None), "routes", [])
    return paths


@pytest.mark.parametrize(
    "key", [KEY[:-1], KEY + "x", KEY.upper(), "鍵".encode(), b"\xff\xfe", b"x" * 4000]
)
def test_wrong_keys(locked: Locked, key: str | bytes) -> None:
    response = locked("GET", "/v1/models", headers=bearer(key))
    refused(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header", ["", KEY, f"Basic {KEY}", f"Bearer{KEY}", "Bearer", f"Token {KEY}"]
)
def test_wrong_schemes(locked: Locked, header: str) -> None:
    headers = {"authorization": header} if header else {}
    refused(locked("GET", "/v1/models", headers=headers), 401, "invalid_api_key")


def test_right_keys(locked: Locked) -> None:
    for key in (KEY, ADMIN_KEY):
        assert locked("GET", "/v1/models", headers=bearer(key)).status_code == 200
    assert (
        locked("GET", "/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    )


def test_the_api_key_changes_no_adapters(locked: Locked) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "a", "lora_path": "a"}
        refused(locked("POST", path, json=body, headers=bearer(KEY)), 401, "invalid_api_key")
        refused(
            locked("POST", path, json=body, headers=bearer(ADMIN_KEY)),
            404,
            "adapter_not_found"
            if path.endswith("load_lora_adapter") and "un" not in path
            else "model_not_found",
        )


def test_adapters_are_fixed_without_an_admin_key(http: httpx.Client, url: str) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "a", "lora_path": "a"}
        refused(http.post(url + path, json=body), 403, "adapters_fixed")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "10.0.0.1",
        "localhost@evil.example",
        "[::1",
        "::1:x:y",
        "0.0.0.0",
    ],
)
def test_foreign_hosts_on_loopback(http: httpx.Client, url: str, host: str) -> None:
    refused(http.get(url + "/health", headers={"host": host}), 403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:80"]
)
def test_own_hosts_on_loopback(http: httpx.Client, url: str, host: str) -> None:
    assert http.get(url + "/health", headers={"host": host}).status_code == 200


def test_beyond_loopback_any_host_is_taken_with_a_key(http: httpx.Client, serve: Serve) -> None:
    address = serve(None, host="0.0.0.0", api_key=KEY).replace("0.0.0.0", "127.0.0.1")
    headers = {"host": "my.example", **bearer(KEY)}
    assert http.get(address + "/v1/models", headers=headers).status_code == 200
    refused(
        http.get(address + "/v1/models", headers={"host": "my.example"}), 401, "invalid_api_key"
    )


def test_beyond_loopback_without_a_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match="set a key"):
        HttpFrontend().prepare(HttpOptions(host="0.0.0.0", port=0))


@pytest.mark.parametrize(
    "options",
    [
        {"admin_key": "x"},
        {"adapter_root": "."},
        {"admin_key": "x", "adapter_root": "/does/not/exist"},
        {"cors_origins": ["*"]},
    ],
    ids=str,
)
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HttpFrontend().prepare(HttpOptions.model_validate({"port": 0, **options}))


def test_keys_are_never_shown() -> None:
    options = HttpOptions.model_validate({"api_key": KEY, "admin_key": ADMIN_KEY})
    assert KEY not in repr(options) + str(options) + options.model_dump_json()


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1"]
)
def test_no_origin_is_let_in(
    http: httpx.Client, url: str, body: dict[str, Any], origin: str
) -> None:
    headers = {"origin": origin, "cookie": "a=b"}
    preflight = {"access-control-request-method": "POST", **headers}
    responses = [
        http.get(url + "/v1/models", headers=headers),
        http.post(url + CHAT, json=body, headers=headers),
        http.options(url + CHAT, headers=preflight),
    ]
    for response in responses:
        assert not any(name.startswith("access-control") for name in response.headers)
    assert responses[2].status_code == 405


def test_named_origins_are_let_in(http: httpx.Client, serve: Serve, body: dict[str, Any]) -> None:
    origin = "http://localhost:3000"
    address = serve(None, cors_origins=[origin], api_key=KEY)
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = http.options(address + CHAT, headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, origin)
    other = http.options(address + CHAT, headers=preflight | {"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    headers = {"origin": origin, **bearer(KEY)}
    reply = http.post(address + CHAT, json=body, headers=headers)
    assert reply.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None]
)
def test_what_a_page_may_send_unasked_is_415(
    http: httpx.Client, url: str, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = b'{"model": "fake", "messages": [{"role": "user", "content": "x"}]}'
    refused(http.post(url + CHAT, content=content, headers=headers), 415, "unsupported_media_type")


def test_json_with_a_charset_is_taken(http: httpx.Client, url: str) -> None:
    content = b'{"model": "fake", "messages": [{"role": "user", "content": "x"}]}'
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert http.post(url + CHAT, content=content, headers=headers).status_code == 200


def test_unknown_routes_and_methods_have_the_shape(http: httpx.Client, url: str) -> None:
    refused(http.get(url + "/v1/nothing"), 404, "not_found")
    refused(http.get(url + "/v1/models/"), 404, "model_not_found")
    refused(http.get(url + CHAT), 405, "method_not_allowed")
    refused(http.get(url + "/docs"), 404, "not_found")


def test_the_log_holds_no_key_prompt_or_reply(
    serve: Serve,
    http: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    body: dict[str, Any],
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    address = serve(FakeBackend(lambda request, prompt: "reply-canary"), api_key=KEY)
    canary = body | {"messages": [{"role": "user", "content": "prompt-canary"}]}
    errors = []
    for key in (KEY, "wrong-canary"):
        for fields in ({}, {"stream": True}, {"top_p": "x"}, {"model": "none"}, {"stop": 5}):
            response = http.post(address + CHAT, json=canary | fields, headers=bearer(key))
            errors += [response.text] if response.status_code >= 400 else []
    http.get(address + "/v1/models?key=query-canary")
    http.get(address + "/v1/%0D%0Aforged", headers={"x-forwarded-for": "canary"})

    def access() -> list[str]:
        return [it.getMessage() for it in caplog.records if it.name == "qlorachat.http"]

    eventually(lambda: any('"GET /v1/%0D%0Aforged" 401' in line for line in access()))
    assert len(access()) == 14  # the address, the fixture's first request, and these twelve
    assert all("\n" not in line for line in access())
    assert len(errors) == 8
    assert "canary" not in caplog.text + "".join(errors)


def test_a_bug_of_ours_is_500_in_shape_and_its_text_stays_out_of_the_log(
    serve: Serve, http: httpx.Client, caplog: pytest.LogCaptureFixture, body: dict[str, Any]
) -> None:
    engine = fake_engine()

    def broken(dialog: object, **options: object) -> None:
        raise RuntimeError(dialog)

    engine.astream = broken  # type: ignore[method-assign, assignment]
    address = serve(engine)
    canary = body | {"messages": [{"role": "user", "content": "canary"}]}
    response = http.post(address + CHAT, json=canary, headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "canary" not in response.text + caplog.text
    assert "abc failed with RuntimeError" in caplog.text
    assert "in broken" in caplog.text
