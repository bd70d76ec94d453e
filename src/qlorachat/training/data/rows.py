"""A data reference becomes rows that end with an answer; every row is there, good or bad."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlorachat.errors import ConfigError
from qlorachat.messages import Message
from qlorachat.training.data.formats import BadRecord, to_messages
from qlorachat.training.data.records import BadRow, Record
from qlorachat.training.data.sources import open_source

__all__ = ["BadRow", "Row", "Rows", "read_rows"]


@dataclass(frozen=True, slots=True)
class Row:
    """A dialog to learn from, with the line where it starts; the assistant has the last word."""

    line: int
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of one reference; `sha256` is of the file's bytes as stored, in hex."""

    name: str
    sha256: str
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]


def read_rows(
    reference: str, *, separator: str = "\n\n", system: str | None = None, offline: bool = False
) -> Rows:
    """The rows of a JSON, JSONL, CSV or Parquet file (also .gz), or of a hub data set.

    `separator` joins an instruction and its input; `system` goes before rows that bring no system
    message. A line is the physical one for JSONL and CSV, else the row's number, both from 1. The
    hash of a hub data set is over its rows. Raises ConfigError for a reference, a file or columns
    that are wrong as a whole, also where no row is good, and HubError.
    """
    source = open_source(reference, offline=offline)
    found = [_row(record, separator, system) for record in source.records]
    rows = tuple(row for row in found if isinstance(row, Row))
    bad = tuple(row for row in found if isinstance(row, BadRow))
    if not rows:
        raise ConfigError(f"{reference} has no row to learn from{_first(bad)}.")
    path = Path(reference).expanduser()
    return Rows(path.name if path.exists() else reference, source.sha256, rows, bad)


def _row(record: Record | BadRow, separator: str, system: str | None) -> Row | BadRow:
    if isinstance(record, BadRow):
        return record
    try:
        messages = to_messages(record.columns, separator)
    except BadRecord as error:
        return BadRow(record.line, str(error))
    if system is not None and all(message.role != "system" for message in messages):
        messages = (Message("system", system), *messages)
    return Row(record.line, messages)


def _first(bad: Iterable[BadRow]) -> str:
    return next((f": line {row.line}: {row.reason}" for row in bad), "")
