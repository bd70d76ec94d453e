"""Whatever happens to the bytes of an adapter: it loads as it was, or one AdapterError says why."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlorachat.adapters import Adapter, inspect_adapter, read_adapter
from qlorachat.errors import AdapterError

FILES = ["adapter_model.safetensors", "adapter_config.json", "qlorachat.json"]
in_one_folder = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bit flips, a cut, a tail, or a piece of the file in another place."""
    kind = draw(st.sampled_from(["flip", "header flip", "cut", "tail", "splice"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8))
    junk = draw(st.binary(min_size=1, max_size=16))

    def mutate(data: bytes) -> bytes:
        reach = min(len(data), 1100) if kind == "header flip" else len(data)
        spots = [int(place * reach) for place in places]
        if kind == "cut":
            return data[: spots[0]]
        if kind == "tail":
            return data + junk
        if kind == "splice":
            return data[: spots[0]] + junk + data[spots[0] + len(junk) :]
        changed = bytearray(data)
        for spot, bit in zip(spots, junk, strict=False):
            changed[spot] ^= 1 << (bit % 8)
        return bytes(changed)

    return mutate


@pytest.fixture
def pristine(folder: Path, tmp_path: Path) -> Path:
    """The good folder with a card that lists the hashes of its files."""
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES[:2]}
    card = {"template": "llama2", "sha256": hashes}
    (folder / "qlorachat.json").write_text(json.dumps(card))
    return Path(shutil.copytree(folder, tmp_path / "pristine"))


def attempt(folder: Path, pristine: Path, name: str, data: bytes) -> Adapter | None:
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    if inspect_adapter(folder).ok:
        return read_adapter(folder)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert str(caught.value).isprintable()
    return None


@given(name=st.sampled_from(FILES[:2]), mutate=mutations())
@in_one_folder
def test_listed_files_load_unchanged_or_not_at_all(
    name: str, mutate: Callable[[bytes], bytes], folder: Path, pristine: Path
) -> None:
    good = read_adapter(pristine)
    adapter = attempt(folder, pristine, name, mutate((pristine / name).read_bytes()))
    if adapter is not None:
        assert adapter.sha256 == good.sha256
        assert all(torch.equal(adapter.tensors[key], good.tensors[key]) for key in good.tensors)


@given(name=st.sampled_from(FILES), mutate=mutations())
@in_one_folder
def test_unlisted_files_load_or_raise_adapter_error(
    name: str, mutate: Callable[[bytes], bytes], folder: Path, pristine: Path
) -> None:
    (pristine / "qlorachat.json").write_text('{"template": "llama2"}')
    adapter = attempt(folder, pristine, name, mutate((pristine / name).read_bytes()))
    if adapter is not None:
        assert adapter.tensors.keys() == read_adapter(pristine).tensors.keys()
        assert all(tensor.isfinite().all() for tensor in adapter.tensors.values())
