"""Our folder in the user's cache: what can be made again, and takes long."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path

from qlorachat.errors import ConfigError

Kind = Literal["models", "kernels", "tuned"]  # each a folder of the cache


def cache_root() -> Path:
    """QLORACHAT_CACHE, else our folder in the user's cache folder. Raises ConfigError."""
    if asked := os.environ.get("QLORACHAT_CACHE"):
        try:
            return Path(asked).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"QLORACHAT_CACHE is {asked}, but there is no such home folder: give a path."
            ) from None
    try:
        return user_cache_path("qlorachat", appauthor=False)
    except RuntimeError:
        raise ConfigError(
            "There is no home folder to keep converted models and kernels in: set QLORACHAT_CACHE "
            "to a folder."
        ) from None


def kept_files(kind: Kind) -> dict[Path, int]:
    """Each file of a kind with its size in bytes; locks and strangers are left out. Raises OSError.

    What a killed writer left has the name of its target and more, and is counted.
    """
    folder = cache_root() / kind
    files = file_sizes(folder)
    if kind == "models":
        return {path: size for path, size in files.items() if path.parent != folder}
    ending = {"kernels": ".cubin", "tuned": ".json"}[kind]
    return {
        path: size for path, size in files.items() if path.parent == folder and ending in path.name
    }


def file_sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every file below a folder; what is missing or goes meanwhile has no entry.

    Raises OSError for a folder that can't be read.
    """
    sizes: dict[Path, int] = {}
    for parent, _, names in os.walk(folder, onerror=_raise_unless_missing):
        for path in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                sizes[path] = path.lstat().st_size
    return sizes


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
