"""Which checkpoints stay, and which one early stopping takes."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from qlorachat.adapters import AdapterCard
from qlorachat.adapters.folder import WEIGHTS
from qlorachat.training.history import Evaluation, History
from qlorachat.training.saves import SaveFailed, Saves, write_adapter


@pytest.fixture
def peft() -> PeftModel:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    assert isinstance(model, PeftModel)
    return model


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    return Saves(tmp_path, AdapterCard(), keep=1)


def judged(**losses: float) -> History:
    """A history with these losses, of step1=, step2=, …"""
    evaluations = [Evaluation(int(step[4:]), loss) for step, loss in losses.items()]
    return History(evaluations=evaluations)


def test_the_best_that_is_there_stays_and_is_taken(
    peft: PeftModel, saves: Saves, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves.save(1, peft, {}, judged(step1=5.0))
    history = judged(step1=5.0, step2=4.0, step3=6.0)  # step 2's checkpoint could not be written
    saves.save(3, peft, {}, history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003"]
    with caplog.at_level(logging.WARNING):
        assert saves.best(history).step == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the best checkpoint, of step 2, is damaged or was never written: the best that is there, "
        "of step 1, takes its place"
    ]


def test_weights_that_the_disk_does_not_take(peft: PeftModel, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()  # as a full disk, it fails within safetensors
    with pytest.raises(OSError, match="directory"):
        write_adapter(tmp_path, peft, torch.float32, AdapterCard())


def test_no_evaluation_with_a_checkpoint(saves: Saves) -> None:
    with pytest.raises(SaveFailed, match="No evaluation's checkpoint"):
        saves.best(judged(step1=5.0))


def test_a_copied_checkpoint_is_left_alone(peft: PeftModel, saves: Saves, tmp_path: Path) -> None:
    saves.save(1, peft, {}, History())
    copied = shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000009-backup")
    saves.save(2, peft, {}, History())
    newest = saves.newest()
    assert newest is not None
    assert newest.step == 2
    assert copied.exists()
