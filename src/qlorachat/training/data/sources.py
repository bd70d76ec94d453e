"""A data reference becomes records: a file by the end of its name, or a data set of the hub."""

import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import is_offline_mode

from qlorachat import hub
from qlorachat.errors import ConfigError, HubError
from qlorachat.training.data.formats import select
from qlorachat.training.data.records import (
    READERS,
    BadRow,
    Reader,
    Record,
    check_columns,
    first_line,
)
from qlorachat.training.places import local_path

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_ENDINGS = f"{', '.join(READERS)} (or any of them and .gz)"


@dataclass(frozen=True, slots=True)
class Source:
    """The records of a reference and the SHA-256 (hex) of what they were read from."""

    sha256: str
    records: Iterable[Record | BadRow]


def open_source(reference: str, *, offline: bool = False) -> Source:
    """The records of a file, of a data set's folder, or of a hub data set's split "train".

    With `offline` (or HF_HUB_OFFLINE) the hub is not asked: what the library `datasets` has
    prepared before is taken; with a warning also where the hub cannot be reached.
    Raises ConfigError for a reference or a file that is wrong as a whole, HubError for a data set
    that cannot be brought; both also while the records are read.
    """
    path = local_path(reference, param="data")
    reader = _reader_for(path)
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path, reader)
    if reader is None and _HUB_ID.fullmatch(reference):
        return _open_hub(reference, offline=offline)
    raise ConfigError(
        f"There is no file {reference}: give one that ends in {_ENDINGS}, or the id of a hub data "
        "set, owner/name."
    )


def _reader_for(path: PurePath) -> Reader | None:
    return READERS.get(PurePath(path.name.lower().removesuffix(".gz")).suffix)


def _open_file(path: Path, reader: Reader | None) -> Source:
    if reader is None:
        raise ConfigError(f"The format of {path} is not known: its name must end in {_ENDINGS}.")
    try:
        stored = path.read_bytes()
        data = gzip.decompress(stored) if path.suffix.lower() == ".gz" else stored
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)}).") from error
    if not data.strip():
        raise ConfigError(f"{path} is empty.")
    return Source(hashlib.sha256(stored).hexdigest(), reader(data, str(path)))


def _open_folder(path: Path) -> Source:
    try:
        dataset = _load(str(path.resolve()))
    except Exception as error:  # the library `datasets` and its readers raise all kinds
        raise ConfigError(
            f"The folder {path} cannot be read as a data set ({first_line(error)}): give a file."
        ) from error
    return _from_dataset(dataset, str(path))


def _open_hub(repository: str, *, offline: bool) -> Source:
    offline = offline or is_offline_mode()
    reason = None if offline else hub.why_unreachable(repository, dataset=True)
    try:
        dataset = _load_cached(repository) if offline or reason else _load(repository)
    except Exception as error:  # as above
        why = first_line(error)
        advice = "check its name and the connection (a gated one needs `hf auth login`)"
        if offline:
            advice = "the hub is not asked (--offline or HF_HUB_OFFLINE), run once without it"
        elif reason:
            why, advice = f"the hub: {reason}", "check the connection or proxy"
        raise HubError(
            f"The data set {repository} cannot be brought ({why}): {advice}, or give a file."
        ) from error
    if reason:
        log.warning("The hub cannot be reached (%s): the data set on disk is taken.", reason)
    return _from_dataset(dataset, repository)


def _from_dataset(dataset: Any, name: str) -> Source:
    """The rows of a data set of the library; the hash is over the columns that are read."""
    check_columns(dataset.column_names, name)
    rows = dataset.select_columns(select(dataset.column_names))
    return Source(_hash(rows), _records(rows))


def _load(reference: str) -> Any:
    # deferred, also below: the library takes a second to import, files do without it
    from datasets import load_dataset

    return load_dataset(reference, split="train")


def _load_cached(reference: str) -> Any:
    """What `_load` has prepared on this disk before; load_dataset itself would ask the hub."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(
        repo_id=reference, dataset_name=PurePath(reference).name, version="auto", hash="auto"
    )
    return builder.as_dataset(split="train")


def _hash(rows: Iterable[dict[str, object]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def _records(rows: Iterable[dict[str, object]]) -> Iterator[Record]:
    return (Record(number, row) for number, row in enumerate(rows, 1))
