"""Whole steps in CUDA, decode and prefill, run on a CPU (`emulator`), against their references."""

import pytest
import torch

from qlorachat.kernels import LoraSegment
from qlorachat.kernels.eight_bits import INT8, narrow, widen
from qlorachat.kernels.nf4 import Nf4Matrix
from qlorachat.kernels.nf4_write_out import LoraMatrices, nf4_write_out_reference
from qlorachat.model import PagedLlama, PrefillChunk, PrefillChunks, Rows, fusion, nf4_linear
from qlorachat.model.fused_decode import FusedDecode
from qlorachat.model.lora import LoraRows
from qlorachat.model.nf4_linear import Nf4Linear
from tests.kernels.emulator import Emulator, OnCard
from tests.model.test_fused_decode import (
    BLOCK,
    LAYERS,
    assert_clear,
    cache,
    decode_rows,
    quantized_model,
    stacks,
)

HALF = torch.bfloat16
NEAR = 0.02  # of the norm: roundings of bfloat16 in two layers
PRODUCT = "nf4_matmul_8_ragged"
READERS = ("attend", "add_to_residual_1{}", "silu_mul_1{}", "add_to_residual_1{}")
LAYER = [kernel for reader in READERS for kernel in (PRODUCT, reader)]
STEP = ["begin_residual_1{}", *LAYER * LAYERS]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.as_subclass(torch.Tensor).float() - expected.float()
    return float(difference.norm() / expected.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("slots", [(1, 0), (2, 0, 2), (2, 1, 0, 2), (0, 0, 0), (1, 2, 0) * 3])
def test_a_step(
    slots: tuple[int, ...], in_8_bits: bool, card: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of adapters of 20 ranks, room for 32, but for that of three rows: 16. One alone has kernels
    of its own.
    """
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    own = {(1, 0): "_32", (2, 0, 2): "_16"}.get(slots, "")
    used = 16 if own == "_16" else None
    model = PagedLlama(quantized_model(HALF), stacks(2, HALF, used=used))
    rest = ((model._cos, model._sin), model._epsilon)
    reference = FusedDecode(model._layers, model._embedding, *rest)
    fused = FusedDecode(model._layers, model._embedding.as_subclass(OnCard), *rest)
    rows = decode_rows(slots, active=any(slots), ranks=used)
    theirs, ours, near = cache(HALF), cache(HALF), NEAR
    if in_8_bits:
        for each in (theirs, ours):
            each.keys, each.values = narrow(each.keys, INT8), narrow(each.values, INT8)
    expected = reference(rows, theirs)
    for card.seed in (0, 3):  # the workspace is left as it was found
        card.launched.clear()
        assert distance(fused(rows, ours)[:-1], expected[:-1]) < near
        assert_clear(fused)
    if len(slots) <= 8:
        assert card.launched == [kernel.format(own) for kernel in STEP]
    assert distance(widen(ours.keys, HALF), widen(theirs.keys, HALF)) < near
    assert distance(widen(ours.values, HALF), widen(theirs.values, HALF)) < near


@torch.inference_mode()
@pytest.mark.parametrize(
    ("segments", "kernel"),
    [
        ([LoraSegment(0, 72, 2, 0.5)], "nf4_write_out_32"),
        ([LoraSegment(0, 72, 2, 0.5), LoraSegment(72, 80, 1, 1.0)], "nf4_write_out"),
        ([LoraSegment(8, 80, 1, 1.0)], "nf4_write_out"),
        ([], "nf4_write_out"),
    ],
)
def test_a_prefill(
    segments: list[LoraSegment], kernel: str, card: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter of all rows is written out with the weights, and no less exact than beside."""
    count = max((each.stop for each in segments), default=80)
    rows = prefill_rows(count, segments)
    exact = PagedLlama(quantized_model(), stacks(2)).hidden(rows, cache())
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    model = PagedLlama(quantized_model(HALF), stacks(2, HALF))
    hidden = model.hidden(rows, cache(HALF))
    assert card.launched == [kernel] * 4 * LAYERS
    with monkeypatch.context() as patch:
        patch.setattr(nf4_linear, "nf4_write_out", written_out)
        assert distance(hidden, model.hidden(rows, cache(HALF))) < torch.finfo(HALF).eps / 2
    monkeypatch.setattr(Nf4Linear, "takes_in", lambda *arguments: False)
    beside = model.hidden(rows, cache(HALF))
    assert card.launched[4 * LAYERS :] == ["nf4_write_out"] * 4 * LAYERS
    assert distance(hidden, exact) < 1.1 * distance(beside, exact)


def written_out(weight: Nf4Matrix, lora: LoraMatrices | None = None) -> torch.Tensor:
    """By the reference, rounded as the kernel does."""
    return nf4_write_out_reference(weight, lora).to(HALF)


def prefill_rows(count: int, segments: list[LoraSegment]) -> Rows:
    """A prompt of so many tokens, in blocks that follow each other."""
    whole = torch.arange(count, dtype=torch.int32)
    blocks = slice(0, -(-count // BLOCK))
    return Rows(
        ids=whole.long() % 97,
        positions=whole % 64,  # of the model's, as many as there are
        slots=whole,
        attention=PrefillChunks([PrefillChunk(0, count, count, blocks)]),
        lora=LoraRows(bool(segments), segments),
    )
