"""From a reference to a folder: paths, mistyped paths and hub repositories."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from qlorachat import hub
from qlorachat.adapters import locate_adapter
from qlorachat.errors import AdapterError, HubError


@pytest.fixture(autouse=True)
def _in_the_parent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)


def test_local_folder(folder: Path) -> None:
    assert locate_adapter(str(folder), True) == folder
    assert locate_adapter("zundamon", True) == Path("zundamon")
    assert locate_adapter("./zundamon/", True) == Path("zundamon")


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert locate_adapter("~/zundamon", True) == folder


def test_folder_without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json; it holds README.md"):
        locate_adapter("zundamon", True)


def test_file_instead_of_folder() -> None:
    with pytest.raises(AdapterError, match="is a file; expected the folder"):
        locate_adapter("zundamon/adapter_model.safetensors", True)


@pytest.mark.parametrize("reference", ["zundamo", "./zundamom", "../{parent}/zundamonn"])
def test_nearest_folder(reference: str, folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"did you mean .*zundamon\?"):
        locate_adapter(reference.format(parent=folder.parent.name), True)


NAMES = [
    "qlora-model",
    "./nothing",
    "/nothing/at/all",
    "a/b/c",
    "a\\b",
    "C:\\models\\x",
    "~nobody-of-this-name/x",
    "../../etc",
    "https://example.org/x",
    "file:///etc/passwd",
    "a\0b",
    "x" * 4096,
    "a\x1b[31m/../b",
    "ｚｕｎｄａ/ｍｏｎ",
    "%2e%2e/x",
    ".hidden/x",
    "-flag/x",
]


@pytest.mark.parametrize("reference", NAMES)
def test_neither_folder_nor_repository(reference: str) -> None:
    with pytest.raises(AdapterError, match="There is no adapter folder") as caught:
        locate_adapter(reference, True)
    assert str(caught.value).isprintable()


def test_repository_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool, list[str]]] = []

    def download(
        repository: str, *, revision: str | None, offline: bool, patterns: Sequence[str]
    ) -> Path:
        asked.append((repository, revision, offline, list(patterns)))
        return folder

    monkeypatch.setattr(hub, "download", download)  # what lies beyond needs a network
    assert locate_adapter("someone/zundamon-lora", False) == folder
    files = ["adapter_config.json", "adapter_model.safetensors", "qlorachat.json"]
    assert asked == [("someone/zundamon-lora", None, False, files)]


def test_offline_repository_is_one_error() -> None:
    with pytest.raises(HubError, match="someone/zundamon-lora-that-nobody-has"):
        locate_adapter("someone/zundamon-lora-that-nobody-has", True)


def test_mistyped_path_is_not_asked_of_the_hub(folder: Path) -> None:
    parent = folder.parent / "adapters"
    parent.mkdir()
    folder.rename(parent / "zundamon")
    with pytest.raises(AdapterError, match=r"did you mean adapters.zundamon\?"):
        locate_adapter("adapters/zundamom", False)
