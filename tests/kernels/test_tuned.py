"""What `qlorachat tune` keeps is there again, for its card alone; a damaged file is said."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qlorachat.errors import ConfigError
from qlorachat.kernels import tuned

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the cache, and the name of a card, which only a driver could tell."""
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 3060 (12 GB)")
    tuned._read.cache_clear()
    return tmp_path


def test_what_is_kept_is_found() -> None:
    assert tuned.tuned_blocks(8, (4096, 4096), CARD) is None
    tuned.keep({(8, (4096, 4096)): 28}, CARD)
    path = tuned.keep({(16, (4096, 4096)): 56}, CARD)
    assert path.name.startswith("NVIDIA-Test-3060-12-GB-")
    assert tuned.tuned_blocks(8, (4096, 4096), CARD) == 28
    assert tuned.tuned_blocks(16, (4096, 4096), CARD) == 56
    assert tuned.tuned_blocks(8, (4096, 11008), CARD) is None


def test_what_others_keep_meanwhile_stays() -> None:
    path = tuned.keep({(8, (16, 64)): 28}, CARD)
    assert tuned.tuned_blocks(8, (16, 64), CARD) == 28
    path.write_text(path.read_text(encoding="utf-8").replace("28", "29"), encoding="utf-8")
    tuned.keep({(16, (16, 64)): 56}, CARD)
    assert tuned.tuned_blocks(8, (16, 64), CARD) == 29


def test_many_may_keep_at_once() -> None:
    def keep(rows: int) -> None:
        tuned.keep({(rows, (16, 64)): rows}, CARD)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep, range(1, 33)))
    assert all(tuned.tuned_blocks(rows, (16, 64), CARD) == rows for rows in range(1, 33))


def test_without_a_folder_for_the_cache_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORACHAT_CACHE", "~nosuchuser/cache")
    assert tuned.tuned_blocks(8, (16, 64), CARD) is None
    with pytest.raises(ConfigError, match="there is no such home folder"):
        tuned.keep({(8, (16, 64)): 28}, CARD)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 0}', '{"a": true}', '{"a": "8"}'])
def test_a_damaged_file_is_said_and_left_out(text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.keep({(8, (16, 64)): 28}, CARD)
    path.write_text(text, encoding="utf-8")
    tuned._read.cache_clear()
    assert tuned.tuned_blocks(8, (16, 64), CARD) is None
    assert "run `qlorachat tune` again" in caplog.text
