"""A terminal made of a pipe and of text buffers, a folder of one's own, and an adapter on disk."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from safetensors.torch import save_file

from qlorachat_cli.plugin import CliOptions
from qlorachat_cli.terminal import Terminal


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts that the tests look for."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def options(tmp_path: Path) -> CliOptions:
    return CliOptions(folder=tmp_path / "chat")


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


@pytest.fixture
def terminal(keyboard: PipeInput) -> Terminal:
    """What a person would see stays in the consoles' files."""
    return Terminal(
        input=keyboard,
        output=DummyOutput(),
        answers=Console(file=StringIO(), width=80),
        notices=Console(file=StringIO(), width=80),
        errors=Console(file=StringIO(), width=80),
        is_terminal=True,
        can_redraw=False,
    )


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A PEFT folder for a model with one linear layer, `q_proj` of layer 0, 8 x 8."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "fake",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(2, 8),
        f"{prefix}.lora_B.weight": torch.ones(8, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
