"""Fixtures of the page's tests: the page served on a free port, and Chromium."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright
from safetensors.torch import save_file

from qlorachat import ChatEngine
from qlorachat.testing import fake_engine
from qlorachat_gradio.plugin import GradioFrontend, GradioOptions

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
MODULE = "model.layers.0.self_attn.q_proj"
PATIENCE = 30_000  # ms: a busy machine may stall for seconds
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


def pytest_configure(config: pytest.Config) -> None:
    """gradio 6.31 counts its events with pandas in ways that pandas 3 finds old."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:gradio.queueing")
    expect.set_options(timeout=PATIENCE)


@contextmanager
def served(engine: ChatEngine, **options: Any) -> Iterator[str]:
    """The page of an engine, as the host serves it; gives its address."""
    frontend, chosen, stop = GradioFrontend(), GradioOptions(port=0, **options), threading.Event()
    frontend.prepare(chosen)
    assert frontend.socket is not None
    port = frontend.socket.getsockname()[1]
    thread = threading.Thread(target=frontend.serve, args=(engine, chosen, stop))
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive(), "the page outlived its stop"


@pytest.fixture(scope="module")
def resident() -> Iterator[str]:
    """The address of one page that many tests ask."""
    with fake_engine() as engine, served(engine) as url:
        yield url


@pytest.fixture
def pages() -> Iterator[ExitStack]:
    """The pages that a test serves; closing it ends them."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(pages: ExitStack) -> Callable[..., str]:
    """`serve(engine, **options)` serves a page until the test ends, and gives its address."""
    return lambda engine, **options: pages.enter_context(served(engine, **options))


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(name, out_features, in_features)`: a LoRA that hardly changes a model."""

    def make(name: str, out_features: int, in_features: int, base: str = "fake") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        weights = {
            f"base_model.model.{MODULE}.lora_A.weight": torch.full((2, in_features), 1e-3),
            f"base_model.model.{MODULE}.lora_B.weight": torch.full((out_features, 2), 1e-3),
        }
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, locale)` is one visitor's tab, ready to type in."""
    with ExitStack() as stack:

        def open_tab(url: str, locale: str = "en-US", **options: Any) -> Page:
            context = stack.enter_context(browser.new_context(locale=locale, **options))
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(url)
            page.locator("#message textarea").wait_for()
            return page

        yield open_tab
