"""Our own folder of converted models; an entry is there whole or not at all."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from qlorachat.durable import UNFINISHED, sweep, whole_folder
from qlorachat.errors import ModelError, QlorachatError
from qlorachat.user_cache import cache_root, file_sizes

MANIFEST = "qlorachat.json"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One converted model on disk; `bytes` is its size."""

    name: str
    path: Path
    bytes: int


def list_entries() -> list[CacheEntry]:
    """What is converted, by name; leftovers of a killed conversion are counted under their name."""
    folders = [path for path in _models().glob("*") if path.is_dir()]
    return [CacheEntry(path.name, path, sum(file_sizes(path).values())) for path in sorted(folders)]


def clear() -> list[CacheEntry]:
    """Remove every entry and say which; raises QlorachatError for one that can't be removed."""
    entries = list_entries()
    try:
        for name in {entry.name.partition(UNFINISHED)[0] for entry in entries}:
            with FileLock(_lock_file(name), timeout=0):
                _sweep(name)
    except Timeout as error:
        raise QlorachatError(
            f"The cache {_models()} is in use and could not be cleared ({error}): close whatever "
            "uses it and try again."
        ) from error
    except OSError as error:
        raise QlorachatError(f"The cache {_models()} could not be cleared ({error}).") from error
    return entries


def build_once(
    name: str, build: Callable[[Path], None], *, waiting: Callable[[], None] = lambda: None
) -> Path:
    """The entry `name`, made by `build(folder)` unless it is there already.

    `build` fills a folder beside the entry; the folder is synced to disk and renamed when it is
    done, so a kill at any moment leaves nothing under `name`. One process builds at a time; the
    others call `waiting` once and then take what was built. Raises ModelError when the disk
    does not allow it.
    """
    entry = _models() / name
    if _is_whole(entry):
        return entry
    try:
        _models().mkdir(parents=True, exist_ok=True)
        with _locked(name, waiting):
            if not _is_whole(entry):
                _sweep(name)
                _build(entry, build)
    except OSError as error:
        raise ModelError(
            f"The cache folder {_models()} cannot be written ({error.strerror or error}): "
            "free some space there, or set QLORACHAT_CACHE to another folder."
        ) from error
    return entry


def _models() -> Path:
    return cache_root() / "models"


def _lock_file(name: str) -> Path:
    return _models() / f"{name}.lock"


def _locked(name: str, waiting: Callable[[], None]) -> AbstractContextManager[object]:
    """A lock, taken; the end of `with`, or the death of its process, lets it go."""
    lock = FileLock(_lock_file(name))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        waiting()
        return lock.acquire()


def _sweep(name: str) -> None:
    """Remove a damaged entry and what killed builds left; the lock's holder is the only builder."""
    entry = _models() / name
    if entry.exists():
        shutil.rmtree(entry)
    sweep(_models(), name)


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    with whole_folder(entry) as folder:
        build(folder)
        _write_manifest(folder)


def _write_manifest(folder: Path) -> None:
    """Add the size of every file to the entry's manifest, which `_is_whole` compares."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text("utf-8")) if path.exists() else {}
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file != path}
    path.write_text(json.dumps({**manifest, "files": sizes}, indent=1), "utf-8")


def _is_whole(entry: Path) -> bool:
    try:
        match json.loads((entry / MANIFEST).read_text("utf-8")):
            case {"files": dict(files)}:
                return all((entry / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        pass
    return False
