"""Every format and file gives the same rows; what is wrong is said with its line."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlorachat.errors import ConfigError, HubError
from qlorachat.messages import Message
from qlorachat.training.data.rows import BadRow, Row, Rows, read_rows

QUESTION, ANSWER = "空の色は？\nいま, [b]すぐ", 'とても "青い" です。\u2028はい'
DIALOG = (Message("user", QUESTION), Message("assistant", ANSWER))
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

SAME_DIALOG: list[dict[str, Any]] = [
    {"instruction": QUESTION, "input": "", "output": ANSWER, "index": "7", "category": "qa"},
    {"instruction": QUESTION, "input": None, "output": ANSWER, "index": 7},
    {"instruction": QUESTION, "output": ANSWER},
    {"instruction": "", "input": QUESTION, "output": ANSWER},
    {"prompt": QUESTION, "completion": ANSWER},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"prompt": QUESTION, "completion": TURNS[1:]},
    {"messages": TURNS, "prompt": "of another format"},
    {"messages": None, "prompt": QUESTION, "completion": ANSWER},
    {
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER, "weight": 1},
        ]
    },
]


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_one(tmp_path: Path, row: object, **options: Any) -> Rows:
    return read_rows(str(write_jsonl(tmp_path / "one.jsonl", row)), **options)


def reason(tmp_path: Path, row: object) -> str:
    """Why a row is bad, where it stands beside a good one."""
    rows = read_rows(str(write_jsonl(tmp_path / "two.jsonl", SAME_DIALOG[0], row)))
    assert rows.rows == (Row(1, DIALOG),)
    (bad,) = rows.bad
    assert bad.line == 2
    assert "\n" not in bad.reason
    return bad.reason


def complaint(path: Path, **options: Any) -> str:
    """The one line of a ConfigError that names the file."""
    with pytest.raises(ConfigError) as caught:
        read_rows(str(path), **options)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("row", SAME_DIALOG)
def test_each_format_gives_the_same_dialog(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read_one(tmp_path, row).rows == (Row(1, DIALOG),)


def test_instruction_and_input_are_joined_by_the_separator(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": " Hallo ", "output": "Hello"}
    assert read_one(tmp_path, row).rows[0].messages[0].content == "Translate.\n\n Hallo "
    joined = read_one(tmp_path, row, separator=" | ").rows[0].messages[0].content
    assert joined == "Translate. |  Hallo "


def test_a_system_prompt_goes_before_rows_that_bring_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be long."}, *TURNS]
    shared = [{"from": "system", "value": "Be long."}, {"from": "human", "value": "Hi"}]
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        {"messages": TURNS},
        {"messages": own},
        {"conversations": [*shared, {"from": "gpt", "value": "Ho"}]},
    )
    first = [row.messages[0] for row in read_rows(str(path), system="Be brief.").rows]
    brief, long = Message("system", "Be brief."), Message("system", "Be long.")
    assert first == [brief, long, long]
    assert read_rows(str(path)).rows[0].messages == DIALOG


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "output": None}, "its output is missing or null"),
        ({"instruction": "Hi", "output": " \n"}, "its answer is empty"),
        ({"instruction": " ", "input": "", "output": "Ho"}, "nothing is asked in it"),
        ({"instruction": "Hi", "input": 7, "output": "Ho"}, "its input is int, not text"),
        ({"instruction": ["Hi"], "output": "Ho"}, "its instruction is list, not text"),
        ({"prompt": "Hi"}, "its completion is missing or null"),
        ({"prompt": "Hi", "completion": 1.5}, "its completion is float, not a list"),
        ({"messages": TURNS[:1]}, "it ends with the user's turn, not the assistant's"),
        ({"messages": TURNS[1:]}, "nothing is asked in it"),
        ({"messages": []}, "it has no messages"),
        ({"messages": ["Hi"]}, "A message is a role and a content, not str"),
        ({"messages": [{"role": "tool", "content": ""}]}, "role is one of .*, not 'tool'"),
        ({"messages": [{"role": "user"}, TURNS[1]]}, "content is text, not NoneType"),
        ({"messages": [*TURNS, {"role": "user", "content": ""}]}, "ends with the user's turn"),
        ({"conversations": "Hi"}, "its conversations is str, not a list"),
        ({"conversations": ["Hi"]}, "a turn of its conversations is str, not an object"),
        ({"conversations": [{"from": "bing", "value": "Hi"}]}, "is from 'bing', not one of"),
        ({"conversations": [{"from": ["gpt"], "value": "Hi"}]}, r"is from \['gpt'\], not one of"),
        ({"conversations": [{"from": "human"}]}, "its value is null, not text"),
        ({"text": "Hi", "\x1b[2J": 1}, r"it has 'text', '\\x1b\[2J' where .* are needed"),
        ({}, "it has no columns where"),
        (["Hi"], r'it is \["Hi"\], not an object'),
    ],
)
def test_a_bad_row_is_kept_with_its_reason(tmp_path: Path, row: object, expected: str) -> None:
    assert re.search(expected, reason(tmp_path, row))


def test_jsonl_counts_physical_lines_and_skips_blank_ones(tmp_path: Path) -> None:
    good = json.dumps(SAME_DIALOG[0], ensure_ascii=False)
    deep = "[" * 100_000
    digits = '{"index": ' + "1" * 5000 + "}"
    lines = [good, "", '{"instruction": "Hi", ', good + "\r", "  ", deep, digits, "null", good]
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode())
    rows = read_rows(str(path))
    assert rows.rows == (Row(1, DIALOG), Row(4, DIALOG), Row(9, DIALOG))
    assert [row.line for row in rows.bad] == [3, 6, 7, 8]
    assert rows.bad[0].reason.startswith("it is no JSON (Expecting property name")
    assert rows.bad[0].reason.endswith("at column 23)")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["Rows.JSONL", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_json_files_zipped_or_not(tmp_path: Path, name: str, mark: bytes) -> None:
    rows = [SAME_DIALOG[0], {"text": "bad"}, SAME_DIALOG[-1]]
    text = json.dumps(rows, indent=1)
    if "jsonl" in name.lower():
        text = "\n".join(json.dumps(row) for row in rows)
    data = mark + text.encode()
    stored = gzip.compress(data) if name.endswith(".gz") else data
    (tmp_path / name).write_bytes(stored)
    read = read_rows(str(tmp_path / name))
    assert read.name == name
    assert read.sha256 == hashlib.sha256(stored).hexdigest()
    assert read.rows == (Row(1, DIALOG), Row(3, DIALOG))
    assert [row.line for row in read.bad] == [2]


def test_csv_says_where_a_row_starts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [
        "category,instruction,output,input",
        'qa,Hi,"Ho,',
        'ho"',
        "",
        "qa,Hi,Ho",
        "qa,Hi,Ho,,too,many",
        "qa,Hi,,none",
        f'qa,Hi,"{"長" * 200_000}",in',
    ]
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    rows = read_rows(str(path))
    assert [(row.line, row.messages[0].content) for row in rows.rows] == [
        (2, "Hi"),
        (5, "Hi"),
        (8, "Hi\n\nin"),
    ]
    assert rows.rows[0].messages[1].content == "Ho,\r\nho"
    assert rows.bad == (
        BadRow(6, "it has 6 cells where the header has 4"),
        BadRow(7, "its answer is empty"),
    )


def test_parquet_gives_rows_by_number(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    columns = {
        "image": [b"\x00", b"\x01", b"\x02"],
        "instruction": [QUESTION, "Hi", None],
        "input": [None, None, "not read where messages are"],
        "output": [ANSWER, "", None],
        "messages": [None, None, TURNS],
    }
    parquet.write_table(pyarrow.table(columns), path)
    rows = read_rows(str(path))
    assert rows.rows == (Row(1, DIALOG), Row(3, DIALOG))
    assert rows.bad == (BadRow(2, "its answer is empty"),)
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("rows.jsonl", b" \n", "is empty"),
        ("rows.csv", b"", "is empty"),
        ("rows.jsonl", "{}\n空".encode("cp932"), "not UTF-8: byte 3, on line 2, is 0x8b"),
        ("rows.jsonl", b"\xef\xbb\xbf{}\n\xff", "not UTF-8: byte 6, on line 2, is 0xff"),
        ("rows.csv", "instruction".encode("utf-16"), "byte 0.*save it again as UTF-8"),
        ("rows.json", b'{"instruction": "Hi"}', "holds no JSON array"),
        ("rows.json", b'{"a": 1}\n{"a": 2}', "Extra data: line 2.*is named .jsonl"),
        ("rows.json", b"[" * 100_000, "is no JSON"),
        ("rows.json", b"[]", "has no row to learn from.$"),
        ("rows.jsonl", b'{"a": 1}', "no row to learn from: line 1: it has 'a'"),
        ("rows.csv", b"frage,antwort\na,b", "has 'frage', 'antwort'; needed are instruction"),
        ("rows.csv", b"instruction,output\n", "has no row to learn from.$"),
        ("rows.csv", b'instruction,output\na,b\na,"b\na,b', "no CSV from line 3 on"),
        ("rows.csv", b'instruction,output\na,"b"c', "no CSV from line 2 on"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("rows.jsonl.gz", b"{}", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "cannot be read"),
        ("rows.txt", b"Hi", "must end in .json, .jsonl"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_one_line(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert re.search(expected, complaint(tmp_path / name))


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["Hi"]}), tmp_path / "rows.parquet")
    assert "has 'text'; needed are" in complaint(tmp_path / "rows.parquet")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,output,note,output,note\nHi,Ho,,Hey,\n")
    assert "has two columns named output" in complaint(tmp_path / "rows.csv")
    (tmp_path / "noted.csv").write_text("instruction,output,note,note\nHi,Ho,,\n")
    assert len(read_rows(str(tmp_path / "noted.csv")).rows) == 1
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table([["Hi"], ["Ho"], ["Hey"]], names=["instruction", "output", "output"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert "has two columns named output" in complaint(tmp_path / "rows.parquet")


@pytest.mark.parametrize("reference", ["data/missing.jsonl", "missing", "a/b/c", "data/x.json.gz"])
def test_a_reference_that_is_neither_file_nor_data_set(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"There is no file .*owner/name"):
        read_rows(reference)


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_data_set_that_is_not_on_disk(
    by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", by_environment)
    with pytest.raises(HubError, match=r"qlorachat-tests/none cannot be brought.*--offline"):
        read_rows("qlorachat-tests/none", offline=not by_environment)


def test_a_hub_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        HubError, match=r"none cannot be brought \(the hub: .*\): check the connection"
    ) as at:
        read_rows("qlorachat-tests/none")
    assert "\n" not in str(at.value)


HUB = """
import dataclasses, json, shutil, sys
from pathlib import Path
from qlorachat.training.data.rows import read_rows

folder, cache = map(Path, sys.argv[1:])
local = read_rows(str(folder))
shutil.copytree(cache / folder.name, cache / f"owner___{folder.name}")  # as from the hub
prepared = [read_rows(f"owner/{folder.name}", offline=offline) for offline in (True, False)]
json.dump([dataclasses.asdict(rows) for rows in (local, *prepared)], sys.stdout)
"""


def test_a_folder_and_a_prepared_data_set_give_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "nanoda"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", SAME_DIALOG[0], {"messages": TURNS}, {"prompt": "Hi"})
    write_jsonl(folder / "test.jsonl", {"messages": TURNS})
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB, str(folder), str(cache)],
        env=os.environ
        | {"HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(cache)}
        | {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0"},  # a hub that is away
        capture_output=True,
        check=True,
    )
    local, prepared, away = json.loads(done.stdout)
    assert [row["line"] for row in local["rows"]] == [1, 2]
    assert local["rows"][1]["messages"] == TURNS
    assert [row["line"] for row in local["bad"]] == [3]
    assert len(bytes.fromhex(local["sha256"])) == 32
    assert local["name"] == "nanoda"
    assert prepared == away == local | {"name": "owner/nanoda"}


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    assert "cannot be read as a data set" in complaint(tmp_path)
