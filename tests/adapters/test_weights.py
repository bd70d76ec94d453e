"""adapter_model.safetensors: damaged and foreign files are each one line, and none is executed."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlorachat.adapters import check_header, inspect_adapter, read_adapter
from qlorachat.errors import AdapterError

Tensors = dict[str, torch.Tensor]
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is empty: copy or save the adapter again"),
    "cut off in the length": (lambda data: data[:5], "has 1016 bytes, but the file 5"),
    "cut off in the header": (lambda data: data[:100], "is cut off or not a safetensors file"),
    "cut off in the data": (lambda data: data[:-10], "is cut off: 7158 of 7168 bytes of tensors"),
    "extra tail": (lambda data: data + b"tail", "has 4 bytes after its last tensor"),
    "web page": (lambda _: b"\n<!doctype HTML><html>", "is a web page, not the file itself"),
    "web page without doctype": (lambda _: b"<html lang='en'>", "is a web page"),
    "LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "pickle": (lambda _: pickle.dumps({"a": 1}), "is a pickle, which can run code"),
    "zip": (lambda _: b"PK\x03\x04" + bytes(60), "is a pickle, which can run code"),
    "header overflow": (lambda data: struct.pack("<Q", 2**63) + data[8:], "its header has 92233"),
    "header past the end": (lambda data: struct.pack("<Q", 10**6) + data[8:], "has 1000000 bytes"),
    "zeros": (lambda data: bytes(len(data)), "is not a safetensors file"),
    "noise": (lambda data: data[:8] + bytes(len(data) - 8), "is not a safetensors file"),
    "shape overflow": (
        lambda data: data.replace(b'"shape":[4,64]', b'"shape":[4,9999999999999999999]'),
        "safetensors",
    ),
    "overlapping offsets": (
        lambda data: data.replace(b"[0,1024]", b"[0,1023]"),
        "is not a safetensors file",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged(case: str, folder: Path) -> None:
    damage, expected = DAMAGES[case]
    path = folder / "adapter_model.safetensors"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(AdapterError) as caught:
        check_header(folder)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors.*holds README.md"):
        check_header(folder)


class Sentinel:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_pickle_is_never_loaded(suffix: str, folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    touched = tmp_path / "touched"
    with zipfile.ZipFile(folder / f"adapter_model{suffix}", "w") as archive:
        archive.writestr("adapter_model/data.pkl", pickle.dumps(Sentinel(touched)))
    with pytest.raises(AdapterError, match=f"adapter_model\\{suffix}"):
        read_adapter(folder)
    assert not inspect_adapter(folder).ok
    assert not touched.exists()


def test_pickle_under_the_name_of_safetensors(folder: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Sentinel(touched)))
    with pytest.raises(AdapterError, match="is a pickle"):
        read_adapter(folder)
    assert not touched.exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_types(
    dtype: torch.dtype, folder: Path, edit_tensors: Callable[[Callable[[Tensors], None]], None]
) -> None:
    edit_tensors(lambda tensors: tensors.update({key: it.to(dtype) for key, it in tensors.items()}))
    with pytest.raises(AdapterError, match="expected F32, F16 or BF16"):
        check_header(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(
    dtype: torch.dtype, folder: Path, edit_tensors: Callable[[Callable[[Tensors], None]], None]
) -> None:
    edit_tensors(lambda tensors: tensors.update({key: it.to(dtype) for key, it in tensors.items()}))
    assert {tensor.dtype for tensor in read_adapter(folder).tensors.values()} == {dtype}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    return path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_link_out_of_the_folder(name: str, folder: Path, outside: Path) -> None:
    moved = (folder / name).rename(outside / name)
    _link(folder / name, moved)
    with pytest.raises(AdapterError, match="is a link that leads out of the adapter's folder"):
        read_adapter(folder)


def test_links_of_the_hub_cache(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        blob = (folder / name).rename(blobs / name.upper())
        _link(snapshot / name, Path("..", "..", "blobs", blob.name))
    assert read_adapter(snapshot).settings.rank == 4


def _link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("this account may not make links")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFO in folders")
def test_fifo_does_not_hang(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        check_header(folder)


def test_tokenizer_files_are_ignored(folder: Path) -> None:
    before = read_adapter(folder)
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.abort() }}")
    (folder / "tokenizer_config.json").write_text("{ not json")
    (folder / "tokenizer.json").write_bytes(b"\x80\x04")
    after = read_adapter(folder)
    assert (after.sha256, after.warnings) == (before.sha256, before.warnings)
