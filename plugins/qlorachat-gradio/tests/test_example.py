"""examples/main.py as people run it: one box, Submit, and the answer of the real demo model."""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from qlorachat.config import DEMO_MODEL

pytestmark = pytest.mark.model

EXAMPLE = Path(__file__).parents[3] / "examples" / "main.py"


@contextmanager
def gradio(example: Path) -> Iterator[str]:
    """`gradio main.py` as a process of its own; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradio", example.name],
        cwd=example.parent,
        env=os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"},
        start_new_session=True,
    )
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}/"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the example ended with {process.returncode}")


@pytest.mark.browser
@pytest.mark.skipif(sys.platform == "win32", reason="ends the example by its process group")
def test_one_box_submit_and_the_answer(browser: Browser, tmp_path: Path) -> None:
    example = Path(shutil.copy(EXAMPLE, tmp_path))
    with gradio(example) as url, browser.new_page() as page:
        page.goto(url)
        expect(page.get_by_text("there is no folder")).to_be_visible()
        page.get_by_label("Question").fill("What is the capital of France?")
        page.get_by_role("button", name="Submit").click()
        answer = page.get_by_label("Answer")
        expect(answer).to_have_value(re.compile("Paris"), timeout=60_000)


def test_the_adapter_beside_it_is_used(tmp_path: Path, make_adapter: Callable[..., Path]) -> None:
    example = Path(shutil.copy(EXAMPLE, tmp_path))
    make_adapter("qlora-model", 576, 576, base=DEMO_MODEL)
    module = runpy.run_path(str(example))
    with module["engine"] as engine:
        assert list(engine.adapters) == ["qlora-model"]
        assert module["demo"].description.startswith(f"{DEMO_MODEL} with the adapter")
