"""Folders and files appear whole, under their name, with the process's own permissions."""

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qlorachat.durable import UNFINISHED, sweep, whole_folder, write_whole


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("text")
        assert "made" not in _names(tmp_path)
    assert _names(tmp_path) == {"made"}
    assert (tmp_path / "made" / "file").read_text() == "text"


def test_an_error_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with suppress(RuntimeError), whole_folder(tmp_path / "made", replace=True) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert _names(tmp_path) == {"made"}
    assert _names(tmp_path / "made") == {"old"}


def test_a_folder_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with whole_folder(tmp_path / "made", replace=True) as folder:
        (folder / "new").touch()
    assert _names(tmp_path / "made") == {"new"}
    assert _names(tmp_path) == {"made"}


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "一\n")
    write_whole(tmp_path / "file", "二\n")
    assert (tmp_path / "file").read_bytes() == "二\n".encode()
    assert _names(tmp_path) == {"file"}


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of a POSIX file system")
def test_permissions_are_the_process_own(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "made") as folder:
            (folder / "file").touch(mode=0o600)
        write_whole(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("made", "made/file", "text")]
    assert modes == [0o750, 0o640, 0o640]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    (tmp_path / f"one{UNFINISHED}abc").mkdir()
    (tmp_path / f"two{UNFINISHED}abc").touch()
    (tmp_path / "kept").touch()
    sweep(tmp_path, "one")
    assert _names(tmp_path) == {f"two{UNFINISHED}abc", "kept"}
    sweep(tmp_path)
    assert _names(tmp_path) == {"kept"}
