"""The code in docs/http.md and README.md runs, and the docs name every option, field and code."""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlorachat.testing import FakeBackend, fake_engine
from qlorachat_http import schemas
from qlorachat_http.plugin import HttpOptions

Serve = Callable[..., str]

PLUGIN = Path(__file__).parents[1]
DOCS = PLUGIN.parents[1] / "docs" / "http.md"
ADDRESS = "http://127.0.0.1:8000"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"```{language}(?: \w+)?\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL
    )


@pytest.fixture(scope="module")
def address(
    serve: Serve,
    tmp_path_factory: pytest.TempPathFactory,
    write_adapter: Callable[[Path, int], Path],
) -> str:
    """A server as the docs have it, with an adapter to load."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "kuma", 1)
    backend = FakeBackend(lambda request, prompt: "Paris.", name=MODEL)
    backend.info = replace(backend.info, shapes={"model.layers.0.self_attn.q_proj": (8, 8)})
    return serve(fake_engine(backend), admin_key="ADMIN-KEY", adapter_root=root)


@pytest.mark.parametrize("path", [DOCS, PLUGIN / "README.md"], ids=lambda path: path.name)
def test_the_python_runs(address: str, capsys: pytest.CaptureFixture[str], path: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(path, "python"):
        exec(compile(block.replace(ADDRESS, address), path.name, "exec"), names)
    names["client"].close()
    assert "Paris." in capsys.readouterr().out


@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("sh")), reason="curl or sh is not installed"
)
def test_the_curl_runs(address: str) -> None:
    (commands,) = [block for block in blocks(DOCS, "sh") if block.startswith("curl")]
    result = subprocess.run(
        ["sh", "-c", commands.replace(ADDRESS, address)], capture_output=True, text=True, check=True
    )
    assert f'"id":"{MODEL}"' in result.stdout
    assert result.stdout.endswith("data: [DONE]\n\n")


def test_the_docs_name_everything() -> None:
    text = DOCS.read_text(encoding="utf-8")
    source = "".join(
        path.read_text(encoding="utf-8") for path in (PLUGIN / "src/qlorachat_http").glob("*.py")
    )
    codes = set(re.findall(r'code="(\w+)"', source)) - {"client_closed_request"}
    fields = {*schemas.ChatBody.model_fields, *schemas.CompletionBody.model_fields}
    named = {*codes, *fields, *HttpOptions.model_fields, "invalid_api_key", "out_of_memory"}
    assert not [name for name in named if f"`{name}" not in text]
