"""The plugin as the host meets it: found, light, checked at once, ended by `stop`."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlorachat.errors import ConfigError
from qlorachat.plugins import create_manager
from qlorachat.testing import check_frontend
from qlorachat_cli.plugin import CliFrontend, CliOptions
from qlorachat_cli.terminal import Terminal


def test_it_is_found_by_its_entry_point() -> None:
    assert create_manager(load=["cli"]).frontend("cli").options is CliOptions


def test_it_keeps_the_contract_of_frontends(terminal: Terminal, options: CliOptions) -> None:
    check_frontend(CliFrontend(terminal), options)


def test_its_import_is_light() -> None:
    heavy = "{'prompt_toolkit', 'rich', 'torch', 'markdown_it', 'asyncio'}"
    code = f"import sys, qlorachat_cli.plugin; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"can't write to .*file.*another folder"):
        CliFrontend().prepare(CliOptions(folder=tmp_path / "file" / "chat"))


@pytest.mark.parametrize("history", [True, False])
def test_history_is_kept_only_when_asked(tmp_path: Path, history: bool) -> None:
    CliFrontend().prepare(CliOptions(folder=tmp_path, history=history))
    assert (tmp_path / "history").exists() is history
