"""SwiGLU's product from a fused gate|up projection; rounds where LlamaMLP rounds."""

from __future__ import annotations

import torch
from torch.nn import functional

from qlorachat.kernels.device import (
    dependent_launch,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)

_BLOCK = 1024  # columns of one program


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, width], from gate_up [T, 2 * width], contiguous: gate first.

    The silu is rounded to the dtype before the product, as in transformers' LlamaMLP.
    """
    assert gate_up.dim() == 2
    assert gate_up.is_contiguous()
    assert gate_up.shape[1] % 2 == 0
    if not runs_triton(gate_up):
        return silu_mul_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    _silu_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](
        gate_up, out, width=width, block=_BLOCK, **dependent_launch(gate_up)
    )
    return out


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in plain torch."""
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate) * up


@jit
def _silu_mul_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    width: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    at = gate_up + row * (2 * width) + columns
    gate = tl.load(at, mask=inside, other=0.0)
    up = tl.load(at + width, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = (activated * up.to(tl.float32)).to(gate.dtype)
    tl.store(out + row * width + columns, product, mask=inside)
