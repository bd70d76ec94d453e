"""A run's folder at every moment: a run that can be resumed, or one that can be begun."""

import os
from pathlib import Path

import pytest

from qlorachat.errors import ConfigError
from qlorachat.training.config import TrainConfig
from qlorachat.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_ends_as_it_begins(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(TrainConfig(), "data", overwrite=False)
    assert not folder.checkpoints.exists()
    folder.check_free(TrainConfig(), overwrite=False)
    folder.begin(TrainConfig(rank=3), "data", overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(TrainConfig(rank=5), "data", overwrite=True)
    assert folder.resumed(TrainConfig())[0].rank == 3
    folder.begin(TrainConfig(rank=5), "data", overwrite=True)
    assert folder.resumed(TrainConfig())[0].rank == 5


def test_a_run_that_was_half_way_out_of_another_comes_back(folder: RunFolder) -> None:
    folder.begin(TrainConfig(rank=3), "data", overwrite=False)
    aside = folder.output / "checkpoints.tmp-abcdefgh"
    aside.mkdir()
    folder.checkpoints.rename(aside / "checkpoints")
    assert folder.resumed(TrainConfig())[0].rank == 3
    assert not aside.exists()


def test_nothing_to_resume(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="no unfinished run"):
        folder.resumed(TrainConfig())
