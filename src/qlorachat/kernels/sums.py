"""What a product of the fused decode step leaves, and how the kernels after it read that.

Sums are float32 [M, N], W x of M rows and what their adapters add. Whoever reads them leaves zeros,
for the next product to add to, and applies the norm of x, which was put off until its squares were
known.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


def check_sums(sums: torch.Tensor) -> None:
    assert len(sums) >= 1
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()


class LateNorm(NamedTuple):
    """The norm of a product's x, put off: who reads its sums multiplies row m by 1 / rms.

    squares: float32 [M], of rows of `width` columns.
    """

    squares: torch.Tensor
    width: int
    eps: float

    def check(self, rows: int) -> None:
        check_squares(self.squares, rows)

    def factors(self) -> torch.Tensor:
        """What each row is multiplied by, float32 [M, 1]."""
        return torch.rsqrt(self.squares[:, None] / self.width + self.eps)


def check_squares(squares: torch.Tensor, rows: int) -> None:
    assert squares.shape == (rows,)
    assert squares.dtype == torch.float32
    assert squares.is_contiguous()


def take_sums_reference(sums: torch.Tensor) -> torch.Tensor:
    """Float32 [M, N]; the sums are cleared."""
    taken = sums.clone()
    sums.zero_()
    return taken
