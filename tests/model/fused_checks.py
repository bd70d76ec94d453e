"""FusedDecode against PagedLlama's own way, its Triton kernels in the interpreter.

test_fused_decode.py runs this file in a process of its own. The NF4 product is its torch reference
here: there is no card.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlorachat.model import DecodeRows, KVCache, PagedLlama, Rows, fused_decode, fusion
from qlorachat.model.fused_decode import FusedDecode
from qlorachat.model.lora import AdapterStacks, LoraRows
from tests.kernels.interpreted_checks import readable_loop_bounds

__all__ = ["readable_loop_bounds"]  # a fixture of every test here

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, BLOCK = 2, 192, 3, 1, 320, 16


def quantized_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, quantized(child.weight.data * 4))
    return model


def quantized(weight: torch.Tensor) -> Linear4bit:
    height, width = weight.shape
    layer = Linear4bit(width, height, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def stacks(slots: int) -> AdapterStacks:
    """Random adapters in every slot; the same ones whenever it is called."""
    width = HIDDEN // HEADS
    shapes = {
        f"model.layers.{layer}.{module}": shape
        for layer in range(LAYERS)
        for module, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * width, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * width, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }.items()
    }
    own = AdapterStacks(LAYERS, shapes, dtype=torch.float32, device=torch.device("cpu"))
    own.allocate(slots, 20)
    torch.manual_seed(1)
    for index in range(LAYERS):
        for projection in own.layer(index).projections:
            projection.a.normal_(std=0.1)
            projection.b.normal_(std=0.1)
    return own


def cache() -> KVCache:
    torch.manual_seed(2)
    own = KVCache(
        layers=LAYERS,
        blocks=8,
        block_size=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    own.keys.normal_()
    own.values.normal_()
    return own


def decode_rows(slots: Sequence[int], *, active: bool) -> Rows:
    """Row i is at position 5 i of blocks of its own; the last row is padding."""
    count = len(slots)
    positions = torch.arange(count, dtype=torch.int32) * 5
    tables = torch.arange(2 * count, dtype=torch.int32).view(count, 2) % 8
    places = tables[torch.arange(count), (positions // BLOCK).long()] * BLOCK + positions % BLOCK
    lengths = positions + 1
    places[-1], lengths[-1], positions[-1] = -1, 0, 0
    return Rows(
        ids=torch.arange(count) * 7 + 1,
        positions=positions,
        slots=places.int(),
        attention=DecodeRows(tables, lengths),
        lora=LoraRows(
            active,
            slots=torch.tensor(slots, dtype=torch.int32),
            scales=torch.linspace(0.5, 1.5, count),
        ),
    )


@pytest.mark.parametrize("slots", [(1, 0), (2, 1, 0, 2), (0, 0, 0)])
@pytest.mark.parametrize("active", [True, False])
def test_the_fused_step_is_the_plain_one(
    slots: tuple[int, ...], active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)  # our layers, off their device
    model = PagedLlama(quantized_model(), stacks(2))
    rows, theirs, ours = decode_rows(slots, active=active), cache(), cache()
    expected = model.hidden(rows, theirs)

    rope = (model._cos, model._sin)
    model._fused = FusedDecode(model._layers, model._embedding, rope, model._epsilon)
    for _ in range(2):  # the workspace is left as it was found
        actual = model.hidden(rows, ours)
        torch.testing.assert_close(actual[:-1], expected[:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    assert all(float(own._sums.abs().max()) == 0 for own in model._fused._workspaces.values())
    assert len(model._fused._workspaces) == 1


def test_a_step_that_fails_leaves_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    model = PagedLlama(quantized_model(), stacks(2))
    rope = (model._cos, model._sin)
    fused = FusedDecode(model._layers, model._embedding, rope, model._epsilon)
    rows = decode_rows((1, 2, 0), active=True)
    expected = fused(rows, cache())
    with monkeypatch.context() as broken:
        broken.setattr(fused_decode, "silu_mul_sums", raise_memory_error)
        with pytest.raises(MemoryError):
            fused(rows, cache())
    torch.testing.assert_close(fused(rows, cache())[:-1], expected[:-1])


def raise_memory_error(*arguments: object) -> None:
    raise MemoryError
