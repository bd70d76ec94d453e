"""What a product of the fused decode step leaves, and how the kernels after it read that.

Sums are float32 [N, P], W x of P padded rows, M of them real. Whoever reads an element leaves zero:
the next product adds to it. The adapters' B is applied here, to A x from the same product, and so
is the norm of x, which was put off until its rows' squares were known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlorachat.kernels.device import jit, tl, triton
from qlorachat.kernels.lora import expand_slots, lora_expand_add_reference

ROW_BLOCK = 16  # rows of one program; tensor cores take no fewer
_MOST_RANKS = 64  # of one step: more would not fit the registers


class RowAdapters(NamedTuple):
    """The LoRA of one projection in a decode step of M rows, each with its adapter's slot.

    shrunk: float32 [S * parts * R, P], A x of every slot and part for every row. b: [S, N, R],
    contiguous, of the model's dtype, alpha / r folded in; R is a multiple of 16. slots: int32 [M],
    0 for none; slot s is [s - 1] of b. scales: float32 [M], the adapter's strength.
    """

    shrunk: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor


def check_sums(
    sums: torch.Tensor, adapters: RowAdapters | None, rows: int, parts: int, dtype: torch.dtype
) -> None:
    outputs, padded = sums.shape
    assert 1 <= rows <= padded
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    if adapters is None:
        return
    shrunk, b, slots, scales = adapters
    assert b.shape == (len(b), outputs, b.shape[2])
    assert b.shape[2] % 16 == 0
    assert b.dtype == dtype
    assert shrunk.shape == (len(b) * parts * b.shape[2], padded)
    assert shrunk.dtype == scales.dtype == torch.float32
    assert slots.shape == scales.shape == (rows,)
    assert slots.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (shrunk, b, slots, scales))


def check_squares(squares: torch.Tensor, padded: int) -> None:
    assert squares.shape == (padded,)
    assert squares.dtype == torch.float32
    assert squares.is_contiguous()


def adapter_tensors(adapters: RowAdapters | None) -> tuple[torch.Tensor | None, ...]:
    """The arguments that `load_sums` calls shrunk, b, slots and scales."""
    return (None,) * 4 if adapters is None else tuple(adapters)


def adapter_shape(adapters: RowAdapters | None, parts: int) -> dict[str, int]:
    """The constants of `load_sums` that depend on the adapters."""
    rank = 16 if adapters is None else adapters.b.shape[2]
    rank_block = min(_MOST_RANKS, triton.next_power_of_2(rank))
    return {"parts": parts, "rank": rank, "rank_block": rank_block}


def take_sums_reference(
    sums: torch.Tensor, adapters: RowAdapters | None, rows: int, columns: Sequence[int]
) -> torch.Tensor:
    """W x plus LoRA, float32 [M, N], in plain torch; its sums are cleared.

    columns: where the parts of N begin, and N, as for `lora_expand_add`.
    """
    taken = sums[:, :rows].T.contiguous()
    sums[:, :rows] = 0
    if adapters is not None:
        shrunk, b, slots, scales = adapters
        every = shrunk[:, :rows].view(len(b), -1, rows)  # [S, parts * R, M]
        own = every[slots.clamp(min=1) - 1, :, torch.arange(rows, device=slots.device)]
        lora_expand_add_reference(own[None], b, slots, scales, taken, columns)
    return taken


def inverse_rms_reference(squares: torch.Tensor, rows: int, width: int, eps: float) -> torch.Tensor:
    """What the norm that was put off multiplies each row by, float32 [M, 1]."""
    return torch.rsqrt(squares[:rows, None] / width + eps)


@jit
def load_sums(
    sums: tl.tensor,
    shrunk: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    known: tl.tensor,
    real: tl.tensor,
    part: tl.tensor,
    outputs: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    rank_block: tl.constexpr,
    padded: tl.constexpr,
) -> tl.tensor:
    """W x plus LoRA, float32 [rows, columns], of columns in one part; zeros outside.

    row, real: [rows], `real` where it is no padding; column, known: [columns].
    """
    at = sums + column[None, :] * padded + row[:, None]
    values = tl.load(at, mask=real[:, None] & known[None, :], other=0.0)
    if shrunk is not None:
        mine = tl.load(slots + row, mask=real, other=0)
        first_rank = ((mine - 1) * parts + part) * rank
        added = tl.zeros_like(values)
        for first in range(0, rank, rank_block):
            depth = first + tl.arange(0, rank_block)
            own = tl.load(
                shrunk + (first_rank[:, None] + depth[None, :]) * padded + row[:, None],
                mask=(mine > 0)[:, None] & (depth < rank)[None, :],
                other=0.0,
            )
            inside = known[:, None] & (depth < rank)[None, :]
            added = expand_slots(own, b, mine, column, depth, inside, added, outputs, rank)
        values += tl.load(scales + row, mask=mine > 0, other=0.0)[:, None] * added
    return values


@jit
def clear_sums(
    sums: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    known: tl.tensor,
    real: tl.tensor,
    padded: tl.constexpr,
) -> None:
    """Zeros where `load_sums` read."""
    # another thread than the one that reads an element may be the one to clear it
    tl.debug_barrier()
    zeros = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    at = sums + column[None, :] * padded + row[:, None]
    tl.store(at, zeros, mask=real[:, None] & known[None, :])


@jit
def load_inverse_rms(
    squares: tl.tensor, row: tl.tensor, real: tl.tensor, eps: float, width: tl.constexpr
) -> tl.tensor:
    """What the norm that was put off multiplies each row by, float32 [rows, 1]."""
    return tl.rsqrt(tl.load(squares + row, mask=real, other=1.0) / width + eps)[:, None]
