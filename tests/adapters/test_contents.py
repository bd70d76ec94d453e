"""What only the bytes and numbers show: NaN, no effect, bit flips; and the content hash."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlorachat.adapters import check_header, examination, inspect_adapter, read_adapter
from qlorachat.errors import AdapterError

Tensors = dict[str, torch.Tensor]
EditTensors = Callable[[Callable[[Tensors], Any]], None]
EditConfig = Callable[..., None]

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def zero(tensors: Tensors, part: str) -> None:
    for key, tensor in tensors.items():
        if part in key:
            tensor.zero_()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_not_finite(value: float, part: str, folder: Path, edit_tensors: EditTensors) -> None:
    key = f"{Q0}.lora_{part}.weight"
    edit_tensors(lambda it: it[key].view(-1)[7].fill_(value))
    check_header(folder)
    with pytest.raises(AdapterError, match=f"NaN or infinite numbers in {key}"):
        read_adapter(folder)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_without_effect(part: str, folder: Path, edit_tensors: EditTensors) -> None:
    edit_tensors(lambda it: zero(it, part))
    check_header(folder)
    with pytest.raises(AdapterError, match="has no effect: lora_A or lora_B is all zero in every"):
        read_adapter(folder)


def test_one_module_without_effect(folder: Path, edit_tensors: EditTensors) -> None:
    edit_tensors(lambda it: it[f"{Q0}.lora_B.weight"].zero_())
    (warning,) = read_adapter(folder).warnings
    assert "without effect, on 1 of 4 modules: model.layers.0.self_attn.q_proj" in warning


@pytest.mark.parametrize("extra", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_zero_b_beside_other_changes(
    extra: dict[str, Any], make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(target_modules=["q_proj"], **extra)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    zero(tensors, "lora_B")
    save_file({key: it.clone() for key, it in tensors.items()}, path)
    (warning,) = read_adapter(folder).warnings
    assert "without effect, on 2 of 2 modules" in warning


def test_hash_is_of_the_content(
    folder: Path, edit_config: EditConfig, edit_tensors: EditTensors, tmp_path: Path
) -> None:
    first = read_adapter(folder).sha256
    assert first == read_adapter(Path(shutil.copytree(folder, tmp_path / "copy"))).sha256
    edit_config(base_model_name_or_path="else/where", target_modules=r".*_proj")
    assert read_adapter(folder).sha256 == first
    edit_config(lora_alpha=17)
    other_alpha = read_adapter(folder).sha256
    edit_config(lora_alpha=16)
    edit_tensors(lambda it: it[f"{Q0}.lora_A.weight"].view(-1)[0].add_(1e-3))
    assert len({first, other_alpha, read_adapter(folder).sha256}) == 3


def test_tensors_do_not_change_with_the_file(folder: Path, edit_tensors: EditTensors) -> None:
    adapter = read_adapter(folder)
    before = {key: tensor.clone() for key, tensor in adapter.tensors.items()}
    path = folder / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.tensors.items())


def test_file_that_changes_while_it_is_read(
    folder: Path, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_adapter(target_modules=["o_proj"]) / "adapter_model.safetensors"
    monkeypatch.setattr(examination, "read_bytes", lambda _: other.read_bytes())
    with pytest.raises(AdapterError, match="changed while it was read: load it again"):
        read_adapter(folder)
    monkeypatch.setattr(examination, "read_bytes", lambda _: other.read_bytes()[:900])
    with pytest.raises(AdapterError, match="changed while it was read: load it again"):
        read_adapter(folder)


def write_card(folder: Path, **values: Any) -> None:
    (folder / "qlorachat.json").write_text(json.dumps(values))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_manifest_finds_a_bit_flip(name: str, folder: Path) -> None:
    path = folder / name
    write_card(folder, sha256={name: sha256(path)})
    read_adapter(folder)
    data = bytearray(path.read_bytes())
    position = data.index(b'"r": 4') + 5 if name.endswith(".json") else len(data) - 3
    data[position] ^= 1
    path.write_bytes(data)
    messages = [finding.message for finding in inspect_adapter(folder).findings]
    assert any(f"{path} is damaged or was changed: its sha256" in it for it in messages)
    with pytest.raises(AdapterError):
        read_adapter(folder)


def test_manifest_names_a_missing_file(folder: Path) -> None:
    write_card(folder, sha256={"golden.json": "0" * 64})
    with pytest.raises(AdapterError, match=r"golden.json is missing, but qlorachat.json lists it"):
        read_adapter(folder)
