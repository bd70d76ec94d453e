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
            folder.begin(TrainConfig(), {}, overwrite=False)
    assert not folder.checkpoints.exists()
    folder.check_free(TrainConfig(), overwrite=False)
    folder.begin(TrainConfig(rank=3), {}, overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folder.begin(TrainConfig(rank=5), {}, overwrite=True)
    assert folder.resumed(TrainConfig())[0].rank == 3
    folder.begin(TrainConfig(rank=5), {}, overwrite=True)
    assert folder.resumed(TrainConfig())[0].rank == 5


def test_a_run_that_was_half_way_out_of_another_comes_back(folder: RunFolder) -> None:
    folder.begin(TrainConfig(rank=3), {}, overwrite=False)
    aside = folder.output / "checkpoints.tmp-abcdefgh"
    aside.mkdir()
    folder.checkpoints.rename(aside / "checkpoints")
    assert folder.resumed(TrainConfig())[0].rank == 3
    assert not aside.exists()


def test_nothing_to_resume(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="no unfinished run"):
        folder.resumed(TrainConfig())


def test_what_may_change_when_a_run_goes_on(folder: RunFolder) -> None:
    begun = TrainConfig(micro_batch=4, accumulation=2, chat_tokens=64, revision="main")
    folder.begin(begun, {"revision": "abcd"}, overwrite=False)
    free = TrainConfig(chat_tokens=0, chat_steps=7, save_steps=8, chat_prompts="other.txt")
    config, _ = folder.resumed(free)
    assert (config.chat_tokens, config.chat_steps, config.save_steps) == (0, 7, 8)
    assert config.revision == "abcd"  # the one that "main" was
    config, _ = folder.resumed(TrainConfig(micro_batch=1, accumulation=8, revision="main"))
    assert (config.micro_batch, config.accumulation) == (1, 8)
    with pytest.raises(ConfigError, match="begun with micro_batch = 4, not 1"):
        folder.resumed(TrainConfig(micro_batch=1))


def test_a_run_that_another_process_has(folder: RunFolder) -> None:
    folder.begin(TrainConfig(), {}, overwrite=False)
    with folder.lock():
        with pytest.raises(ConfigError, match="going on in another process"):
            folder.lock()
        with pytest.raises(ConfigError, match="going on in another process"):
            folder.begin(TrainConfig(), {}, overwrite=True)
    with folder.lock():
        pass
