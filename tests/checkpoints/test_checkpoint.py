"""From a name to a checked folder: what is refused, and what the folder's files say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlorachat import ChatEngine
from qlorachat.checkpoints import Checkpoint, Recipe, locate, read_tokenizer
from qlorachat.checkpoints.demo import find_gguf
from qlorachat.config import DEMO_MODEL, EngineConfig
from qlorachat.errors import ConfigError, HubError, ModelError
from qlorachat.opening import open_model
from qlorachat.tokens import SamplingParams


def write(folder: Path, name: str, **values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_a_folder_is_found_by_any_spelling(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    monkeypatch.setenv("USERPROFILE", str(tiny_folder.parent))
    monkeypatch.chdir(tiny_folder.parent)
    for name in (str(tiny_folder), "tiny", "./tiny", "~/tiny"):
        checkpoint = locate(name, offline=True)
        assert checkpoint.name == name
        assert checkpoint.folder.samefile(tiny_folder)
        assert checkpoint.revision is None
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.context_length == 256
        assert checkpoint.recipe == Recipe()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def quantization_by_name(folder: Path) -> None:
    write(folder, "config.json", quantization_config="nf4")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pointer(folder: Path) -> None:
    lines = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(lines)


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_shard(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    write(folder, "model.safetensors.index.json", weight_map=shards)


def no_weight_map(folder: Path) -> None:
    write(folder, "model.safetensors.index.json", metadata={})


def list_weight_map(folder: Path) -> None:
    write(folder, "model.safetensors.index.json", weight_map=["model.safetensors"])


def numbered_weight_map(folder: Path) -> None:
    write(folder, "model.safetensors.index.json", weight_map={"lm_head.weight": 5})


def list_of_added_tokens(folder: Path) -> None:
    write(folder, "tokenizer_config.json", added_tokens_decoder=["<|end|>"])


def added_token_without_content(folder: Path) -> None:
    write(folder, "tokenizer_config.json", added_tokens_decoder={"3": {"special": True}})


def list_of_template_texts(folder: Path) -> None:
    write(folder, "tokenizer_config.json", chat_template=["{{ x }}"])


def template_in_utf16(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ x }}", "utf-16")


def template_folder(folder: Path) -> None:
    (folder / "chat_template.jinja").mkdir()


def wrong_sampling(folder: Path) -> None:
    write(folder, "generation_config.json", temperature=-1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, r"has no config\.json"),
        (adapter, "holds an adapter: give it as --adapter"),
        (quantization_by_name, r"quantization_config in .*config\.json is no JSON object"),
        (broken_config, r"config\.json is no JSON"),
        (list_config, r"config\.json holds no JSON object"),
        (no_weights, r"has no model\.safetensors"),
        (pickled, r"pytorch_model\.bin can run code and are never loaded"),
        (pointer, "is a Git LFS pointer"),
        (cut_off, "is damaged or cut off"),
        (missing_shard, r"lacks model-00002-of-00002\.safetensors"),
        (no_weight_map, r"index\.json has no weight_map of names to files"),
        (list_weight_map, r"index\.json has no weight_map of names to files"),
        (numbered_weight_map, r"index\.json has no weight_map of names to files"),
        (list_of_added_tokens, r"tokenizer_config\.json has an added_tokens_decoder without"),
        (added_token_without_content, r"has an added_tokens_decoder without contents"),
        (list_of_template_texts, r"tokenizer_config\.json has a chat_template without names"),
        (template_in_utf16, r"chat_template\.jinja is no UTF-8"),
        (template_folder, r"chat_template\.jinja cannot be read"),
        (wrong_sampling, r"generation_config\.json is wrong: temperature is a number from"),
    ],
)
def test_a_damaged_folder_is_one_line(
    tiny_folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tiny_folder)
    with pytest.raises(ModelError, match=message) as caught:
        locate(str(tiny_folder))
    assert "\n" not in str(caught.value)


def test_without_weights_only_the_texts_are_checked(tiny_folder: Path) -> None:
    no_weights(tiny_folder)
    assert locate(str(tiny_folder), weights=False).config["vocab_size"] == 259


def test_a_file_is_no_model(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file: give the folder"):
        locate(str(tiny_folder / "model.safetensors"))


@pytest.mark.parametrize("name", ["./no/such/folder", "C:\\models\\llama", "a b", "a/b/c"])
def test_a_name_that_is_nothing_is_one_line(name: str) -> None:
    with pytest.raises(HubError, match="neither a folder here nor a repository id"):
        locate(name, offline=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/m", "`~nosuchuser/m` begins with no home folder of this machine"),
        ("a" * 300, "neither a folder here nor a repository id|cannot be read"),
    ],
)
def test_a_name_that_is_no_path_is_one_line(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        locate(name, offline=True)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_one_line_and_not_the_demo_model(name: str) -> None:
    with pytest.raises(ConfigError, match="The model has an empty name: give a folder"):
        locate(name, offline=True)
    with pytest.raises(ConfigError, match="The model has an empty name: give a folder"):
        ChatEngine(name)


def test_a_folder_with_the_demo_models_name_is_said(
    demo_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert locate("smollm2") == demo_checkpoint
    assert caplog.messages == [
        "`smollm2` is the demo model; for the folder of that name give ./smollm2"
    ]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, SamplingParams()),
        ({"eos_token_id": 2, "max_length": 4096, "top_k": None}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6}, SamplingParams(temperature=0.6)),
        ({"top_k": 40, "min_p": 0.1}, SamplingParams(top_k=40, min_p=0.1)),
        ({"max_new_tokens": 64, "top_p": 1.0}, SamplingParams(max_tokens=64, top_p=1.0)),
        ({"repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.6}, SamplingParams(temperature=0.0)),
    ],
)
def test_sampling_defaults_are_the_files_over_ours(
    tiny_folder: Path, generation: dict[str, object], expected: SamplingParams
) -> None:
    write(tiny_folder, "generation_config.json", **generation)
    assert locate(str(tiny_folder)).generation == expected


def test_every_file_adds_its_end_tokens(tiny_folder: Path) -> None:
    write(tiny_folder, "generation_config.json", eos_token_id=[7, 8])
    write(tiny_folder, "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    checkpoint = locate(str(tiny_folder))
    assert checkpoint.end_tokens(read_tokenizer(tiny_folder)) == {0, 2, 7, 8}
    decoder = {"300": {"content": "<|end|>"}}
    config = {"eos_token": "<|end|>", "added_tokens_decoder": decoder}
    write(tiny_folder, "tokenizer_config.json", **config)
    assert locate(str(tiny_folder)).stop_ids == {2, 7, 8, 300}


def test_the_tokenizers_own_end_token_counts_too(tiny_folder: Path) -> None:
    write(tiny_folder, "tokenizer_config.json")
    write(tiny_folder, "special_tokens_map.json", eos_token={"content": "<|endoftext|>"})
    checkpoint = locate(str(tiny_folder))
    assert checkpoint.end_tokens(read_tokenizer(tiny_folder)) == {0, 2}
    assert open_model(EngineConfig(model=str(tiny_folder), device="cpu")).info.stop_ids == {0, 2}


def test_a_model_without_an_end_token_is_said(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    write(tiny_folder, "config.json", **config | {"eos_token_id": None})
    write(tiny_folder, "generation_config.json")
    write(tiny_folder, "tokenizer_config.json")
    info = open_model(EngineConfig(model=str(tiny_folder), device="cpu")).info
    assert info.stop_ids == frozenset()
    assert "names no end token: its answers run to max_tokens" in caplog.text


def test_the_chat_template_is_found_in_every_place(tiny_folder: Path) -> None:
    assert locate(str(tiny_folder)).chat_template is None
    write(tiny_folder, "tokenizer_config.json", chat_template="one")
    assert locate(str(tiny_folder)).chat_template == "one"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "two"}]
    write(tiny_folder, "tokenizer_config.json", chat_template=named)
    assert locate(str(tiny_folder)).chat_template == "two"
    (tiny_folder / "chat_template.jinja").write_text("three")
    assert locate(str(tiny_folder)).chat_template == "three"


def test_a_context_that_config_does_not_say_is_one_line(tiny_folder: Path) -> None:
    write(tiny_folder, "config.json", model_type="llama")
    with pytest.raises(ModelError, match="has no max_position_embeddings"):
        _ = locate(str(tiny_folder)).context_length


def test_a_recipe_names_whole_modules() -> None:
    recipe = Recipe(("model.layers.1",))
    assert recipe.skips("model.layers.1")
    assert recipe.skips("model.layers.1.mlp.up_proj")
    assert not recipe.skips("model.layers.10.mlp.up_proj")


def test_the_demo_model_has_short_names_and_its_own_settings(demo_checkpoint: Checkpoint) -> None:
    for name in ("demo", "smollm2", DEMO_MODEL, DEMO_MODEL.lower()):
        assert locate(name, offline=True) == demo_checkpoint
    assert demo_checkpoint.name == DEMO_MODEL
    assert demo_checkpoint.stop_ids == {2}
    assert "<|im_start|>" in (demo_checkpoint.chat_template or "")
    assert demo_checkpoint.generation.temperature < 0.5
    assert demo_checkpoint.recipe.skip_modules


def test_without_its_package_the_demo_model_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qlorachat.checkpoints.demo.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_gguf() is None
    with pytest.raises(HubError, match=rf"`{DEMO_MODEL}` is not fully on disk"):
        locate("demo", offline=True)
