"""A tiny GGUF of the demo model's kind, written by the gguf package."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

from tests.tiny import ALPHABET, SPECIAL

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 64, 96, 2, 4, 2


def write_gguf(path: Path, *, tied: bool) -> None:
    """Random weights: layers in Q4_1, embeddings in Q8_0, norms in F32; one merge, a + b."""
    pieces = [*SPECIAL, *ALPHABET, "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(len(pieces))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(ALPHABET) + 1)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("template")
    for name, shape in _shapes(len(pieces), tied).items():
        _add(writer, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(vocabulary: int, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["output.weight"] = (vocabulary, HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate.weight": (MLP, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (MLP, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, MLP),
        }
    return shapes


def _add(writer: GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(len(name) + sum(shape)).standard_normal(shape, np.float32)
    if len(shape) == 1:
        writer.add_tensor(name, weight)
        return
    embeds = name.startswith(("token_embd", "output"))
    kind = GGMLQuantizationType.Q8_0 if embeds else GGMLQuantizationType.Q4_1
    writer.add_tensor(name, quantize(weight * 0.1, kind), raw_dtype=kind)
