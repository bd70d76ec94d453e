"""From what a user calls an adapter, a folder or a hub repository, to a local folder."""

import difflib
import re
from pathlib import Path

from qlorachat import hub
from qlorachat.adapters.config import require_config
from qlorachat.adapters.folder import CARD, CONFIG, WEIGHTS, plain
from qlorachat.errors import AdapterError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def locate_adapter(reference: str, offline: bool) -> Path:
    """The folder of an adapter: `reference` itself, else the hub repository of that name.

    AdapterError if it is neither or holds no adapter_config.json; HubError from the hub.
    """
    folder = _local(reference) or hub.download(
        reference, revision=None, offline=offline, patterns=[CONFIG, WEIGHTS, CARD]
    )
    require_config(folder)
    return folder


def _local(reference: str) -> Path | None:
    """The path if it exists, None if it can be a repository; a mistyped path is an AdapterError."""
    try:
        path = Path(reference).expanduser()
        if path.exists():
            return path
        near = _nearest(path)
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
        path, near = Path(reference), None
    if near is None and _REPOSITORY.fullmatch(reference):
        return None
    hint = f"did you mean {near}?" if near else f"expected one that holds {CONFIG}, or a hub id."
    raise AdapterError(f"There is no adapter folder {plain(str(path))}; {hint}", param="adapter")


def _nearest(path: Path) -> Path | None:
    if not path.parent.is_dir():
        return None
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / close[0] if close else None
