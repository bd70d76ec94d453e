"""How many blocks share an NF4 product, as `qlorachat tune` measured it on this card."""

import functools
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock

from qlorachat import __version__
from qlorachat.durable import write_whole
from qlorachat.errors import ConfigError
from qlorachat.user_cache import cache_root

log = logging.getLogger(__name__)


def tuned_blocks(rows: int, shape: tuple[int, int], device: torch.device) -> int | None:
    """What was measured for `rows` padded rows of x and a weight of `shape`; None: nothing."""
    return _read(device).get(_key(rows, shape))


def keep(measured: Mapping[tuple[int, tuple[int, int]], int], device: torch.device) -> Path:
    """Add (rows, shape) -> blocks to what is known of a card. Raises OSError."""
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        _read.cache_clear()  # another process may have added to it
        known = {**_read(device), **{_key(*key): blocks for key, blocks in measured.items()}}
        write_whole(path, json.dumps(known, indent=1) + "\n")
        _read.cache_clear()
    return path


@functools.cache
def _read(device: torch.device) -> dict[str, int]:
    try:
        path = _path(device)
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ConfigError):  # nothing measured, or no folder to keep it in
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s can't be read (%s); run `qlorachat tune` again", path, error)
        return {}
    if not isinstance(known, dict) or not all(_is_count(value) for value in known.values()):
        log.warning("%s holds no counts of blocks; run `qlorachat tune` again", path)
        return {}
    return known


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535


def _key(rows: int, shape: tuple[int, int]) -> str:
    return f"{rows} x {shape[0]} x {shape[1]}"


def _path(device: torch.device) -> Path:
    """One file for a kind of card and a version of ours, whose kernels may differ."""
    card = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(device))
    return cache_root() / "tuned" / f"{card}-{__version__}.json"
