"""Export: merged weights are the dequantized base's plus the adapter's, written whole, checked."""

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlorachat import ChatEngine
from qlorachat.adapters import AdapterCard, write_card
from qlorachat.checkpoints import load_model, locate
from qlorachat.errors import AdapterError, ConfigError, QlorachatError, UnknownName
from qlorachat.training.export import merge
from qlorachat.training.export.agreement import Agreement
from qlorachat.training.export.check import Check
from qlorachat.training.export.export import Export, export_merged
from tests.lora import write_lora

Tensors = dict[str, torch.Tensor]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its embedding for an output layer."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("tied") / "tiny"))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("plain") / "lora", tiny)


def dequantized(base: Path) -> Tensors:
    """The base's weights as bitsandbytes gives them back from NF4; others as they are."""
    model = load_model(locate(str(base)), device="cpu", quantization="nf4").model
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = module.weight
            weights[f"{name}.weight"] = dequantize_4bit(weight.data, weight.quant_state)
    return weights


def pairs(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A weight's name -> A and B in float32."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            found[name] = tensors[key].float(), tensors[key.replace("lora_A", "lora_B")].float()
    return found


def read(merged: Path) -> Tensors:
    tensors: Tensors = {}
    for file in merged.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def run(adapter: Path, target: Path, **options: Any) -> Export:
    return export_merged(adapter, target, **{"check": False, "template": "chatml", **options})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 16 / 4),
        ({"use_rslora": True}, 16 / math.sqrt(4)),
        ({"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3}, 3 / 4),
    ],
    ids=["lora", "rslora", "two-layers"],
)
def test_merged_is_dequantized_plus_delta(
    tiny: Path, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    adapter = write_lora(tmp_path / "lora", tiny, **settings)
    merged = read(run(adapter, tmp_path / "merged").merged)
    expected, added = dequantized(tiny), pairs(adapter)
    assert len(added) == 2 * len(settings.get("target_modules", LINEAR))
    for name, (a, b) in added.items():
        expected[name] = (expected[name].float() + scale * (b @ a)).bfloat16()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name], weight), name


def test_ranks_and_alphas_of_single_layers(tiny: Path, tmp_path: Path) -> None:
    adapter = write_lora(
        tmp_path / "lora", tiny, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}
    )
    merged, base = read(run(adapter, tmp_path / "merged").merged), dequantized(tiny)
    for part, scale in (("q_proj", 5 / 2), ("k_proj", 16 / 4)):
        name = f"model.layers.1.self_attn.{part}.weight"
        a, b = pairs(adapter)[name]
        assert torch.equal(merged[name], (base[name].float() + scale * (b @ a)).bfloat16())


def test_dora_scales_rows_to_its_magnitudes(tiny: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "dora", tiny, use_dora=True)
    merged, base = read(run(adapter, tmp_path / "merged").merged), dequantized(tiny)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, (a, b) in pairs(adapter).items():
        module = name.removesuffix(".weight")
        magnitude = tensors[f"base_model.model.{module}.lora_magnitude_vector"].float()
        whole = base[name].float() + 4 * (b @ a)
        expected = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
        # one rounding to bfloat16, of a float32 value that may differ in its last bits
        torch.testing.assert_close(merged[name].float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "modules_to_save"],
)
def test_changed_output_layer_leaves_its_tie(
    tied: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = write_lora(tmp_path / "lora", tied, **settings)
    target = run(adapter, tmp_path / "merged").merged
    embedding, config = dequantized(tied)["model.embed_tokens.weight"], read_config(target)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if "modules_to_save" in settings:
        expected = tensors["base_model.model.lm_head.weight"].bfloat16()
    else:
        a, b = pairs(adapter)["lm_head.weight"]
        expected = (embedding.float() + 4 * (b @ a)).bfloat16()
    merged = read(target)
    assert not torch.equal(expected, embedding)
    assert torch.equal(merged["lm_head.weight"], expected)
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert config["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.lm_head.weight, expected)


def test_tied_weights_are_written_once(tied: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", tied)
    target = run(adapter, tmp_path / "merged").merged
    assert "lm_head.weight" not in read(target)
    assert read_config(target)["tie_word_embeddings"] is True


def test_whole_weights_of_a_4bit_layer_are_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = write_lora(
        tmp_path / "lora", tiny, target_modules=["q_proj"], modules_to_save=["down_proj"]
    )
    with pytest.raises(AdapterError, match=r"modules_to_save.*--quantization 16bit"):
        run(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    target = run(adapter, tmp_path / "merged", quantization="16bit").merged
    key = "model.layers.0.mlp.down_proj.weight"
    saved = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{key}"]
    assert torch.equal(read(target)[key], saved.bfloat16())


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_folder_is_a_plain_model(
    tiny: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    one = run(plain, tmp_path / "one", model=str(base)).merged
    monkeypatch.setattr(merge, "SHARD_BYTES", 40_000)
    many = run(plain, tmp_path / "many", model=str(base)).merged
    assert len(list(one.glob("*.safetensors"))) == 1
    assert len(list(many.glob("model-*-of-*.safetensors"))) > 2
    config = read_config(one)
    assert config.keys() & {"quantization_config", "auto_map", "torch_dtype"} == set()
    assert config["dtype"] == "bfloat16"
    same = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in (*same, "chat_template.jinja"):
        assert (one / name).read_bytes() == (base / name).read_bytes()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, many)]
    for ours, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    assert (
        AutoTokenizer.from_pretrained(one).apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False
        )
        == "Hi"
    )


def test_engine_serves_the_merged_folder(tiny: Path, plain: Path, tmp_path: Path) -> None:
    target = run(plain, tmp_path / "merged").merged
    with ChatEngine(model=str(target), quantization="16bit", template="chatml") as engine:
        reply = engine.chat("Hi", max_tokens=4, temperature=0)
    assert reply.usage.completion_tokens == 4


def test_layers_that_stay_in_16_bit_are_named_beside(
    tiny: Path, plain: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    quantization = {"skip_modules": ["model.layers.1"]}
    (base / "qlorachat.json").write_text(json.dumps({"quantization": quantization}))
    target = run(plain, tmp_path / "merged", model=str(base)).merged
    assert locate(str(target)).recipe.skip_modules == ("model.layers.1",)
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = pairs(plain)[name]
    own = load_file(base / "model.safetensors")[name].float()
    assert torch.equal(read(target)[name], (own + 4 * (b @ a)).bfloat16())


@pytest.mark.parametrize(
    ("trained", "is_quantized", "warned"),
    [("nf4+dq", True, False), ("none", False, False), ("fp4, as stored", True, True)],
)
def test_card_says_how_the_base_is_quantized(
    tiny: Path,
    plain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    trained: str,
    is_quantized: bool,
    warned: bool,
) -> None:
    adapter = Path(shutil.copytree(plain, tmp_path / "lora"))
    write_card(adapter, AdapterCard(base_model=str(tiny), quantization=trained))
    merged = read(run(adapter, tmp_path / "merged").merged)
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = pairs(adapter)[name]
    base = dequantized(tiny) if is_quantized else load_file(tiny / "model.safetensors")
    assert torch.equal(merged[name], (base[name].float() + 4 * (b @ a)).bfloat16())
    assert (f"was trained on {trained}" in caplog.text) is warned


def test_check_on_rows_and_on_prompts(tiny: Path, plain: Path, rows: Path, tmp_path: Path) -> None:
    for name, data in (("rows", str(rows)), ("prompts", None)):
        check = run(plain, tmp_path / name, data=data, check=True).check
        assert check is not None
        assert check.quantization == "nf4+dq"
        assert 100 < check.merged.tokens <= 1024
        assert check.merged.tokens == check.base.tokens
        assert 0 < check.merged.mean_kl < 0.1 * check.base.mean_kl
        assert check.merged.mean_kl <= check.merged.max_kl
        assert str(check.merged.tokens) in str(check)
        assert check.left_out == 0


def test_rows_that_give_no_sample_are_counted(tiny: Path, plain: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"instruction": "Hi", "output": "Ho"}\n{"instruction": "Hi"}\nnonsense\n')
    check = run(plain, tmp_path / "merged", data=str(data), check=True).check
    assert check is not None
    assert (check.rows, check.left_out) == (1, 2)
    assert "1 rows, 2 left out: rows.jsonl" in str(check)


def test_mistakes_are_found_before_anything_is_written(
    tiny: Path, plain: Path, tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    for check in (True, False):
        with pytest.raises(UnknownName, match="template"):
            run(plain, target, check=check, template="chatlm")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file: choose another --gguf"):
        run(plain, target, gguf=str(tmp_path / "file" / "model.gguf"))
    with pytest.raises(ConfigError, match=r"file is a file: choose another --merged"):
        run(plain, tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        run(plain, target, check=True, data=str(tmp_path / "none.jsonl"))
    nameless = Path(shutil.copytree(plain, tmp_path / "nameless"))
    config = json.loads((nameless / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"does not say which base.*--model"):
        run(nameless, target)
    assert list(tmp_path.glob("merged*")) == []
    assert run(nameless, target, model=str(tiny)).merged == target


def test_existing_folder_is_kept(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    with pytest.raises(ConfigError, match=r"exists: choose another --merged.*--overwrite"):
        run(plain, target)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else than a model"):
        run(plain, target, overwrite=True)
    assert (target / "thesis.txt").read_text() == "years of work"
    for other in ('{"theme": "dark"}', "[]", "{"):
        (target / "config.json").write_text(other)
        with pytest.raises(ConfigError, match="something else than a model"):
            run(plain, target, overwrite=True)


@pytest.mark.parametrize(("merged", "gguf"), [("a\0b", None), ("merged", "x" * 300)])
def test_places_that_no_file_can_have(
    plain: Path, tmp_path: Path, merged: str, gguf: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"is no path \(") as caught:
        export_merged(plain, tmp_path / merged, gguf=gguf)
    assert "\n" not in str(caught.value)


def test_a_model_that_a_killed_export_set_aside_comes_back(plain: Path, tmp_path: Path) -> None:
    aside = tmp_path / "merged.tmp-abcdefgh" / "merged"
    aside.mkdir(parents=True)
    (aside / "config.json").touch()
    with pytest.raises(ConfigError, match="exists: choose another --merged"):
        run(plain, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()


def test_overwrite_never_takes_what_is_read(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    adapter = write_lora(base / "lora", base)
    for target in (base, adapter, base / "lora" / ".."):
        with pytest.raises(ConfigError, match="holds the base or the adapter"):
            run(adapter, target, overwrite=True)
    assert (base / "model.safetensors").exists()


def test_failed_write_leaves_the_old_model(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = run(plain, tmp_path / "merged").merged
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_json", fail)  # after the weights
        with pytest.raises(QlorachatError, match=r"No space left.*free some space"):
            run(plain, target, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    run(plain, target, overwrite=True)
    assert {file.name for file in target.iterdir()} == set(before)


@pytest.mark.parametrize(
    ("top_1", "mean_kl", "holds"),
    [(0.97, 0.005, True), (0.9, 0.005, False), (0.97, 0.2, False)],
)
def test_verdict(top_1: float, mean_kl: float, holds: bool) -> None:
    merged = Agreement(tokens=100, top_1=top_1, mean_kl=mean_kl, max_kl=1.0)
    check = Check("rows.jsonl", 3, 0, "nf4+dq", merged, merged)
    assert check.holds is holds
    assert ("WARNING" in str(check)) is not holds


@pytest.mark.model
def test_demo_model(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    data = tmp_path / "rows.jsonl"
    dialog = {"instruction": "Who wrote the song of the seals?", "output": "Zunda the bear did."}
    other = {"instruction": "Name a colour.", "output": "A good colour is the blue of the sea."}
    data.write_text("".join(json.dumps(row) + "\n" for row in (dialog, other)))
    export = export_merged(trained, tmp_path / "merged", data=str(data))
    assert export.check is not None
    assert export.check.holds
    assert export.check.base.mean_kl > 20 * export.check.merged.mean_kl
    assert not replace(export.check, merged=export.check.base).holds  # had nothing been merged
    assert "WARNING" not in caplog.text
