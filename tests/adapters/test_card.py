"""qlorachat.json, and the base model that an adapter names, without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlorachat.adapters import AdapterCard, base_model_of, inspect_adapter, read_adapter
from qlorachat.errors import AdapterError


def write_card(folder: Path, text: object) -> None:
    (folder / "qlorachat.json").write_text(text if isinstance(text, str) else json.dumps(text))


def test_card_of_an_adapter(folder: Path) -> None:
    values: dict[str, Any] = {
        "template": "llama2",
        "system": "あなたは誠実で優秀な日本人のアシスタントです。",
        "base_model": "elyza/ELYZA-7b",
        "revision": "main",
        "quantization": "nf4",
        "data_sha256": "ab" * 32,
        "versions": {"peft": "0.21.2"},
    }
    write_card(folder, values)
    assert read_adapter(folder).card == AdapterCard(**values)
    inspection = inspect_adapter(folder)
    assert (inspection.template, inspection.base_model) == ("llama2", "elyza/ELYZA-7b")


def test_no_card(folder: Path) -> None:
    assert read_adapter(folder).card is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({"templte": "llama2"}, "no option `templte`; did you mean `template`?"),
        ({"template": 3}, "The option `template` is 3"),
        ({"data_sha256": "abc"}, "The option `data_sha256` is 'abc'"),
        ({"sha256": {"../secret": "0" * 64}}, "'../secret'"),
        ({"sha256": {"/etc/passwd": "0" * 64}}, "'/etc/passwd'"),
        ({"sha256": {"..": "0" * 64}}, "'..'"),
        ({"sha256": {"x\nqlorachat: all is well": "0" * 64}}, "x\\nqlorachat: all is well"),
        ({"x\ny": 1}, "no option `x\\ny`"),
        ([], "holds a JSON list; expected an object"),
        ("<html>", "is a web page"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_card(card: object, expected: str, folder: Path) -> None:
    write_card(folder, card)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder / "qlorachat.json"))


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (None, {}, (None, None)),
        (None, {"base_model_name_or_path": ""}, (None, None)),
        (None, {"base_model_name_or_path": "a/b", "revision": "v1"}, ("a/b", "v1")),
        ({}, {"base_model_name_or_path": "a/b", "revision": "v1"}, ("a/b", "v1")),
        (
            {"base_model": "c/d"},
            {"base_model_name_or_path": "a/b", "revision": "v1"},
            ("c/d", None),
        ),
        ({"base_model": "c/d", "revision": "v2"}, {}, ("c/d", "v2")),
    ],
)
def test_base_model_of(
    card: object,
    config: dict[str, Any],
    expected: tuple[str | None, str | None],
    folder: Path,
    edit_config: Callable[..., None],
) -> None:
    if card is not None:
        write_card(folder, card)
    edit_config(**config)
    assert base_model_of(folder) == expected


def test_headers_are_checked_without_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from qlorachat.adapters import base_model_of, check_header\n"
        "folder = Path(sys.argv[1]); base_model_of(folder); check_header(folder)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'peft', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
