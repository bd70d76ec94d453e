"""The norms against transformers' LlamaRMSNorm."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlorachat.kernels import add_rms_norm, rms_norm

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def llama_norm(weight: torch.Tensor) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(len(weight), eps=EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (7, 100), (3, 1)])
def test_the_norm_is_llamas(dtype: torch.dtype, rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight = (3 * torch.randn(rows, width)).to(dtype), torch.randn(width).to(dtype)
    torch.testing.assert_close(
        rms_norm(x, weight, EPS), llama_norm(weight)(x), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_is_added_before_and_handed_on(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 96).to(dtype).unbind()
    weight = torch.randn(96).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(
        normed, llama_norm(weight)(x + residual), rtol=2 * torch.finfo(dtype).eps, atol=0
    )


def test_eps_keeps_a_row_of_zeros_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 8), torch.ones(8), EPS), torch.zeros(1, 8))


def test_another_width_of_weight_is_a_broken_contract() -> None:
    with pytest.raises(AssertionError, match="weight"):
        rms_norm(torch.zeros(1, 8), torch.ones(4), EPS)
