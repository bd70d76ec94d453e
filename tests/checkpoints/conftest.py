"""Small real checkpoints, made on the spot."""

from pathlib import Path

import pytest

from tests.tiny import write_folder


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny", layers=2)
