"""What a request may not say is 400 with `param` and a message, never a failure of the server."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Post = Callable[..., httpx.Response]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
INTEGERS = ("n", "max_tokens", "max_completion_tokens", "seed", "top_k", "top_logprobs")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "adapter_scale",
)
BAD = ("NaN", "Infinity", "-Infinity", "1e999", "true", '"5"', "[]", "{}", "-1e308", "1e308")
BAD_INTEGERS = (*BAD, "1.5", str(2**63), str(-(2**63) - 1), "9" * 5000)


@pytest.fixture(scope="module")
def post(http: httpx.Client, url: str) -> Post:
    def send(content: str | bytes, path: str = CHAT) -> httpx.Response:
        return http.post(url + path, content=content, headers=JSON)

    return send


def with_field(body: dict[str, Any], name: str, value: str) -> str:
    """The body as JSON with one more field, whose value is JSON (or nearly so) already."""
    return json.dumps(body | {"logprobs": True})[:-1] + f', "{name}": {value}}}'


def check_refused(response: httpx.Response, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert isinstance(error["message"], str)
    assert error["param"] == param
    return error


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", BAD_INTEGERS)
def test_bad_integers(post: Post, body: dict[str, Any], name: str, value: str) -> None:
    param = None if len(value) > 4300 else name  # Python reads no longer integer
    check_refused(post(with_field(body, name, value)), param)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", BAD)
def test_bad_numbers(post: Post, body: dict[str, Any], name: str, value: str) -> None:
    check_refused(post(with_field(body, name, value)), name)


@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_counts_start_at_one(post: Post, body: dict[str, Any], name: str, value: str) -> None:
    check_refused(post(with_field(body, name, value)), name)


@pytest.mark.parametrize(
    "field",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": None},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"model": ""},
        {"model": 5},
        {"model": "\ud800"},
        {"model": "m" * 300},
        {"stop": ""},
        {"stop": [""]},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": 5},
        {"stop": "\ud800"},
        {"stop": "s" * 300},
        {"n": 9},
        {"stream": "yes"},
        {"stream": 1},
        {"stream_options": True},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"258": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1_0": 1}},
        {"logit_bias": {"１": 1}},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": True}},
        {"logit_bias": {"\ud800": "x"}},
        {"logit_bias": []},
        {"top_logprobs": 21},
        {"lora": [{"name": "a"}, {"name": "b"}]},
        {"lora": "a"},
        {"drop_oldest_turns": "yes"},
    ],
    ids=lambda field: json.dumps(field)[:40],
)
def test_bad_fields(post: Post, body: dict[str, Any], field: dict[str, Any]) -> None:
    check_refused(post(json.dumps(body | field)), next(iter(field)))


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"audio": {"voice": "a"}},
        {"modalities": ["text", "audio"]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema"}},
        {"prediction": {}},
        {"web_search_options": {}},
    ],
    ids=json.dumps,
)
def test_unsupported_fields(post: Post, body: dict[str, Any], field: dict[str, Any]) -> None:
    error = check_refused(post(json.dumps(body | field)), next(iter(field)))
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_other_than_text_are_refused_and_not_fetched(
    post: Post, body: dict[str, Any], kind: str
) -> None:
    part = {"type": kind, kind: {"url": "http://192.0.2.1/x.png"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]
    error = check_refused(post(json.dumps(body | {"messages": messages})), "messages")
    assert error["code"] == "unsupported_parameter"


def test_what_asks_for_nothing_is_taken(post: Post, body: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "chat_id": "a front end's own",
        "features": {"web_search": False},
        "typical_p": 1,
        "temperature": None,
        "stop": None,
        "n": None,
        "stream": None,
    }
    reply = post(json.dumps(body | fields))
    assert reply.json()["choices"][0]["message"]["content"] == "hello"


def test_a_message_with_a_name_and_a_developer_is_taken(post: Post, body: dict[str, Any]) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hello", "name": "kuma"},
    ]
    reply = post(json.dumps(body | {"messages": messages}))
    assert reply.json()["choices"][0]["message"]["content"] == "hello"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("stops", "stop"), ("max_token", "max_tokens")],
)
def test_misspelt_fields_are_named(
    post: Post, body: dict[str, Any], wrong: str, right: str
) -> None:
    error = check_refused(post(json.dumps(body | {wrong: 1})), wrong)
    assert error["message"] == f"There is no parameter `{wrong}`; did you mean `{right}`?"
    assert error["code"] == "unknown_parameter"


def test_a_flood_of_unknown_fields_is_refused(post: Post, body: dict[str, Any]) -> None:
    check_refused(post(json.dumps(body | {f"field{i}": i for i in range(10_000)})))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"{",
        b'{"model": }',
        b"\xff\xfe\x00",
        b"[" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    ],
    ids=lambda content: repr(content[:12]),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_is_no_json_object(post: Post, content: bytes, path: str) -> None:
    error = check_refused(post(content, path))
    assert "model" not in error["message"]


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
    ids=str,
)
def test_bad_completions(post: Post, field: dict[str, Any], param: str) -> None:
    good = {"model": "fake", "prompt": "abc"}
    check_refused(post(json.dumps(good | field), COMPLETIONS), param)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([*INTEGERS, *NUMBERS, "model", "messages", "stop", "logit_bias", "lora"])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(fields=st.dictionaries(FIELDS | st.text(), JSON_VALUES, max_size=4))
def test_no_json_breaks_the_server(
    post: Post, body: dict[str, Any], fields: dict[str, Any]
) -> None:
    response = post(json.dumps(body | fields))
    assert response.status_code in (200, 400, 404), response.text
    assert response.status_code == 200 or set(response.json()["error"]) >= {"message", "code"}
