"""A Llama GGUF file becomes a plain checkpoint folder, tensor by tensor and bit for bit.

The tensors equal what transformers' own GGUF reader gives; one pass over the file takes seconds.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of control tokens


class GgufLlama:
    """A GGUF file of the Llama architecture with a byte-level BPE vocabulary, opened for reading.

    Source of names and values: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs.
    """

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        assert self._value("general.architecture") == "llama"
        assert self._value("tokenizer.ggml.model") == "gpt2"
        assert self._value("tokenizer.ggml.pre") == "smollm"

    def _value(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def config(self) -> dict[str, Any]:
        """transformers' config.json of the model."""
        heads = self._value("llama.attention.head_count")
        tied = all(tensor.name != "output.weight" for tensor in self._reader.tensors)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._value("llama.vocab_size"),
            "hidden_size": self._value("llama.embedding_length"),
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv"),
            "head_dim": self._value("llama.embedding_length") // heads,
            "max_position_embeddings": self._value("llama.context_length"),
            "rms_norm_eps": self._value("llama.attention.layer_norm_rms_epsilon"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self._value("llama.rope.freq_base"),
            },
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
            "dtype": "bfloat16",
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._value("tokenizer.ggml.padding_token_id"),
        }

    @property
    def tensor_count(self) -> int:
        return len(self._reader.tensors)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in bfloat16 under transformers' name."""
        heads = {
            "attn_q": self._value("llama.attention.head_count"),
            "attn_k": self._value("llama.attention.head_count_kv"),
        }
        for tensor in self._reader.tensors:
            weight = np.array(dequantize(tensor.data, tensor.tensor_type))
            part = tensor.name.split(".")[-2]
            if part in heads:
                weight = _unpermute(weight, heads[part])
            yield _transformers_name(tensor.name), torch.from_numpy(weight).bfloat16()

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer: single digits, then GPT-2's split, as `smollm` says."""
        pieces: list[str] = self._value("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds: list[int] = self._value("tokenizer.ggml.token_type")
        control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens(
            [AddedToken(piece, special=True, normalized=False) for piece in control]
        )
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """transformers' tokenizer_config.json, with the file's chat template."""
        pieces: list[str] = self._value("tokenizer.ggml.tokens")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": pieces[self._value("tokenizer.ggml.bos_token_id")],
            "eos_token": pieces[self._value("tokenizer.ggml.eos_token_id")],
            "pad_token": pieces[self._value("tokenizer.ggml.padding_token_id")],
            "unk_token": pieces[self._value("tokenizer.ggml.unknown_token_id")],
            "model_max_length": self._value("llama.context_length"),
            "add_bos_token": self._value("tokenizer.ggml.add_bos_token"),
            "clean_up_tokenization_spaces": False,
            "chat_template": self._value("tokenizer.chat_template"),
        }


def write_checkpoint(
    source: GgufLlama, tensors: Iterable[tuple[str, torch.Tensor]], folder: Path
) -> None:
    """Fill `folder` from an open file; `tensors` are its tensors, as the caller watches them.

    Raises OSError.
    """
    try:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, which it reports in its own class
        raise OSError(str(error)) from error
    source.tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", source.config())
    write_json(folder / "tokenizer_config.json", source.tokenizer_config())


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


def _transformers_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_MODULES[part]}.weight"
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["output", "weight"]:
            return "lm_head.weight"
    raise AssertionError(f"no Llama tensor: {name}")


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from llama.cpp's interleaved rotary order to transformers' halves; shape unchanged."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
