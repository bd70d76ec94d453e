"""A cache entry is there whole or not at all, whoever dies and however many build it."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlorachat import user_cache
from qlorachat.checkpoints import clear, list_entries
from qlorachat.checkpoints.cache import build_once
from qlorachat.errors import ConfigError, QlorachatError
from qlorachat.user_cache import cache_root

# writes 40 files slowly; argv: the file to append a line to for each build
BUILDER = """
import sys, time
from pathlib import Path
from qlorachat.checkpoints.cache import build_once

def build(folder):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    for number in range(40):
        (folder / f"{number}.txt").write_text("x" * 1000)
        time.sleep(0.01)

print("ready", flush=True)
print(build_once("entry", build, waiting=lambda: print("waiting", flush=True)))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start_builder(tmp_path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "log")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def write_one(folder: Path) -> None:
    (folder / "one.txt").write_text("1")


def fail(folder: Path) -> None:
    write_one(folder)
    raise OSError(28, "No space left on device")


def refuse(folder: Path) -> None:
    raise AssertionError("built again")


def no_home(*arguments: object, **options: object) -> Path:
    raise RuntimeError("could not determine the home directory")


def test_the_cache_folder_can_be_moved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("QLORACHAT_CACHE")
    assert cache_root().name.lower() == "qlorachat" or "qlorachat" in cache_root().parts


def test_without_a_home_folder_the_cache_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QLORACHAT_CACHE")
    monkeypatch.setattr(user_cache, "user_cache_path", no_home)
    with pytest.raises(ConfigError, match="set QLORACHAT_CACHE to a folder"):
        build_once("entry", refuse)


def test_an_entry_is_built_once_listed_and_cleared() -> None:
    assert list_entries() == []
    entry = build_once("entry", write_one)
    assert build_once("entry", refuse) == entry
    (listed,) = list_entries()
    assert (listed.name, listed.path) == ("entry", entry)
    assert listed.bytes == sum(file.stat().st_size for file in entry.iterdir())
    assert clear() == [listed]
    assert list_entries() == []
    assert clear() == []


def test_what_is_being_built_is_not_cleared(tmp_path: Path) -> None:
    builder = start_builder(tmp_path)
    while not list_entries():
        assert builder.poll() is None
        time.sleep(0.005)
    with pytest.raises(QlorachatError, match="is in use and could not be cleared"):
        clear()
    assert builder.communicate(timeout=60)[0]
    assert builder.returncode == 0
    assert [entry.name for entry in clear()] == ["entry"]


def test_clearing_touches_nothing_else(cache: Path) -> None:
    build_once("entry", write_one)
    (cache / "notes.txt").write_text("mine")
    clear()
    assert (cache / "notes.txt").read_text() == "mine"


def test_a_failed_build_leaves_nothing_and_says_where(cache: Path) -> None:
    with pytest.raises(QlorachatError, match=r"No space left on device.*QLORACHAT_CACHE") as caught:
        build_once("entry", fail)
    assert str(cache) in str(caught.value)
    assert list_entries() == []
    build_once("entry", write_one)


@pytest.mark.parametrize("damage", ["cut", "remove", "manifest"])
def test_a_damaged_entry_is_built_anew(damage: str) -> None:
    entry = build_once("entry", write_one)
    if damage == "cut":
        (entry / "one.txt").write_text("")
    else:
        (entry / ("one.txt" if damage == "remove" else "qlorachat.json")).unlink()
    assert build_once("entry", write_one) == entry
    assert (entry / "one.txt").read_text() == "1"


@pytest.mark.parametrize("manifest", ["[]", "null", '"x"', "{", "{}", '{"files": null}'])
def test_an_entry_with_a_wrong_manifest_is_built_anew(manifest: str) -> None:
    file = build_once("entry", write_one) / "qlorachat.json"
    whole = file.read_text()
    file.write_text(manifest)
    build_once("entry", write_one)
    assert file.read_text() == whole


def test_a_builder_killed_at_any_moment_leaves_nothing_to_trust(
    tmp_path: Path, cache: Path
) -> None:
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    for _ in range(6):
        builder = start_builder(tmp_path)
        assert builder.stdout is not None
        with builder, builder.stdout:
            builder.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.4))
            builder.kill()
        assert not (cache / "models" / "entry").exists(), f"seed {seed}"
    entry = build_once("entry", write_one)
    assert (entry / "one.txt").exists()
    assert [e.name for e in list_entries()] == ["entry"], "leftovers are swept"


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    builders = [start_builder(tmp_path) for _ in range(3)]
    said = [builder.communicate(timeout=60)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"
    assert len({text.splitlines()[-1] for text in said}) == 1
    assert any("waiting" in text for text in said)
    assert len(list(Path(said[0].splitlines()[-1]).glob("*.txt"))) == 40
