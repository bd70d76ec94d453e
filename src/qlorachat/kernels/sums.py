"""What a product of the fused decode step leaves, and how the kernels after it read that.

Sums are float32 [M, N], W x of M rows and what their adapters add. Whoever reads them leaves zeros,
for the next product to add to, and applies the norm of x, which was put off until its squares were
known.
"""

from __future__ import annotations

import torch


def check_sums(sums: torch.Tensor) -> None:
    assert len(sums) >= 1
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()


def check_squares(squares: torch.Tensor, rows: int) -> None:
    assert squares.shape == (rows,)
    assert squares.dtype == torch.float32
    assert squares.is_contiguous()


def take_sums_reference(sums: torch.Tensor) -> torch.Tensor:
    """Float32 [M, N]; the sums are cleared."""
    taken = sums.clone()
    sums.zero_()
    return taken


def inverse_rms_reference(squares: torch.Tensor, width: int, eps: float) -> torch.Tensor:
    """What the norm that was put off multiplies each row by, float32 [M, 1]."""
    return torch.rsqrt(squares[:, None] / width + eps)
