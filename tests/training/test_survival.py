"""What was saved stays, through kill -9, Ctrl-C and a full disk; a run then goes on unchanged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlorachat.adapters import AdapterCard, inspect_adapter
from qlorachat.training.saves import Saves

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

ROOT = Path(__file__).parents[2]
NURSERY = Path(__file__).with_name("nursery.py")


def settings(tiny: Path, rows: Path, output: Path, **others: object) -> dict[str, Any]:
    """A run of 30 steps that draws random numbers wherever a run may."""
    return {
        "model": str(tiny),
        "data": str(rows),
        "output": str(output),
        "device": "cpu",
        "template": "chatml",
        "rank": 4,
        "dropout": 0.1,
        "neftune": 5.0,
        "micro_batch": 2,
        "accumulation": 2,
        "max_length": 96,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "eval_steps": 5,
        "chat_steps": 6,
        "chat_tokens": 4,
        **others,
    }


def nurse(**asked: object) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, NURSERY],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def adapter(output: Path) -> tuple[bytes, bytes]:
    return (
        (output / "adapter_model.safetensors").read_bytes(),
        (output / "adapter_config.json").read_bytes(),
    )


def newest(output: Path) -> Any:
    return Saves(output / "checkpoints", AdapterCard(), keep=2).newest()


def leftovers(output: Path) -> list[Path]:
    return [path for path in output.rglob("*") if ".tmp-" in path.name]


@pytest.mark.timeout(600)
def test_twenty_kills_change_no_bit(tiny: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = nurse(settings=settings(tiny, rows, output), kills=20)
    assert told["codes"] == [0]
    assert sum(told["killed"]) >= 20
    losses = [step.loss for step in newest(output).history().steps]
    for index in range(len(told["killed"])):
        killed = tmp_path / f"run-{index}"
        assert adapter(killed) == adapter(output)
        assert [step.loss for step in newest(killed).history().steps] == losses
        assert leftovers(killed) == []


def test_ctrl_c_saves_and_says_how_to_go_on(tiny: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = nurse(settings=settings(tiny, rows, output), interrupt_after=0.3)
    assert told["codes"] == [3]
    assert f"qlorachat train --resume --output {output}" in Path(f"{output}.log").read_text("utf-8")
    assert "Stopping:" in Path(f"{output}.log").read_text("utf-8")
    assert newest(output) is not None
    assert "unfinished training, go on with" in str(inspect_adapter(output))
    assert not (output / "adapter_model.safetensors").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run = settings(tiny, rows, output)
    assert nurse(settings=run, interrupt_after=0.3)["codes"] == [3]
    good = newest(output)
    assert nurse(settings=run, resume=True, file_limit=60_000)["codes"] == [2]
    assert "could not be written" in Path(f"{output}.log").read_text("utf-8")
    assert leftovers(output) == []
    assert newest(output) == good
    assert not (output / "adapter_model.safetensors").exists()
    assert nurse(settings=run, resume=True)["codes"] == [0]


def test_a_damaged_checkpoint_is_passed_over(tiny: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert nurse(settings=settings(tiny, rows, output))["codes"] == [0]
    last = newest(output)
    weights = last.folder / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    assert newest(output).step < last.step
    assert load_file(newest(output).folder / "adapter_model.safetensors")
