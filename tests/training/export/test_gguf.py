"""GGUF: what is written reads back the same by several readers; what cannot, is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # made at import
    ModelProto,
    TrainerSpec,
)
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlorachat.checkpoints import Checkpoint, locate, read_tokenizer
from qlorachat.checkpoints.convert import GgufLlama
from qlorachat.checkpoints.demo import find_gguf
from qlorachat.errors import ConfigError
from qlorachat.training.export import gguf
from qlorachat.training.export.export import export_merged
from qlorachat.training.export.gguf import check_gguf, write_gguf
from tests.lora import write_lora

TEXT = "Zunda 1234 isn't\n  where  it wasん、だ。 "
SENTENCEPIECE_KEYS = (
    *("model", "pre", "tokens", "scores", "token_type", "add_space_prefix", "add_bos_token"),
    *("bos_token_id", "eos_token_id", "unknown_token_id"),
)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with SmolLM2's way to split text, and one merge in place of the zero byte."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["un"] = document["model"]["vocab"].pop("\u0100")
    document["model"]["merges"] = [["u", "n"]]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    config = {**names, "unk_token": "<|endoftext|>", "chat_template": "x", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama2_model(llama2_folder: Path, tmp_path: Path) -> Path:
    """A tiny model with Llama-2's vocabulary, an added token, and one row to spare."""
    folder = tmp_path / "llama2"
    config = LlamaConfig(
        vocab_size=32002,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(llama2_folder / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text('{"<pad>": 32000}')
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(folder: Path) -> Path:
    file = folder.parent / "out" / "model.gguf"
    write_gguf(locate(str(folder)), file)
    return file


def test_reads_back_the_same_by_our_reader(model: Path) -> None:
    source = GgufLlama(write(model))
    written = load_file(model / "model.safetensors")
    tensors = dict(source.tensors())
    assert tensors.keys() == written.keys()
    for name, weight in written.items():
        assert torch.equal(tensors[name], weight), name
    ours = json.loads((model / "config.json").read_text())
    ours["rms_norm_eps"] = pytest.approx(ours["rms_norm_eps"])  # a float32 in GGUF
    ours["pad_token_id"] = 2  # which the tokenizer alone says
    for key, value in source.config().items():
        assert value == ours[key], key
    ids, _ = read_tokenizer(model).encode(TEXT)
    assert len(ids) < len(TEXT.encode())  # merged somewhere
    assert source.tokenizer().encode(f"{TEXT}<|im_end|>").ids == [*ids, 2]
    assert source.tokenizer_config()["chat_template"] == "x"
    assert source.tokenizer_config()["unk_token"] == "<|endoftext|>"
    assert source.tokenizer_config()["add_bos_token"] is False


def test_tied_model_has_no_output_tensor(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    edit(model / "config.json", tie_word_embeddings=True)
    source = GgufLlama(write(model))
    assert source.config()["tie_word_embeddings"] is True
    assert dict(source.tensors()).keys() == weights.keys()


def test_transformers_reads_the_same_model(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))  # its tokenizer splits as GPT-2's
    file = write(folder)
    assert GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **source)
        for place, source in ((folder, {}), (file.parent, {"gguf_file": file.name}))
    )
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits)


def test_several_files_become_one(model: Path) -> None:
    whole = dict(GgufLlama(write(model)).tensors())
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="60KB")
    (model / "model.safetensors").unlink()
    assert len(list(model.glob("model-*.safetensors"))) > 1
    again = dict(GgufLlama(write(model)).tensors())
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.model
def test_demo_model_becomes_the_file_that_it_came_from(
    demo_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    origin = find_gguf()
    assert origin is not None
    file = tmp_path / "demo.gguf"
    write_gguf(demo_checkpoint, file)
    ours, theirs = GGUFReader(file).fields, GGUFReader(origin).fields
    compared = [key for key in theirs if key.startswith(("tokenizer.", "llama."))]
    assert len(compared) > 20
    for key in compared:
        assert ours[key].contents() == theirs[key].contents(), key
    tensors = dict(GgufLlama(file).tensors())
    for name, weight in GgufLlama(origin).tensors():
        assert torch.equal(tensors[name], weight), name


def test_llama2_vocabulary_equals_llama_cpp_s_own(llama2_folder: Path, llama2_model: Path) -> None:
    theirs = GGUFReader(llama2_folder / "ggml-vocab-llama-spm.gguf").fields
    ours = GGUFReader(write(llama2_model)).fields
    values = {key: ours[f"tokenizer.ggml.{key}"].contents() for key in SENTENCEPIECE_KEYS}
    assert values.pop("add_space_prefix") is True
    assert values["tokens"][32000:] == ["<pad>", "[PAD32001]"]
    assert values["token_type"][32000:] == [TokenType.USER_DEFINED, TokenType.UNUSED]
    for key, value in values.items():
        found = value[:32000] if isinstance(value, list) else value
        assert found == theirs[f"tokenizer.ggml.{key}"].contents(), key


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "have biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"),
        ({"vocab_size": 200}, "a token 258, but the model no more than 200"),
    ],
)
def test_models_without_a_place_are_refused(
    model: Path, changes: dict[str, Any], reason: str
) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(ConfigError, match=reason):
        check_gguf(locate(str(model)))


def test_unknown_ways_to_split_text_are_refused(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(ConfigError, match="none of those known here"):
        check_gguf(locate(str(model)))


def test_sentencepiece_without_its_file_is_refused(model: Path) -> None:
    edit(model / "tokenizer.json", decoder={"type": "ByteFallback"})
    with pytest.raises(ConfigError, match=r"no tokenizer\.model"):
        check_gguf(locate(str(model)))


def test_other_sentencepiece_models_are_refused(llama2_model: Path) -> None:
    path = llama2_model / "tokenizer.model"
    original = path.read_bytes()
    proto = ModelProto.FromString(original)
    proto.trainer_spec.model_type = TrainerSpec.UNIGRAM
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match="is no BPE"):
        check_gguf(locate(str(llama2_model)))
    proto = ModelProto.FromString(original)
    proto.normalizer_spec.name = "nmt_nfkc"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ConfigError, match="changes the text"):
        check_gguf(locate(str(llama2_model)))


def test_failed_write_leaves_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(model)
    before = file.read_bytes()

    def fail(weight: torch.Tensor, heads: int) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_permute", fail)  # among the tensors
    with pytest.raises(OSError, match="No space"):
        write(model)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_export_writes_both(model: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", model)
    export = export_merged(adapter, tmp_path / "merged", gguf=tmp_path / "merged.gguf", check=False)
    assert export.gguf is not None
    tensors = dict(GgufLlama(export.gguf).tensors())
    for name, weight in load_file(export.merged / "model.safetensors").items():
        assert torch.equal(tensors[name], weight), name


def test_export_refuses_gguf_first(model: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", model)
    taken = tmp_path / "taken.gguf"
    taken.write_text("mine")
    for place, reason in ((taken, "exists"), (tmp_path, "is a folder")):
        with pytest.raises(ConfigError, match=reason):
            export_merged(adapter, tmp_path / "merged", gguf=place, check=False)
    edit(model / "config.json", attention_bias=True)
    with pytest.raises(ConfigError, match="cannot be written as GGUF"):
        export_merged(adapter, tmp_path / "merged", gguf=tmp_path / "new.gguf", check=False)
    assert not (tmp_path / "merged").exists()
    assert taken.read_text() == "mine"
