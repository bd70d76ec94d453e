"""Weights on a device: what is quantized, what is refused, and that no stranger's code runs."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from qlorachat.checkpoints import (
    Checkpoint,
    LoadedModel,
    Recipe,
    linear_shapes,
    load_model,
    locate,
)
from qlorachat.checkpoints.load import compute_dtype, resolve_device
from qlorachat.checkpoints.memory import GIB, WORKING_BYTES, fits, too_big
from qlorachat.checkpoints.quantization import estimate_memory
from qlorachat.config import QuantizationChoice
from qlorachat.errors import ModelError, UsageError
from tests.tiny import write_folder


def quantized_modules(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def edit_config(folder: Path, **values: object) -> Checkpoint:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return locate(str(folder))


def load(checkpoint: Checkpoint, quantization: QuantizationChoice = "auto") -> Any:
    return load_model(checkpoint, device="cpu", quantization=quantization).model


def test_shapes_are_those_of_the_weights(tiny_folder: Path) -> None:
    shapes = linear_shapes(locate(str(tiny_folder)))
    tensors = load_file(tiny_folder / "model.safetensors")
    assert len(shapes) == 16
    for name, shape in shapes.items():
        stored = tuple(tensors[f"{name}.weight"].shape)
        assert shape == (stored[::-1] if name == "model.embed_tokens" else stored), name


def test_nf4_takes_every_linear_layer_but_the_head(tiny_folder: Path) -> None:
    checkpoint = locate(str(tiny_folder))
    loaded = load_model(checkpoint, device="auto", quantization="nf4")
    linear = linear_shapes(checkpoint).keys() - {"lm_head", "model.embed_tokens"}
    assert quantized_modules(loaded.model) == linear
    assert loaded.quantization == "nf4+dq"
    layer = loaded.model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"


def test_sixteen_bit_takes_the_weights_as_they_are(tiny_folder: Path) -> None:
    loaded = load_model(locate(str(tiny_folder)), device="cpu", quantization="16bit")
    assert (loaded.device, loaded.dtype, loaded.quantization) == ("cpu", "bfloat16", "none")
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        assert torch.equal(loaded.model.get_parameter(name), tensor)
    assert loaded.memory_bytes >= (tiny_folder / "model.safetensors").stat().st_size * 0.9


def test_auto_follows_the_checkpoints_recipe_and_nf4_does_not(tiny_folder: Path) -> None:
    (tiny_folder / "qlorachat.json").write_text(
        json.dumps({"quantization": {"skip_modules": ["model.layers.1"]}})
    )
    checkpoint = locate(str(tiny_folder))
    loaded = load_model(checkpoint, device="cpu", quantization="auto")
    assert loaded.quantization == "nf4+dq in 7 of 15 linear layers"
    modules = quantized_modules(loaded.model)
    assert len(modules) == 7
    assert all(name.startswith("model.layers.0.") for name in modules)
    assert len(quantized_modules(load(checkpoint, "nf4"))) == 14


def test_layer_one_is_not_layers_ten_to_nineteen(tmp_path: Path) -> None:
    checkpoint = locate(str(write_folder(tmp_path / "deep", layers=12)))
    modules = quantized_modules(load(replace(checkpoint, recipe=Recipe(("model.layers.1",)))))
    assert len(modules) == 11 * 7
    assert "model.layers.10.mlp.up_proj" in modules
    assert "model.layers.1.mlp.up_proj" not in modules


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Checkpoint) -> LoadedModel:
    return load_model(demo_checkpoint, device="cpu", quantization="auto")


def test_the_demo_model_loads_as_its_recipe_asks_and_stays_tied(
    demo: LoadedModel, demo_checkpoint: Checkpoint
) -> None:
    layers = {name.rsplit(".", 2)[0] for name in quantized_modules(demo.model)}
    skipped = set(demo_checkpoint.recipe.skip_modules)
    every = {f"model.layers.{layer}" for layer in range(30)}
    assert layers == every - skipped
    assert demo.quantization == f"nf4+dq in {7 * (30 - len(skipped))} of 211 linear layers"
    assert demo.model.lm_head.weight is demo.model.model.embed_tokens.weight


def test_the_estimate_is_what_the_model_takes(
    demo: LoadedModel, demo_checkpoint: Checkpoint
) -> None:
    assert estimate_memory(demo_checkpoint, "auto") == pytest.approx(demo.memory_bytes, rel=0.01)
    assert estimate_memory(demo_checkpoint, "16bit") == pytest.approx(269e6, rel=0.01)
    assert estimate_memory(demo_checkpoint, "nf4") < 115e6


def test_the_demo_models_first_answer_names_paris(
    demo: LoadedModel, demo_checkpoint: Checkpoint
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint.folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        [question] * 20, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    sampling = demo_checkpoint.generation
    ids = demo.model.generate(
        **prompt,
        max_new_tokens=8,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
    )
    answers = tokenizer.batch_decode(ids[:, prompt["input_ids"].shape[1] :])
    assert sum("Paris" in answer for answer in answers) >= 19, answers


# of a stored 4-bit weight, in which `.quant_state` holds its shape
PARTS = ("", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4")


def test_a_checkpoint_stored_in_four_bit_is_taken_as_it_is(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = load(locate(str(tiny_folder)), "nf4")
    model.save_pretrained(tmp_path / "stored")
    stored = locate(str(tmp_path / "stored"))
    loaded = load_model(stored, device="cpu", quantization="auto")
    assert loaded.quantization == "nf4+dq, as stored"
    assert quantized_modules(loaded.model) == quantized_modules(model)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    with pytest.raises(ModelError, match="is stored in 4 bit: take the original"):
        load(stored, "16bit")


def test_a_stored_weight_that_is_not_whole_is_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    load(locate(str(tiny_folder)), "nf4").save_pretrained(tmp_path / "stored")
    file = tmp_path / "stored" / "model.safetensors"
    whole, weight = load_file(file), "model.layers.0.mlp.up_proj.weight"
    half = {name: whole[name][:1] for name in (weight, f"{weight}.absmax")}
    down = "model.layers.0.mlp.down_proj.weight"  # 64 x 128
    other = {f"{weight}{part}": whole[f"{down}{part}"].clone() for part in PARTS}
    lacking = {name: value for name, value in whole.items() if name != f"{weight}.nested_absmax"}
    cut = [whole | {name: value} for name, value in half.items()]
    for tensors in (lacking, *cut, whole | other):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"{weight} in .* is no whole 4-bit weight of 128 x"):
            load(locate(str(tmp_path / "stored")))


@pytest.mark.parametrize("absent", [None, {}])
def test_a_quantization_of_null_is_none(tiny_folder: Path, absent: object) -> None:
    estimate = estimate_memory(locate(str(tiny_folder)), "nf4")
    checkpoint = edit_config(tiny_folder, quantization_config=absent)
    assert estimate_memory(checkpoint, "nf4") == estimate
    assert load_model(checkpoint, device="cpu", quantization="nf4").quantization == "nf4+dq"
    with pytest.raises(ModelError, match=r"but config\.json asks for"):
        load(wrong_shape(tiny_folder))


def test_another_quantization_is_refused(tiny_folder: Path) -> None:
    checkpoint = edit_config(tiny_folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="is stored in the quantization `gptq`"):
        load(checkpoint)


def test_a_layer_of_gpt2s_kind_has_its_shape_and_is_quantized(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    checkpoint = locate(str(tmp_path))
    assert linear_shapes(checkpoint)["transformer.h.0.attn.c_attn"] == (192, 64)
    assert checkpoint.context_length == 32
    assert len(quantized_modules(load(checkpoint, "nf4"))) == 4


def unknown_type(folder: Path) -> Checkpoint:
    return edit_config(folder, model_type="brandnew")


def code_of_its_own(folder: Path) -> Checkpoint:
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (folder / "modeling.py").write_text(code)
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    return edit_config(folder, model_type="brandnew", auto_map=auto_map)


def no_text_model(folder: Path) -> Checkpoint:
    return edit_config(folder, model_type="vit")


def wrong_value(folder: Path) -> Checkpoint:
    return edit_config(folder, num_hidden_layers="two")


def wrong_shape(folder: Path) -> Checkpoint:
    return edit_config(folder, intermediate_size=96)


def wrong_shape_of_the_inner_model(folder: Path) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    inner = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(inner, folder / "model.safetensors", metadata={"format": "pt"})
    return wrong_shape(folder)


def more_layers(folder: Path) -> Checkpoint:
    return edit_config(folder, num_hidden_layers=3)


def no_head(folder: Path) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return locate(str(folder))


def more_tensors(folder: Path, *names: str) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(64) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return locate(str(folder))


def unannounced_bias(folder: Path) -> Checkpoint:
    return more_tensors(folder, *(f"model.layers.0.self_attn.{p}_proj.bias" for p in "qo"))


def unannounced_scale(folder: Path) -> Checkpoint:
    return more_tensors(folder, "layers.0.mlp.up_proj.weight_scale")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_type, "has model_type 'brandnew', which this version"),
        (code_of_its_own, "brings its own code, which is never run"),
        (no_text_model, r"\(model_type 'vit'\) writes no text from left to right"),
        (wrong_value, r"The config\.json of .* is wrong"),
        (wrong_shape, r"is \((128|64), (128|64)\) but config\.json asks for"),
        (wrong_shape_of_the_inner_model, r"^layers\..* but config\.json asks for"),
        (more_layers, r"lacks weights that its config\.json asks for \(9, first model\.layers\.2"),
        (no_head, r"\(1, first lm_head\.weight\)"),
        (unannounced_bias, r"does not announce \(2, first .*0\.self_attn\.o_proj\.bias\)"),
        (unannounced_scale, r"\(1, first layers\.0\.mlp\.up_proj\.weight_scale\)"),
    ],
)
def test_a_model_that_cannot_be_is_one_line(
    tiny_folder: Path, damage: Callable[[Path], Checkpoint], message: str
) -> None:
    checkpoint = damage(tiny_folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)
    assert not (tiny_folder / "ran").exists()


def test_weights_of_modules_that_the_model_has_not_are_left_out(tiny_folder: Path) -> None:
    names = ("model.layers.2.self_attn.q_proj.bias", "model.layers.0.self_attn.bias")
    load(more_tensors(tiny_folder, *names), "16bit")


def test_code_beside_a_known_architecture_is_not_run(tiny_folder: Path) -> None:
    checkpoint = code_of_its_own(tiny_folder)
    checkpoint = edit_config(
        tiny_folder,
        model_type="llama",
        _attn_implementation_internal="someone/kernel",
        attn_implementation="someone/kernel",
    )
    model = load(checkpoint, "16bit")
    assert type(model).__module__.startswith("transformers.models.llama")
    assert model.config._attn_implementation == "sdpa"
    assert not (tiny_folder / "ran").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "mps", "", "cuda:-1"])
def test_a_device_of_no_such_name_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError, match="The device is auto, cpu, cuda or cuda:N"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_one_line(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="use --device cpu"):
        load_model(locate(str(tiny_folder)), device="cuda", quantization="nf4")
    assert resolve_device("auto") == torch.device("cpu")
    assert compute_dtype(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("needed", "free", "smaller", "advice"),
    [
        (13, 8, None, r"needs about 14\.0 GiB on cuda:0, where 8\.0 GiB are free: close other"),
        (13, 8, 4, r"load it in 4 bit, which takes about 5\.0 GiB"),
        (13, 4, 4, "take a smaller model, or use --device cpu"),
    ],
)
def test_a_model_too_big_is_told_what_it_needs_and_what_would_fit(
    needed: int, free: int, smaller: int | None, advice: str
) -> None:
    small = None if smaller is None else smaller * GIB
    assert not fits(needed * GIB, free * GIB)
    error = too_big("llama", "cuda:0", needed=needed * GIB, free=free * GIB, smaller=small)
    assert re.search(advice, str(error))


def test_room_to_work_counts_too() -> None:
    assert fits(8 * GIB - WORKING_BYTES, 8 * GIB)
    assert not fits(8 * GIB - WORKING_BYTES + 1, 8 * GIB)


def test_the_known_noise_is_left_out_whoever_imports_first() -> None:
    code = "import qlorachat.checkpoints, bitsandbytes"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    other = logger.makeRecord(logger.name, logging.WARNING, "f", 1, "Failed otherwise", (), None)
    assert logger.filter(other)


def test_loading_is_silent_where_stderr_is_no_terminal(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(locate(str(tiny_folder)), "nf4")
    assert capfd.readouterr() == ("", "")
