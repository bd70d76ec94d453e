"""What a product of the fused decode step leaves, and how the kernels after it read that.

Sums are float32 [M, N], W x of M rows. Whoever reads them leaves zeros, for the next product to add
to. The adapters' B is applied by the reader (`sums.cuh`), to A x from the same product, and so is
the norm of x, which was put off until its rows' squares were known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.lora import lora_expand_add_reference


class RowAdapters(NamedTuple):
    """The LoRA of one projection in a decode step of M rows, each with its adapter's slot.

    shrunk: float32 [M, S * parts * R], A x of every slot and part. b: [S, N, R], contiguous, of the
    model's dtype, alpha / r folded in; R is a multiple of 16. slots: int32 [M], 0 for none; slot s
    is [s - 1] of b. scales: float32 [M], the adapter's strength.
    """

    shrunk: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor


def check_sums(
    sums: torch.Tensor, adapters: RowAdapters | None, parts: int, dtype: torch.dtype
) -> None:
    rows, outputs = sums.shape
    assert rows >= 1
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    if adapters is None:
        return
    shrunk, b, slots, scales = adapters
    assert b.shape == (len(b), outputs, b.shape[2])
    assert b.shape[2] % 16 == 0
    assert b.dtype == dtype
    assert shrunk.shape == (rows, len(b) * parts * b.shape[2])
    assert shrunk.dtype == scales.dtype == torch.float32
    assert slots.shape == scales.shape == (rows,)
    assert slots.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (shrunk, b, slots, scales))


def check_squares(squares: torch.Tensor, rows: int) -> None:
    assert squares.shape == (rows,)
    assert squares.dtype == torch.float32
    assert squares.is_contiguous()


def adapter_tensors(adapters: RowAdapters | None) -> Sequence[Argument]:
    """The arguments that the sources call shrunk, b, slots and scales."""
    return (None,) * 4 if adapters is None else tuple(adapters)


def adapter_shape(adapters: RowAdapters | None, outputs: int) -> Sequence[Argument]:
    """The arguments that the sources call count, ranks and outputs."""
    count, ranks = (1, 16) if adapters is None else (len(adapters.b), adapters.b.shape[2])
    return count, ranks, outputs


def take_sums_reference(
    sums: torch.Tensor, adapters: RowAdapters | None, columns: Sequence[int]
) -> torch.Tensor:
    """W x plus LoRA, float32 [M, N], in plain torch; its sums are cleared.

    columns: where the parts of N begin, and N, as for `lora_expand_add`.
    """
    taken = sums.clone()
    sums.zero_()
    if adapters is not None:
        shrunk, b, slots, scales = adapters
        every = shrunk.view(len(sums), len(b), -1)  # [M, S, parts * R]
        own = every[torch.arange(len(sums), device=slots.device), slots.clamp(min=1) - 1]
        lora_expand_add_reference(own[None], b, slots, scales, taken, columns)
    return taken


def inverse_rms_reference(squares: torch.Tensor, width: int, eps: float) -> torch.Tensor:
    """What the norm that was put off multiplies each row by, float32 [M, 1]."""
    return torch.rsqrt(squares[:, None] / width + eps)
