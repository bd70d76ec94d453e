"""PagedLlama against transformers on small random models of every shape that it claims to serve."""

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from qlorachat.errors import ModelError
from qlorachat.model import (
    DecodeRows,
    KVCache,
    PagedLlama,
    PrefillChunk,
    PrefillChunks,
    Rows,
    unsupported,
)
from qlorachat.model.fusion import fuse
from qlorachat.model.lora import AdapterStacks, LoraRows

BLOCK = 4
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped queries": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama 3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "attention bias": {"attention_bias": True, "mlp_bias": True},
    "own head size": {"head_dim": 32},
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)).eval()
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **VARIANTS[kind]})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def paged(model: Any) -> tuple[PagedLlama, KVCache]:
    config = model.config
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    device = torch.device("cpu")
    stacks = AdapterStacks(config.num_hidden_layers, shapes, dtype=torch.float32, device=device)
    llama = PagedLlama(model, stacks)
    cache = KVCache(
        layers=config.num_hidden_layers, blocks=16, block_size=BLOCK,
        kv_heads=config.num_key_value_heads, head_dim=llama.head_dim,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    return llama, cache


def integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows(ids: list[int], start: int, blocks: list[int], attention: Any) -> Rows:
    positions = list(range(start, start + len(ids)))
    slots = [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
    return Rows(
        torch.tensor(ids), integers(positions), integers(slots), attention, LoraRows(active=False)
    )


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*VARIANTS, "mistral"])
def test_logits_are_those_of_transformers(kind: str) -> None:
    model = build(kind)
    ids = torch.randint(0, 97, (15,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = model(input_ids=torch.tensor([ids])).logits[0]
    llama, cache = paged(model)
    blocks = [7, 2, 11, 5]  # scattered on purpose
    seen = []
    for start, end in ((0, 6), (6, 13)):  # a prompt in two chunks
        chunk = PrefillChunks(
            [PrefillChunk(0, end - start, end, torch.tensor(blocks[: -(-end // BLOCK)]))]
        )
        seen.append(llama.logits(llama.hidden(rows(ids[start:end], start, blocks, chunk), cache)))
    for position in (13, 14):  # then token by token
        decode = DecodeRows(integers(blocks)[None], integers([position + 1]))
        step = rows(ids[position : position + 1], position, blocks, decode)
        seen.append(llama.logits(llama.hidden(step, cache)))
    torch.testing.assert_close(torch.cat(seen), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "gelu"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp"),
        (
            {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768},
            "sliding window",
        ),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding window of 4096"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
    ],
)
def test_what_it_cannot_serve_is_said(config: dict[str, Any], said: str) -> None:
    assert said in (unsupported(CONFIG_MAPPING[config["model_type"]].from_dict(config)) or "")


def test_the_families_it_serves_are_not_refused() -> None:
    for kind in (*VARIANTS, "mistral"):
        assert unsupported(build(kind).config) is None


def quantized(rows: int, columns: int, *, nested: bool) -> Linear4bit:
    layer = Linear4bit(
        columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        compress_statistics=nested, device="meta",
    )  # fmt: skip
    weight = torch.randn(rows, columns, dtype=torch.bfloat16) * 0.02
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
    )._quantize("cpu")
    return layer


def decoded(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("heights", [(64,), (192, 64, 64), (576, 192, 192)])
def test_fused_weights_decode_to_the_same_values(heights: tuple[int, ...], nested: bool) -> None:
    torch.manual_seed(0)
    parts = [quantized(height, 128, nested=nested) for height in heights]
    separate = torch.cat([decoded(part) for part in parts])
    fused = fuse(parts)
    assert torch.equal(decoded(fused), separate)
    assert all(part.weight is None for part in parts)


def test_four_and_sixteen_bit_do_not_mix() -> None:
    with pytest.raises(ModelError, match="--backend transformers"):
        fuse([quantized(64, 64, nested=True), nn.Linear(64, 64, bias=False)])
