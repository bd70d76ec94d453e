"""silu_mul against transformers' LlamaMLP."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from qlorachat.kernels import silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_llamas(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width = 32
    mlp = LlamaMLP(LlamaConfig(hidden_size=width, intermediate_size=width)).to(dtype)
    mlp.down_proj = torch.nn.Identity()
    x = 4 * torch.randn(5, width).to(dtype)
    gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=1)
    assert torch.equal(silu_mul(gate_up), mlp(x))


def test_far_gates_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, 2.0, 3.0]])
    assert silu_mul(gate_up).tolist() == [[0.0, 3e4]]
