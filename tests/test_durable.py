"""Folders and files appear whole, under their name, with the process's own permissions."""

import os
import stat
import subprocess
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


def test_a_kill_between_two_names_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    code = (
        "import os, sys; from pathlib import Path; from qlorachat.durable import whole_folder\n"
        "rename, renames = Path.rename, []\n"
        "def die_at_the_second(path, target):\n"
        "    renames.append(path)\n"
        "    return rename(path, target) if len(renames) == 1 else os._exit(9)\n"
        "Path.rename = die_at_the_second\n"
        "with whole_folder(Path(sys.argv[1]), replace=True) as folder: (folder / 'new').touch()"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "made"], check=False)
    assert killed.returncode == 9
    assert "made" not in _names(tmp_path)
    sweep(tmp_path, "made")
    assert _names(tmp_path) == {"made"}
    assert _names(tmp_path / "made") == {"old"}


def test_an_old_folder_that_cannot_come_back_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    rename = Path.rename

    def refuse_the_name(path: Path, target: Path) -> Path:
        if target == tmp_path / "made":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_name)
    with suppress(OSError), whole_folder(tmp_path / "made", replace=True) as folder:
        (folder / "new").touch()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old"]
    sweep(tmp_path)
    assert _names(tmp_path / "made") == {"old"}
