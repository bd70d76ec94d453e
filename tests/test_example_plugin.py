"""The example plugin, installed into a virtual environment of its own and used as people would."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "qlorachat-batch"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the plugin; our packages are visible in it."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=True)
    binaries = home / ("Scripts" if sys.platform == "win32" else "bin")
    python = binaries / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    ours = sysconfig.get_path("purelib")
    (Path(site.strip()) / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(python, *install, "--no-index", "--disable-pip-version-check", PLUGIN, cwd=home)
    return python


def test_the_plugin_is_listed(python: Path, tmp_path: Path) -> None:
    rows = json.loads(run(python, "-m", "qlorachat", "plugins", "--json", cwd=tmp_path))
    row = next(row for row in rows if row["name"] == "batch")
    assert row["frontends"] == ["batch"]
    assert row["error"] is None


def test_its_options_are_flags_with_help(python: Path, tmp_path: Path) -> None:
    command = ("-m", "qlorachat", "serve", "--frontend", "batch", "--help")
    text = run(python, *command, cwd=tmp_path)
    assert "--input" in text
    assert "one question a line" in text


def test_its_own_tests_pass(python: Path, tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):  # else the environment would prove nothing
        __import__("qlorachat_batch")
    run(python, "-m", "pytest", "-q", "-c", os.devnull, PLUGIN / "tests", cwd=tmp_path)


@pytest.mark.model
def test_it_answers_a_file_with_the_demo_model(python: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("What is the capital of France?\n")
    run(python, "-m", "qlorachat", "serve", "--frontend", "batch", cwd=tmp_path)
    (line,) = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Paris" in json.loads(line)["answer"]


def test_a_copyable_size() -> None:
    source = PLUGIN / "src" / "qlorachat_batch" / "__init__.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) < 100
