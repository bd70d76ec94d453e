"""Facts about the package as a whole: nothing unsafe in its source, nothing heavy at import."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import qlorachat

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("plugins/*/src/**/*.py")])
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "os.system",
    "os.popen",
    "os.fork",
    "marshal.loads",
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FLOORS = {
    "safetensors": "0.8.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "torch": "2.10",
    "jinja2": "3.1.6",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_does_nothing_unsafe(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = {module, *(alias.name for alias in node.names)}
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            for keyword in node.keywords:
                truth = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("shell", "trust_remote_code") and truth)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, qlorachat; print(sorted({'torch', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    assert sorted(qlorachat.__all__) == qlorachat.__all__
    for name in qlorachat.__all__:
        assert getattr(qlorachat, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qlorachat.no_such_name


def test_the_version_is_one() -> None:
    assert version("qlorachat") == qlorachat.__version__
    assert f"## {qlorachat.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_libraries_are_at_least_as_new_as_their_fixes(name: str, floor: str) -> None:
    assert Version(version(name)) >= Version(floor)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert all(Version(spec.version) >= Version(floor) for spec in required[name])
