"""The stacked adapters of a layer: what a slot has, and when all rows of a prefill share it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qlorachat import kernels
from qlorachat.adapters import Adapter
from qlorachat.kernels import LoraSegment, lora_add_segments
from qlorachat.model.lora import AdapterStacks, LoraRows
from tests import lora
from tests.kernels.cases import rank_rows

WIDTH, INNER, SLOTS, RANK = 32, 48, 2, 64
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (16, WIDTH),
    "self_attn.v_proj": (16, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
LAYER = "model.layers.0"
LAYER_SHAPES = {f"{LAYER}.{module}": shape for module, shape in SHAPES.items()}


def make_stacks() -> AdapterStacks:
    stacks = AdapterStacks(1, LAYER_SHAPES, dtype=torch.float32, device=torch.device("cpu"))
    stacks.allocate(SLOTS, RANK)
    return stacks


def make_adapter(ranks: Mapping[str, int]) -> Adapter:
    """Random, with these ranks of the layer's modules."""
    own = {f"{LAYER}.{module}": rank for module, rank in ranks.items()}
    return lora.make_adapter(LAYER_SHAPES, own)


def test_the_adapter_of_all_rows_has_its_own_ranks() -> None:
    stacks, every = make_stacks(), LoraRows(True, [LoraSegment(0, 9, 2, 0.5)])
    adapter = make_adapter({"self_attn.q_proj": 20, "self_attn.v_proj": 5, "mlp.up_proj": 16})
    stacks.write(2, adapter)
    ranks = {"qkv": 32, "output": 0, "gate_up": 16, "down": 0}
    for group, wanted in ranks.items():
        own = getattr(stacks.layer(0), group).of_all(every, 9)
        assert (own.ranks, own.scale) == (wanted, 0.5)
        assert not own.a[len(own.a) // RANK * wanted :].any()
        assert not own.b[:, wanted:].any()
    own = stacks.layer(0).qkv.of_all(every, 9)
    assert own is not None
    parts = enumerate(own.b.split((32, 16, 16)))
    whole = torch.cat([b @ own.a[rank_rows(part, 3, RANK)] for part, b in parts])
    expected = torch.zeros(64, WIDTH)
    for module, rows in (("self_attn.q_proj", slice(0, 32)), ("self_attn.v_proj", slice(48, 64))):
        pair = adapter.matrices(f"model.layers.0.{module}")
        assert pair is not None
        expected[rows] = 2.0 * pair[1] @ pair[0]
    torch.testing.assert_close(whole, expected)


def test_another_adapter_in_the_slot_has_other_ranks() -> None:
    stacks, every = make_stacks(), LoraRows(True, [LoraSegment(0, 9, 1, 1.0)])
    down = stacks.layer(0).down
    for rank, wanted in ((64, 64), (1, 16)):
        stacks.write(1, make_adapter({"mlp.down_proj": rank}))
        own = down.of_all(every, 9)
        assert own is not None
        assert own.ranks == wanted
        assert not own.b[:, wanted:].any()


def test_rows_that_differ_in_their_adapter() -> None:
    down = make_stacks().layer(0).down
    for segments in (
        [],
        [LoraSegment(0, 8, 1, 1.0)],
        [LoraSegment(1, 9, 1, 1.0)],
        [LoraSegment(0, 5, 1, 1.0), LoraSegment(5, 9, 1, 0.5)],
    ):
        assert down.of_all(LoraRows(bool(segments), segments), 9) is None


def test_a_prefill_of_several_adapters_computes_what_they_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stacks = make_stacks()
    stacks.write(1, make_adapter({"self_attn.q_proj": 4, "mlp.down_proj": 4}))
    stacks.write(2, make_adapter({"self_attn.q_proj": 4}))
    layer, x = stacks.layer(0), torch.randn(9, INNER)
    rows = LoraRows(True, [LoraSegment(0, 5, 1, 1.0), LoraSegment(5, 9, 2, 0.5)])
    computed: list[tuple[int, int]] = []

    def note(x: Any, a: Any, b: Any, segments: Any, *rest: Any) -> None:
        computed.extend((each.start, each.stop) for each in segments)
        lora_add_segments(x, a, b, segments, *rest)

    monkeypatch.setattr(kernels, "lora_add_segments", note)
    y = layer.down.add(torch.zeros(9, WIDTH), x, rows)
    assert computed == [(0, 5)]
    torch.testing.assert_close(y[:5], x[:5] @ (layer.down.b[0] @ layer.down.a[0]).T)
    assert not y[5:].any()
