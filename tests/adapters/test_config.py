"""adapter_config.json: what is refused, and that nothing in it is ever imported."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlorachat.adapters import check_header, read_adapter
from qlorachat.errors import AdapterError

SLOW = "(?:(.)|(..)|(...))*(?<=[!?])"  # tries every way to cut a name into pieces
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type is None; expected 'LORA'"),
    "list as method": ({"peft_type": ["LORA"]}, "peft_type is ['LORA']"),
    "rank as text": ({"r": "4"}, "r is '4': Input should be a valid integer"),
    "rank as truth": ({"r": True}, "r is True"),
    "rank zero": ({"r": 0}, "r is 0: Input should be greater than or equal to 1"),
    "huge alpha": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "endless alpha": ({"lora_alpha": 10**400}, "should be less than or equal to 2147483648"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha is 0: Input should be greater than 0"),
    "rank pattern": ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is {'q_proj': 'x'}"),
    "targets": ({"target_modules": 3}, "target_modules is 3"),
    "saved pattern": ({"modules_to_save": ["(a+)+$"]}, "modules_to_save is ['(a+)+$']"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'; expected CAUSAL_LM"),
    "bias": ({"bias": "all"}, "bias is 'all', and trained biases are not supported"),
    "changed base": ({"init_lora_weights": "pissa_niter_4"}, "which changes the base model"),
    "bad start": ({"init_lora_weights": 3}, "init_lora_weights is 3"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "activated LoRA (aLoRA), which is not supp"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "replicated layers, which is not"),
    "lora bias": ({"lora_bias": True}, "a bias in lora_B, which is not supported"),
    "tokens": ({"trainable_token_indices": [5]}, "trained token embeddings, which is not supp"),
    "parameters": ({"target_parameters": ["w"]}, "LoRA on bare parameters, which is not supp"),
    "qalora": ({"use_qalora": True}, "QA-LoRA, which is not supported"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "LoftQ, which is not supported"),
    "unknown key": ({"use_wonder": {"x": 1}}, "use_wonder is {'x': 1}, a key that is not known"),
    "escape": ({"bell\x1b[31m\n": 1}, r"bell\x1b[31m\n is 1, a key that is not known"),
    "no regex": ({"target_modules": "(q_proj"}, "is not a regular expression"),
    "slow regex": ({"target_modules": SLOW}, "takes too long to match"),
    "slow pattern": ({"alpha_pattern": {SLOW: 1}}, "takes too long to match"),
    "long regex": ({"target_modules": "q" * 5000}, "5000 characters, expected 4096 at most"),
}
HARMLESS: dict[str, Any] = {
    "auto_mapping": {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    },
    "eva_config": {"rho": 2.0},
    "future_key": None,
    "future_list": [],
    "init_lora_weights": "gaussian",
    "lora_dropout": 0.1,
    "peft_version": "0.99.0",
    "runtime_config": {"ephemeral_gpu_offload": False},
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str,
    folder: Path,
    edit_config: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qlorachat.adapters.targets._SECONDS", 0.3)
    changes, expected = REFUSED[case]
    edit_config(**changes)
    with pytest.raises(AdapterError) as caught:
        check_header(folder)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{folder / 'adapter_config.json'}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless(key: str, folder: Path, edit_config: Callable[..., None]) -> None:
    before = read_adapter(folder)
    edit_config(**{key: HARMLESS[key]})
    after = read_adapter(folder)
    assert after.sha256 == before.sha256
    assert key not in after.peft_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON (Expecting value"),
        ("{", "is not JSON (Expecting property name"),
        ("[1]", "holds a JSON list; expected an object"),
        ("<!DOCTYPE html><html>", "is a web page, not the file itself: download it again"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("[" * 100_000, "is not JSON"),
        ('{"r": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (2**20 + 1), "has more than 1048576 bytes"),
    ],
)
def test_not_json(text: str, expected: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json ") as caught:
        check_header(folder)
    assert expected in str(caught.value)


def test_not_utf8(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    with pytest.raises(AdapterError, match="is not JSON"):
        check_header(folder)


def test_byte_order_mark_of_windows_editors(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    check_header(folder)


def test_no_config_says_what_is_there(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError) as caught:
        check_header(folder)
    assert "has no adapter_config.json; it holds README.md, adapter_model.safe" in str(caught.value)


def test_no_config_names_the_inner_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "output" / "checkpoint-12")
    with pytest.raises(AdapterError, match=r"checkpoint-12\.$"):
        check_header(tmp_path / "output")


def test_empty_missing_and_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="it is empty"):
        check_header(tmp_path / "empty")
    with pytest.raises(AdapterError, match="There is no folder"):
        check_header(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="is a file; expected the folder"):
        check_header(folder / "adapter_model.safetensors")


MALICIOUS: list[dict[str, Any]] = [
    {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil_module"}},
    {"auto_mapping": {"base_model_class": "Model", "parent_library": ["transformers.models."]}},
    {"auto_mapping": "evil_module"},
    {"megatron_core": "evil_module"},
    {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "evil_module"},
    {"auto_map": {"AutoModel": "evil_module.Model"}},
    {"custom_module": "evil_module"},
]


@pytest.mark.parametrize("changes", MALICIOUS)
def test_nothing_is_imported(
    changes: dict[str, Any],
    folder: Path,
    edit_config: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentinel = folder / "imported"
    code = f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()"
    (folder / "evil_module.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    edit_config(**changes)
    with pytest.raises(AdapterError, match=next(iter(changes))):
        read_adapter(folder)
    assert "evil_module" not in sys.modules
    assert not sentinel.exists()


def test_peft_config_is_rebuilt_from_checked_names(
    folder: Path, edit_config: Callable[..., None]
) -> None:
    edit_config(target_modules=r".*\.(q|v)_proj", lora_dropout=0.5, eva_config={"rho": 2.0})
    config = read_adapter(folder).peft_config
    assert config["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    assert json.loads(json.dumps(config)) == config
    assert config.keys().isdisjoint({"lora_dropout", "eva_config", "auto_mapping"})
