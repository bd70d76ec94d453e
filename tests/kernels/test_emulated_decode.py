"""A whole fused decode step in CUDA, run on a CPU (`emulator`), against its references."""

import pytest
import torch

from qlorachat.kernels.eight_bits import INT8, narrow, widen
from qlorachat.model import PagedLlama, fusion
from qlorachat.model.fused_decode import FusedDecode
from tests.kernels.emulator import Emulator, OnCard
from tests.model.test_fused_decode import (
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
READERS = ("attend", "add_to_residual_1", "silu_mul_1", "add_to_residual_1")
LAYER = [kernel for reader in READERS for kernel in (PRODUCT, reader)]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = actual.as_subclass(torch.Tensor).float() - expected.float()
    return float(difference.norm() / expected.float().norm())


@torch.inference_mode()
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("slots", [(1, 0), (2, 1, 0, 2), (0, 0, 0), (1, 2, 0) * 3])
def test_a_step(
    slots: tuple[int, ...], in_8_bits: bool, card: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "why_not", lambda parts: None)
    model = PagedLlama(quantized_model(HALF), stacks(2, HALF))
    rest = ((model._cos, model._sin), model._epsilon)
    reference = FusedDecode(model._layers, model._embedding, *rest)
    fused = FusedDecode(model._layers, model._embedding.as_subclass(OnCard), *rest)
    rows = decode_rows(slots, active=any(slots))
    theirs, ours, near = cache(HALF), cache(HALF), NEAR
    if in_8_bits:
        for own in (theirs, ours):
            own.keys, own.values = narrow(own.keys, INT8), narrow(own.values, INT8)
    expected = reference(rows, theirs)
    for card.seed in (0, 3):  # the workspace is left as it was found
        card.launched.clear()
        assert distance(fused(rows, ours)[:-1], expected[:-1]) < near
        assert_clear(fused)
    if len(slots) <= 8:
        assert card.launched == ["begin_residual_1", *LAYER * LAYERS]
    assert distance(widen(ours.keys, HALF), widen(theirs.keys, HALF)) < near
    assert distance(widen(ours.values, HALF), widen(theirs.values, HALF)) < near
