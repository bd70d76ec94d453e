"""examples/main.py as people run it: one box, Submit, and the answer of the real demo model."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import save_file

from qlorachat.config import DEMO_MODEL

pytestmark = [
    pytest.mark.browser,
    pytest.mark.model,
    pytest.mark.skipif(sys.platform == "win32", reason="ends the example by its process group"),
]

EXAMPLE = Path(__file__).parents[3] / "examples" / "main.py"


@contextmanager
def running(*command: str) -> Iterator[str]:
    """The example as a process of its own; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    process = subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True)
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the example ended with {process.returncode}")


def write_adapter(folder: Path) -> None:
    """An adapter for the demo model that hardly changes it."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": DEMO_MODEL,
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{module}.lora_A.weight": torch.full((2, 576), 1e-3),
        f"{module}.lora_B.weight": torch.full((576, 2), 1e-3),
    }
    save_file(weights, folder / "adapter_model.safetensors")


def ask(page: Page, url: str) -> None:
    page.goto(url)
    page.get_by_label("Question").fill("What is the capital of France?")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_label("Answer")).to_have_value(
        "The capital of France is Paris.", timeout=60_000
    )


def test_the_adapter_beside_it_answers(browser: Browser, tmp_path: Path) -> None:
    example = Path(shutil.copy(EXAMPLE, tmp_path))
    write_adapter(tmp_path / "qlora-model")
    with running("-m", "gradio", str(example)) as url, browser.new_page() as page:
        ask(page, url)
        expect(page.get_by_text(f"{DEMO_MODEL} with the adapter")).to_be_visible()


def test_without_an_adapter_it_says_so(browser: Browser, tmp_path: Path) -> None:
    example = Path(shutil.copy(EXAMPLE, tmp_path))
    with running(str(example)) as url, browser.new_page() as page:
        ask(page, url)
        expect(page.get_by_text("The demo model without an adapter")).to_be_visible()
