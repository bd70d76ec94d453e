"""Bytes of a data file become records, each with the line where it starts; bad ones are kept."""

import csv
import io
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qlorachat.errors import ConfigError
from qlorachat.training.data.formats import NEEDED, Columns, knows, listed, select

_LONGEST_FIELD = 2**31 - 1  # characters of a CSV cell: what a C long holds on Windows


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was stored: its columns by name.

    `line` counts from 1: the line where the row starts in JSONL and CSV, else the row's number.
    """

    line: int
    columns: Columns


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be learned; `reason` is one clause."""

    line: int
    reason: str


Reader = Callable[[bytes, str], Iterator[Record | BadRow]]


def read_json(data: bytes, name: str) -> Iterator[Record | BadRow]:
    """The objects of a JSON array."""
    hint = "a file with one object a line is named .jsonl"
    try:
        values = json.loads(_decode(data, name))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no JSON ({error}); {hint}.") from None
    if not isinstance(values, list):
        raise ConfigError(f"{name} holds no JSON array of rows, [{{…}}, {{…}}]; {hint}.")
    for row, value in enumerate(values, 1):
        yield _record(row, value)


def read_jsonl(data: bytes, name: str) -> Iterator[Record | BadRow]:
    """The objects of a file with one a line; blank lines are none."""
    # not splitlines(): texts may hold other line separators, such as U+2028
    for number, line in enumerate(_decode(data, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _record(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield BadRow(number, f"it is no JSON ({_json_reason(error)})")


def read_csv(data: bytes, name: str) -> Iterator[Record | BadRow]:
    """The rows below a header row; short ones lack their last columns."""
    rows = _csv_rows(_decode(data, name), name)
    _, header = next(rows, (1, []))
    check_columns(header, name)
    for line, cells in rows:
        if len(cells) > len(header):
            yield BadRow(line, f"it has {len(cells)} cells where the header has {len(header)}")
        else:
            yield Record(line, dict(zip(header, cells, strict=False)))


def read_parquet(data: bytes, name: str) -> Iterator[Record | BadRow]:
    """The rows of a Parquet file; columns that no format reads are left alone."""
    # deferred: only Parquet needs the library
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(BufferReader(data))
        names = file.schema_arrow.names
        check_columns(names, name)
        values = file.read(columns=select(names)).to_pylist()
    except ArrowException as error:
        raise ConfigError(f"{name} cannot be read as Parquet: {first_line(error)}.") from None
    for row, value in enumerate(values, 1):
        yield _record(row, value)


READERS: Mapping[str, Reader] = MappingProxyType(
    {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
)


def check_columns(columns: list[str], name: str) -> None:
    """ConfigError unless the columns of a table suffice for one format, each there once."""
    if not knows(columns):
        raise ConfigError(f"{name} has {listed(columns)}; needed are {NEEDED}.")
    read = select(columns)
    if twice := next((column for column in read if read.count(column) > 1), None):
        raise ConfigError(f"{name} has two columns named {twice}: rename the one not to be read.")


def first_line(error: Exception) -> str:
    """The first line of what an error says, without the stop at its end."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")


def _record(line: int, value: object) -> Record | BadRow:
    if isinstance(value, dict):
        return Record(line, value)
    return BadRow(line, f"it is {json.dumps(value)[:20]}, not an object")


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, at column {error.colno}"
    return first_line(error)


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line where each starts; blank lines are none."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{name} is no CSV from line {start} on ({error}): check the quotes of that row."
        ) from None


def _decode(data: bytes, name: str) -> str:
    """The text of UTF-8 bytes, with or without the mark at their start."""
    start = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        position = start + error.start
        line = data.count(b"\n", 0, position) + 1
        raise ConfigError(
            f"{name} is not UTF-8: byte {position}, on line {line}, is 0x{data[position]:02x}; "
            "save it again as UTF-8 (in Excel: CSV UTF-8)."
        ) from None
