"""Real servers on free ports over real engines with a fake model, and raw connections to them."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from qlorachat.testing import FakeBackend, fake_engine
from qlorachat_http.plugin import HttpFrontend, HttpOptions

BODY = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}


@contextmanager
def running(engine: Any, options: dict[str, Any]) -> Iterator[str]:
    """The base URL of a server that ends with the block."""
    frontend, chosen = HttpFrontend(), HttpOptions(port=0, **options)
    frontend.prepare(chosen)
    stop = threading.Event()
    thread = threading.Thread(target=frontend.serve, args=(engine, chosen, stop))
    thread.start()
    try:
        url = "http://{}:{}".format(*frontend.address)
        # FastAPI mutes warnings while it builds an app; pytest's filters of the next test undo that
        httpx.get(url, timeout=20)
        yield url
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """`serve(backend_or_engine, **options)` -> the URL of a server that ends with the module."""
    with ExitStack() as stack:

        def start(served: Any = None, **options: Any) -> str:
            engine = served if hasattr(served, "astream") else fake_engine(served)
            stack.callback(engine.close)
            options.setdefault("drain_seconds", 0.5)
            return stack.enter_context(running(engine, options))

        yield start


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server whose model repeats the last user turn; one for all tests of a module."""
    with fake_engine(FakeBackend()) as engine, running(engine, {"drain_seconds": 0.5}) as address:
        yield address


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """A client for whole URLs; connections are kept."""
    with httpx.Client(timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def body() -> dict[str, Any]:
    """A good chat request for a fresh copy."""
    return BODY


@pytest.fixture
def connect() -> Iterator[Callable[[str], socket.socket]]:
    """`connect(url)` -> a raw connection that ends with the test."""
    with ExitStack() as stack:

        def start(url: str) -> socket.socket:
            parts = httpx.URL(url)
            connection = socket.create_connection((parts.host, parts.port or 80), 10)
            return stack.enter_context(connection)

        yield start


@pytest.fixture(scope="session")
def raw_post() -> Callable[..., bytes]:
    """`raw_post(body, path)` -> a whole request as bytes."""

    def build(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    return build


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool]], None]:
    """`eventually(condition)` waits for it, and fails after 30 s."""

    def wait(condition: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(3000):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError("it never came true")

    return wait


@pytest.fixture(scope="session")
def write_adapter() -> Callable[[Path, int], Path]:
    """`write_adapter(folder, seed)` -> a small LoRA on one layer of 8 to 8, as PEFT saves one."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "fake",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }

    def write(folder: Path, seed: int) -> Path:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        key = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{key}.lora_A.weight": torch.randn(2, 8),
            f"{key}.lora_B.weight": torch.randn(8, 2),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write
