"""The files of an adapter folder: opened only under its root, and read as data, never as code."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlorachat.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
CARD = "qlorachat.json"

_MAX_JSON_BYTES = 2**20  # a real adapter_config.json has 1 to 30 kB
_MAX_SHOWN = 160  # characters of a name out of a file in a message
_DISGUISES = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (rb"\s*<(!doctype|html|\?xml)", "is a web page, not the file itself: download it again"),
    (rb"\x80[\x02-\x05]|PK\x03\x04", "is a pickle, which can run code and is never loaded"),
)


def find_file(folder: Path, name: str) -> Path | None:
    """The regular file `name` in `folder`, None where there is none.

    AdapterError if it is a link that leads out of the folder or can't be looked at.
    """
    path = folder / name
    try:
        if not path.is_file():
            return None
        real = path.resolve()
    except OSError as error:
        raise AdapterError(f"{path} cannot be looked at: {error.strerror}.") from None
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise AdapterError(
            f"{path} is a link that leads out of the adapter's folder, to {real}: "
            "put the file itself there."
        )
    return path


def _roots(folder: Path) -> list[Path]:
    root = folder.resolve()
    if root.parent.name == "snapshots":
        # the hub's cache keeps snapshots/COMMIT/NAME as a link into blobs/
        return [root, root.parent.parent / "blobs"]
    return [root]


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The file's bytes; AdapterError if it can't be read or has more than `limit` bytes."""
    try:
        if limit is not None and path.stat().st_size > limit:
            raise AdapterError(f"{path} has more than {limit} bytes: it is not an adapter's.")
        return path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror}.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or AdapterError."""
    data = read_bytes(path, _MAX_JSON_BYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = disguise(data) or f"is not JSON ({error}): save the adapter again"
        raise AdapterError(f"{path} {plain(reason)}.") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a JSON {type(value).__name__}; expected an object.")
    return value


def disguise(head: bytes) -> str | None:
    """What a file really is, by its first bytes, where something else was put under its name."""
    for pattern, reason in _DISGUISES:
        if re.match(pattern, head, re.IGNORECASE):
            return reason
    return None


def contents(folder: Path) -> str:
    """What is in `folder`, in a few words for a message."""
    try:
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be listed ({error.strerror})"
    return f"it holds {first_five(names)}" if names else "it is empty"


def first_five(names: Iterable[str]) -> str:
    """The first five of `names` in words, and how many more there are."""
    known: Sequence[str] = list(names)
    shown = ", ".join(plain(name) for name in known[:5])
    return f"{shown} and {len(known) - 5} more" if len(known) > 5 else shown


def plain(text: str) -> str:
    """Text out of a file made safe for one line on a terminal: no control characters, not long."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 1] + "…"
