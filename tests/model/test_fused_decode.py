"""FusedDecode against PagedLlama's own way, and why a model may have none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.eight_bits import INT8
from qlorachat.kernels.nf4_matmul import nf4_matmul_tiled
from qlorachat.kernels.tiles import untile
from qlorachat.model import DecodeRows, KVCache, PagedLlama, Rows, fused_decode, fusion
from qlorachat.model.fused_decode import FusedDecode, why_not_fused
from qlorachat.model.lora import AdapterStacks, LoraRows
from qlorachat.model.nf4_linear import Nf4Linear

HALF = torch.bfloat16
LAYERS, HIDDEN, HEADS, KV_HEADS, INNER, BLOCK = 2, 192, 3, 1, 320, 16
MOST_ROWS = 10


def quantized_model(dtype: torch.dtype = torch.float32) -> Any:
    """The same numbers in every dtype, those of 16 bits."""
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
    model = LlamaForCausalLM(config).eval().to(HALF).to(dtype)
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, quantized(child.weight.data * 4))
    return model


def quantized(weight: torch.Tensor) -> Linear4bit:
    height, width = weight.shape
    layer = Linear4bit(width, height, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def stacks(
    slots: int, dtype: torch.dtype = torch.float32, rank: int = 20, used: int | None = None
) -> AdapterStacks:
    """Random adapters in every slot; the same ones whenever it is called, in every dtype. used: of
    their ranks the first ones, if the others are zero."""
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
    own = AdapterStacks(LAYERS, shapes, dtype=dtype, device=torch.device("cpu"))
    own.allocate(slots, rank)
    torch.manual_seed(1)
    for index in range(LAYERS):
        for projection in own.layer(index).projections:
            for each in (projection.a, projection.b):
                each.copy_((0.1 * torch.randn(each.shape)).to(HALF))
            if used is not None:
                projection.a[:, len(projection.modules) * used :] = 0
                projection.b[:, :, used:] = 0
    return own


def cache(dtype: torch.dtype = torch.float32) -> KVCache:
    torch.manual_seed(2)
    own = KVCache(
        layers=LAYERS,
        blocks=MOST_ROWS * 4,
        block_size=BLOCK,
        kv_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    own.keys.normal_()
    own.values.normal_()
    return own


def decode_rows(slots: Sequence[int], *, active: bool, ranks: int | None = None) -> Rows:
    """Row i is at position 5 i of blocks of its own; the last row is padding."""
    count = len(slots)
    positions = torch.arange(count, dtype=torch.int32) * 5
    tables = torch.randperm(MOST_ROWS * 4)[: count * 4].int().view(count, 4)
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
            one=len({*slots} - {0}) == 1,
            ranks=ranks,
        ),
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PagedLlama:
    """Two adapters beside our own NF4 layers, whose kernels are their references off a card."""
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    return PagedLlama(quantized_model(), stacks(2))


def fuse(model: PagedLlama) -> FusedDecode:
    rope = (model._cos, model._sin)
    return FusedDecode(model._layers, model._embedding, rope, model._epsilon)


def assert_clear(fused: FusedDecode) -> None:
    """The next step finds zeros in all sums, and in all padding of a product's input."""
    for (padded, _), own in fused._workspaces.items():
        assert not own._sums.any()
        for x, width in ((own.hidden, HIDDEN), (own.attended, HIDDEN), (own.inner, INNER)):
            whole = untile(x, padded, 64 * len(x))
            assert not whole[:, width:].any()


@torch.inference_mode()
@pytest.mark.parametrize("slots", [(1, 0), (2, 1, 0, 2), (0, 0, 0), (1, 2, 0) * 3])
@pytest.mark.parametrize("active", [True, False])
def test_the_fused_step_is_the_plain_one(
    slots: tuple[int, ...], active: bool, model: PagedLlama
) -> None:
    rows, theirs, ours = decode_rows(slots, active=active), cache(), cache()
    expected = model.hidden(rows, theirs)
    model._fused = fuse(model)
    for _ in range(2):  # the workspace is left as it was found
        actual = model.hidden(rows, ours)
        torch.testing.assert_close(actual[:-1], expected[:-1], rtol=1e-4, atol=1e-4)
        assert_clear(model._fused)
    torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    assert len(model._fused._workspaces) == 1


@torch.inference_mode()
@pytest.mark.parametrize("slots", [(1, 0), (2, 1, 0, 2)])
def test_ranks_that_no_row_has_are_left_out(
    slots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    model = PagedLlama(quantized_model(), stacks(2, rank=48, used=16))
    rows = decode_rows(slots, active=True, ranks=16)
    expected = model.hidden(rows, cache())
    for name in ("begin_residual", "nf4_matmul_tiled", "add_to_residual", "silu_mul_sums"):
        monkeypatch.setattr(fused_decode, name, poisoning(getattr(fused_decode, name)))
    model._fused = fuse(model)
    actual = model.hidden(rows, cache())
    torch.testing.assert_close(actual[:-1], expected[:-1], rtol=1e-4, atol=1e-4)


def poisoning(kernel: Callable[..., None]) -> Callable[..., None]:
    """The same, with NaN where it has no need to look."""

    def poisoned(lora: Any) -> Any:
        if isinstance(lora, Expanding):
            b = lora.b.clone()
            b[:, :, lora.own_ranks :] = torch.nan
            assert b.isnan().any()
            return lora._replace(b=b)
        if isinstance(lora, Shrinking):
            a = lora.a.clone()
            a[:, lora.own_ranks :] = torch.nan
            assert a.isnan().any()
            return lora._replace(a=a)
        return lora

    return lambda *arguments, **settings: kernel(*map(poisoned, arguments), **settings)


@torch.inference_mode()
def test_counts_padded_alike_share_a_workspace(model: PagedLlama) -> None:
    steps = [decode_rows(slots, active=True) for slots in ((2, 1, 0, 2, 1), (1, 0), (2, 0, 1))]
    expected = [model.hidden(rows, cache()) for rows in steps]
    model._fused = fuse(model)
    for rows, hidden in zip(steps, expected, strict=True):
        torch.testing.assert_close(
            model.hidden(rows, cache())[:-1], hidden[:-1], rtol=1e-4, atol=1e-4
        )
        assert_clear(model._fused)
    assert len(model._fused._workspaces) == 1


@torch.inference_mode()
def test_a_product_is_told_what_follows(model: PagedLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong weight would cost time alone: nothing else tells."""
    given: list[tuple[Any, Any]] = []

    def note(x: Any, weight: Any, sums: Any, lora: Any, *, ahead: Any) -> None:
        given.append((weight, ahead))
        nf4_matmul_tiled(x, weight, sums, lora, ahead=ahead)

    monkeypatch.setattr(fused_decode, "nf4_matmul_tiled", note)
    fuse(model)(decode_rows((1, 2, 0), active=True), cache())
    weights, following = zip(*given, strict=True)
    assert len(weights) == 4 * LAYERS
    assert all(ahead is own for ahead, own in zip(following, (*weights[1:], None), strict=True))


@torch.inference_mode()
def test_a_step_that_fails_leaves_no_sums(
    model: PagedLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, rows = fuse(model), decode_rows((1, 2, 0), active=True)
    expected = fused(rows, cache())
    with monkeypatch.context() as broken:
        broken.setattr(fused_decode, "silu_mul_sums", raise_memory_error)
        with pytest.raises(MemoryError):
            fused(rows, cache())
    assert_clear(fused)
    torch.testing.assert_close(fused(rows, cache())[:-1], expected[:-1])


def raise_memory_error(*arguments: object) -> None:
    raise MemoryError


def test_why_a_model_is_not_fused(model: PagedLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, shape = model._layers, (HEADS, KV_HEADS, HIDDEN // HEADS)
    assert why_not_fused(layers, HALF, HALF, *shape) == "it is no NVIDIA card"
    monkeypatch.setattr(fused_decode, "why_not_products", lambda device: None)
    asked: list[object] = []
    monkeypatch.setattr(fused_decode, "why_not_step", lambda *given: asked.append(given))
    assert why_not_fused(layers, HALF, INT8, *shape) is None
    assert asked == [(*shape, INT8, torch.device("cpu"))]
    assert "float16" in str(why_not_fused(layers, torch.float16, torch.float16, *shape))
    dense = replace(layers[1], down=nn.Linear(INNER, HIDDEN))
    assert "NF4" in str(why_not_fused([layers[0], dense], HALF, HALF, *shape))
    down = layers[1].down
    assert isinstance(down, Nf4Linear)
    down.bias = torch.zeros(HIDDEN)
    assert why_not_fused(layers, HALF, HALF, *shape) == "projections have biases"
