"""The documents' code runs, their links lead somewhere, and they name every hook and option."""

import re
import subprocess
import sys
from inspect import getmembers, isfunction
from pathlib import Path

import pytest

from qlorachat import hookspecs
from qlorachat.cli.main import COMMANDS
from qlorachat.config import EngineConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md")]
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def blocks(language: str) -> list[tuple[str, str, str]]:
    """Every block of a language: where it stands, the word after the language, its code."""
    return [
        (f"{path.relative_to(ROOT).as_posix()}:{number}", word or "", code)
        for path in DOCUMENTS
        for number, (name, word, code) in enumerate(BLOCK.findall(path.read_text("utf-8")), 1)
        if name == language
    ]


@pytest.mark.model
@pytest.mark.parametrize(
    ("where", "word", "code"), [pytest.param(*block, id=block[0]) for block in blocks("python")]
)
def test_python_runs(where: str, word: str, code: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    compile(code, where, "exec")
    if word == "hub":
        pytest.skip("needs the hub and a card; compiled only")
    command = [sys.executable, "-X", "utf8", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout or "print" not in code


@pytest.mark.model
@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
@pytest.mark.parametrize(
    ("where", "code"),
    [pytest.param(where, code, id=where) for where, word, code in blocks("sh") if word == "run"],
)
def test_shell_runs(where: str, code: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(Path.home())}
    done = subprocess.run(
        ["sh", "-ec", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_hook_is_documented() -> None:
    text = (ROOT / "docs" / "writing-plugins.md").read_text("utf-8")
    hooks = {
        name
        for name, function in getmembers(hookspecs, isfunction)
        if function.__module__ == hookspecs.__name__
    }
    assert {name for name in hooks if f"`{name}(" not in text} == set()
    assert len(hooks) == 5


def test_the_quickstart_names_every_engine_option_and_the_readme_every_command() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    for name in EngineConfig.model_fields:
        assert name.replace("_", "-") in text or name in text, name
    everything = text + (ROOT / "README.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"qlorachat {name}" not in everything] == []
