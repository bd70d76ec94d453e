"""The LoRA kernels against x @ A^T @ B^T of each row in float64."""

import pytest
import torch

from qlorachat.kernels import LoraSegment, lora_add_segments, lora_expand_add, lora_shrink
from tests.kernels.cases import LoraCase, make_lora

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
PROJECTIONS = [(48,), (40, 24), (32, 16, 16)]


def expand(case: LoraCase) -> torch.Tensor:
    y = case.y.clone()
    sums = lora_shrink(case.x, case.a, case.slots)
    lora_expand_add(sums, case.b, case.slots, case.scales, y, case.columns)
    return y


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("parts", PROJECTIONS)
@pytest.mark.parametrize("rank", [1, 16, 24, 64])
def test_each_row_gets_its_own_adapter(
    dtype: torch.dtype, parts: tuple[int, ...], rank: int
) -> None:
    case = make_lora(dtype, rows=6, inputs=70, rank=rank, parts=parts, adapters=3)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        expand(case).double(), case.expected(), rtol=tolerance, atol=tolerance
    )


def test_the_sums_add_up_to_the_product() -> None:
    case = make_lora(torch.float32, rows=3, inputs=40, rank=4, parts=(8,), adapters=1)
    case.slots.fill_(1)
    torch.testing.assert_close(lora_shrink(case.x, case.a, case.slots).sum(0), case.x @ case.a[0].T)


def test_rows_without_adapter_are_left_alone() -> None:
    case = make_lora(torch.float32, rows=5, inputs=40, rank=4, parts=(8, 8), adapters=2)
    case.slots.zero_()
    assert torch.equal(expand(case), case.y)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("parts", PROJECTIONS)
def test_segments_are_the_rows_one_by_one(dtype: torch.dtype, parts: tuple[int, ...]) -> None:
    case = make_lora(dtype, rows=12, inputs=64, rank=8, parts=parts, adapters=3)
    segments = [LoraSegment(0, 5, 2, 0.5), LoraSegment(5, 7, 0, 1.0), LoraSegment(7, 12, 3, 2.0)]
    for start, stop, slot, scale in segments:
        case.slots[start:stop] = slot
        case.scales[start:stop] = scale
    y = case.y.clone()
    lora_add_segments(case.x, case.a, case.b, segments, y, case.columns)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), case.expected(), rtol=tolerance, atol=tolerance)


def test_rows_outside_the_segments_are_left_alone() -> None:
    case = make_lora(torch.float32, rows=4, inputs=16, rank=2, parts=(8,), adapters=1)
    y = case.y.clone()
    lora_add_segments(case.x, case.a, case.b, [LoraSegment(1, 2, 1, 1.0)], y, case.columns)
    assert torch.equal(y[[0, 2, 3]], case.y[[0, 2, 3]])
    assert not torch.equal(y[1], case.y[1])


def test_columns_that_miss_the_outputs_are_a_broken_contract() -> None:
    case = make_lora(torch.float32, rows=2, inputs=16, rank=2, parts=(8,), adapters=1)
    sums = lora_shrink(case.x, case.a, case.slots)
    with pytest.raises(AssertionError):
        lora_expand_add(sums, case.b, case.slots, case.scales, case.y, (0, 4))
