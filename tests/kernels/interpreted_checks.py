"""Every Triton kernel against its torch reference, in Triton's interpreter on the CPU.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1. bfloat16 is left to
a card (bench/kernels_check.py): the interpreter cuts it off instead of rounding.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qlorachat.kernels import activation, attention, lora, lora_segments, norm, rotary
from qlorachat.kernels.device import runs_triton
from qlorachat.kernels.eight_bits import widen
from tests.kernels.cases import make_lora, make_paged, make_rope

# float16 is rounded alike wherever nothing is summed; a sum's order may move its last digit
TOLERANCE = {torch.float32: 4e-5, torch.float16: 4e-3}
dtypes = st.sampled_from(list(TOLERANCE))
few = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
)
interpreter: Any = importlib.import_module("triton.runtime.interpreter")


@pytest.fixture(autouse=True, scope="module")
def readable_loop_bounds() -> Iterator[None]:
    """Triton 3.6 reads a loop's bounds in a way that NumPy 2.4 refuses; 3.9 has it mended."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
        yield


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether 16-bit results were rounded at the same places, or many would differ."""
    different = int((actual.float() != expected.float()).sum())
    return actual.dtype == torch.float32 or different <= 1 + 0.02 * actual.numel()


def test_the_interpreter_is_on() -> None:
    assert runs_triton(torch.zeros(1))


@few
@given(dtypes, st.integers(1, 5), st.sampled_from([1, 100, 576, 1500]))
def test_norms(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, residual = torch.randn(2, rows, width).to(dtype).unbind()
    weight = torch.randn(width).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps
    close(norm.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5), tolerance)
    normed, total = norm.add_rms_norm(x, residual, weight, 1e-5)
    expected, sums = norm.add_rms_norm_reference(x, residual, weight, 1e-5)
    close(normed, expected, tolerance)
    assert torch.equal(total, sums)
    assert rounded_alike(normed, expected)


@few
@given(dtypes, st.integers(1, 3), st.sampled_from([1, 96, 1024, 1030]))
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(width)
    gate_up = (4 * torch.randn(rows, 2 * width)).to(dtype)
    actual, expected = activation.silu_mul(gate_up), activation.silu_mul_reference(gate_up)
    close(actual, expected, 2 * torch.finfo(dtype).eps)
    assert rounded_alike(actual, expected)


@few
@given(
    dtypes,
    st.sampled_from([1, 2, 7, 70]),
    st.sampled_from([(9, 3, 64), (4, 4, 80), (6, 1, 96), (2, 2, 128)]),
    st.booleans(),
)
def test_rope_and_cache(
    dtype: torch.dtype, rows: int, shape: tuple[int, int, int], in_8_bits: bool
) -> None:
    heads, kv_heads, head_dim = shape
    case = make_rope(
        dtype,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        in_8_bits=in_8_bits,
    )
    arguments, others = case.arguments(), case.arguments()
    q = rotary.rope_and_cache(*arguments)
    close(q, rotary.rope_and_cache_reference(*others), torch.finfo(dtype).eps)
    for cache, other in zip(arguments[-2:], others[-2:], strict=True):
        ours, theirs = (widen(each, torch.float32) for each in (cache, other))
        close(ours, theirs, 1.01 / 127 if in_8_bits else torch.finfo(dtype).eps)
        assert rounded_alike(ours, theirs)


@few
@given(
    dtypes,
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 32, 33, 100]), min_size=1, max_size=3),
    st.sampled_from([(4, 4, 64), (9, 3, 80), (8, 1, 96), (2, 2, 128)]),
    st.sampled_from([1, 16, 24]),
    st.sampled_from([None, 1, 2, 8]),
    st.booleans(),
)
def test_paged_decode_attention(
    dtype: torch.dtype,
    lengths: list[int],
    shape: tuple[int, int, int],
    block_size: int,
    splits: int | None,
    in_8_bits: bool,
) -> None:
    heads, kv_heads, head_dim = shape
    case = make_paged(
        dtype,
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        in_8_bits=in_8_bits,
    )
    out = torch.full_like(case.q, float("nan"))
    attention.paged_decode_attention(*case.arguments(), 0.2, out, splits)
    expected = attention.paged_decode_attention_reference(*case.arguments(), 0.2)
    close(out, expected, TOLERANCE[dtype])


@few
@given(
    dtypes,
    st.sampled_from([1, 6, 16, 19]),
    st.sampled_from([40, 512, 700]),
    st.sampled_from([1, 16, 24, 64]),
    st.sampled_from([(48,), (70, 24), (80, 16, 16)]),
    st.integers(1, 4),
)
def test_lora(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    rank: int,
    parts: tuple[int, ...],
    adapters: int,
) -> None:
    case = make_lora(dtype, rows=rows, inputs=inputs, rank=rank, parts=parts, adapters=adapters)
    sums = lora.lora_shrink(case.x, case.a, case.slots)
    shrunk = lora.lora_shrink_reference(case.x, case.a, case.slots)
    close(sums.sum(0), shrunk.sum(0), 1e-5)
    y, expected = case.y.clone(), case.y.clone()
    lora.lora_expand_add(sums, case.b, case.slots, case.scales, y, case.columns)
    lora.lora_expand_add_reference(shrunk, case.b, case.slots, case.scales, expected, case.columns)
    close(y, expected, TOLERANCE[dtype])


@few
@given(
    dtypes,
    st.sampled_from([1, 63, 130]),
    st.sampled_from([1, 16, 24, 72]),
    st.sampled_from([(48,), (200, 24), (140, 16, 16)]),
)
def test_lora_of_segments(dtype: torch.dtype, rows: int, rank: int, parts: tuple[int, ...]) -> None:
    case = make_lora(dtype, rows=rows, inputs=40, rank=rank, parts=parts, adapters=1)
    shrunk = (case.x @ case.a[0].T).contiguous()
    y, expected = case.y.clone(), case.y.clone()
    lora_segments._expand_add(shrunk, case.b[0], 0.5, y, case.columns)
    lora_segments._expand_add_reference(shrunk, case.b[0], 0.5, expected, case.columns)
    close(y, expected, TOLERANCE[dtype])
