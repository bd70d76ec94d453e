"""Keys, ranks and shapes: config against tensors, and both against the base model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlorachat.adapters import check_header, inspect_adapter, read_adapter
from qlorachat.errors import AdapterError

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, int]]
EditTensors = Callable[[Callable[[Tensors], Any]], None]
EditConfig = Callable[..., None]

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def rename(tensors: Tensors, old: str, new: str) -> None:
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


def swap(tensors: Tensors) -> None:
    a, b = (Q0.replace("q_proj", f"v_proj.lora_{part}.weight") for part in "AB")
    tensors[a], tensors[b] = tensors[b], tensors[a]


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing B": (lambda it: it.pop(f"{Q0}.lora_B.weight"), f"lacks keys: {Q0}.lora_B.weight"),
    "missing A": (lambda it: it.pop(f"{Q0}.lora_A.weight"), f"lacks keys: {Q0}.lora_A.weight"),
    "nothing": (lambda it: it.clear(), "holds no LoRA"),
    "prefix lost": (lambda it: rename(it, "base_model.model.", ""), "has unexpected keys: model.l"),
    "adapter name kept": (
        lambda it: rename(it, ".weight", ".default.weight"),
        "and 3 more; expected base_model.model.MODULE.lora_A.weight",
    ),
    "extra weight": (
        lambda it: it.update({f"{Q0}.weight": torch.zeros(64, 64)}),
        f"has unexpected keys: {Q0}.weight; expected",
    ),
    "bias of B": (
        lambda it: it.update({f"{Q0}.lora_B.bias": torch.zeros(64)}),
        f"has unexpected keys: {Q0}.lora_B.bias",
    ),
    "magnitude without DoRA": (
        lambda it: it.update({f"{Q0}.lora_magnitude_vector": torch.zeros(64)}),
        "has unexpected keys",
    ),
    "escape in a key": (
        lambda it: it.update({"a\x1b[2J\nb": torch.zeros(1)}),
        r"has unexpected keys: a\x1b[2J\nb;",
    ),
    "embedding": (
        lambda it: it.update(
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 128)}
        ),
        "trains a LoRA on an embedding, which is not supported",
    ),
    "swapped": (swap, "do not fit together: model.layers.0.self_attn.v_proj (lora_A [32, 4], lor"),
    "one-dimensional": (
        lambda it: it.update({f"{Q0}.lora_A.weight": torch.zeros(256)}),
        "lora_A [256]",
    ),
    "convolution": (
        lambda it: it.update({f"{Q0}.lora_A.weight": torch.zeros(4, 64, 1, 1)}),
        "lora_A [4, 64, 1, 1]",
    ),
    "no input": (
        lambda it: it.update({f"{Q0}.lora_A.weight": torch.zeros(4, 0)}),
        "lora_A [4, 0]",
    ),
    "ranks of a pair": (
        lambda it: it.update({f"{Q0}.lora_B.weight": torch.ones(64, 8)}),
        "expected [rank, in] and [out, rank]",
    ),
    "not a target": (
        lambda it: rename(it, "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"),
        "modules that adapter_config.json does not target: model.layers.0.self_attn.k_proj;",
    ),
}


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        check_header(folder, **options)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert message in [it.message for it in inspect_adapter(folder, **options).findings]
    return message


@pytest.mark.parametrize("case", CHANGES)
def test_keys_and_pairs(case: str, folder: Path, edit_tensors: EditTensors) -> None:
    change, expected = CHANGES[case]
    edit_tensors(change)
    assert expected in refusal(folder)


def test_first_five_keys(folder: Path, edit_tensors: EditTensors) -> None:
    edit_tensors(lambda it: rename(it, "lora_", "LORA_"))
    message = refusal(folder)
    assert message.count("LORA_") == 5
    assert "and 3 more" in message


def test_rank_of_the_config(folder: Path, edit_config: EditConfig) -> None:
    edit_config(r=8)
    assert (
        "another rank than adapter_config.json says: model.layers.0.self_attn.q_proj (4, not 8)"
        in (refusal(folder))
    )
    edit_config(r=8, rank_pattern={"(q|v)_proj": 4})
    assert read_adapter(folder).settings.rank_pattern.keys() == set(
        read_adapter(folder).settings.target_modules
    )


def test_dora_needs_its_magnitudes(
    folder: Path, edit_config: EditConfig, edit_tensors: EditTensors
) -> None:
    edit_config(use_dora=True)
    assert f"lacks keys: {Q0}.lora_magnitude_vector" in refusal(folder)
    edit_tensors(
        lambda it: it.update(
            {
                key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(63)
                for key in list(it)
                if "lora_A" in key
            }
        )
    )
    assert "lora_magnitude_vector [63]" in refusal(folder)


def test_another_base_model(folder: Path, shapes: Shapes) -> None:
    larger = {name: (2 * size, 2 * size) for name, (size, _) in shapes.items()}
    message = refusal(folder, shapes=larger)
    assert "has shapes of another base model: model.layers.0.self_attn.q_proj" in message
    assert "(64 -> 64, not 128 -> 128)" in message


def test_base_with_fewer_layers(folder: Path, shapes: Shapes) -> None:
    fewer = {name: shape for name, shape in shapes.items() if "layers.1" not in name}
    message = refusal(folder, shapes=fewer)
    assert "modules that the base model does not have: model.layers.1.self_attn.q_proj" in message


def test_base_with_more_layers(folder: Path, shapes: Shapes) -> None:
    more = shapes | {name.replace("layers.1", "layers.2"): shape for name, shape in shapes.items()}
    message = refusal(folder, shapes=more)
    assert "lacks the LoRA of modules that adapter_config.json targets" in message
    assert "model.layers.2.self_attn.q_proj, model.layers.2.self_attn.v_proj;" in message


def test_target_without_tensors(folder: Path, edit_config: EditConfig, shapes: Shapes) -> None:
    edit_config(target_modules=["q_proj", "v_proj", "k_proj"])
    adapter = read_adapter(folder)
    assert len(adapter.warnings) == 1
    assert "has no LoRA on k_proj" in adapter.warnings[0]
    assert "lacks the LoRA of modules" in refusal(folder, shapes=shapes)
    edit_config(target_modules=["q_proj", "v_proj", "query_key_value"])
    assert read_adapter(folder, shapes=shapes).warnings == ()


def test_saved_modules(make_adapter: Callable[..., Path], shapes: Shapes) -> None:
    folder = make_adapter(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    with_embedding = shapes | {"model.embed_tokens": (64, 128)}
    adapter = read_adapter(folder, shapes=with_embedding)
    assert adapter.exclusive
    assert adapter.settings.modules_to_save == ("lm_head", "model.embed_tokens")
    resized = refusal(folder, shapes=with_embedding | {"lm_head": (130, 64)})
    assert (
        "saved modules in shapes of another base model: lm_head.weight ([128, 64], not [130, 64])"
        in resized
    )
    resized = refusal(folder, shapes=with_embedding | {"model.embed_tokens": (64, 130)})
    assert "model.embed_tokens.weight ([128, 64], not [130, 64])" in resized


@pytest.mark.parametrize("wrapped", ["lm_head.modules_to_save", "lm_head.default.original_module"])
def test_names_inside_of_peft_are_unexpected(
    wrapped: str, folder: Path, edit_config: EditConfig, edit_tensors: EditTensors
) -> None:
    edit_config(modules_to_save=["lm_head"])
    key = f"base_model.model.{wrapped}.weight"
    edit_tensors(lambda it: it.update({key: torch.zeros(128, 64)}))
    assert f"has unexpected keys: {key}" in refusal(folder)


def test_saved_modules_must_be_there(folder: Path, edit_config: EditConfig) -> None:
    edit_config(modules_to_save=["lm_head"])
    assert "lacks the weights of modules_to_save: lm_head" in refusal(folder)


def test_copies_of_the_base_are_left_out(make_adapter: Callable[..., Path]) -> None:
    adapter = read_adapter(make_adapter(target_modules=["q_proj", "lm_head"]))
    assert not any("base_layer" in key for key in adapter.tensors)
    assert "repeats the base model's weights of lm_head" in adapter.warnings[0]


@pytest.mark.parametrize(
    ("trained_on", "served", "warns"),
    [
        ("elyza/ELYZA-7b", "elyza/ELYZA-7b", False),
        ("elyza/ELYZA-7b", "/models/elyza-7B/", False),
        (r"C:\models\ELYZA-7b", "elyza/ELYZA-7b", False),
        ("/hub/models--elyza--ELYZA-7b/snapshots/0123abc", "elyza/ELYZA-7b", False),
        ("elyza/ELYZA-7b", "meta/Llama-2-7b", True),
        ("elyza/ELYZA-7b", None, False),
        (None, "meta/Llama-2-7b", False),
        ("", "meta/Llama-2-7b", False),
        ("/", "meta/Llama-2-7b", True),
    ],
)
def test_name_of_the_base(
    trained_on: str | None, served: str | None, warns: bool, folder: Path, edit_config: EditConfig
) -> None:
    edit_config(base_model_name_or_path=trained_on)
    warnings = read_adapter(folder, base_name=served).warnings
    assert len(warnings) == warns
    assert all("names the base model" in warning for warning in warnings)


def test_inspection_collects_everything(
    folder: Path, edit_config: EditConfig, edit_tensors: EditTensors, shapes: Shapes
) -> None:
    edit_tensors(lambda it: it[f"{Q0}.lora_A.weight"].fill_(float("nan")))
    edit_tensors(lambda it: it.update({"stray": torch.zeros(1)}))
    edit_config(bias="all", lora_bias=True, base_model_name_or_path="other/base")
    inspection = inspect_adapter(folder, shapes=shapes, base_name="this/one")
    assert [finding.level for finding in inspection.findings].count("error") == 4
    assert [finding.level for finding in inspection.findings].count("warning") == 1
    assert not inspection.ok
    for word in ("bias is 'all'", "lora_bias", "stray", "NaN", "other/base"):
        assert sum(word in finding.message for finding in inspection.findings) == 1


def test_facts_of_an_inspection(folder: Path, shapes: Shapes, edit_config: EditConfig) -> None:
    edit_config(base_model_name_or_path="elyza/ELYZA-7b")
    inspection = inspect_adapter(folder, shapes=shapes)
    assert inspection.ok
    assert (inspection.rank, inspection.alpha) == (4, 16)
    assert inspection.targets == ("q_proj", "v_proj")
    assert inspection.parameters == 2 * (4 * 64 + 64 * 4 + 4 * 64 + 32 * 4)
    assert inspection.size_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert str(inspection).splitlines() == [
        str(folder),
        "base model: elyza/ELYZA-7b",
        "rank: 4",
        "alpha: 16",
        "modules: q_proj, v_proj",
        "parameters: 1,792",
        "weights: 0.0 MB",
    ]


def test_inspection_of_nothing(tmp_path: Path) -> None:
    inspection = inspect_adapter(tmp_path)
    assert not inspection.ok
    assert "has no adapter_config.json" in str(inspection)
