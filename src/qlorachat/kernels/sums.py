"""What a product of the fused decode step leaves, and how the kernels after it read that.

Sums are float32 [N, P], W x of P padded rows, M of them real. A product adds to 8 rows at a time:
padding among its last 8 may hold anything, what follows is zero. Whoever reads leaves zeros in all
of them, for the next product to add to. The adapters' B is applied here, to A x from the same
product, and so is the norm of x, which was put off until its rows' squares were known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qlorachat.kernels.device import dot_precision, jit, tl, triton
from qlorachat.kernels.lora import lora_expand_add_reference

ROW_BLOCK = 16  # rows of one program; tensor cores take no fewer
_MOST_DEPTHS = 128  # of one product: more would not fit the registers


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


def adapter_shape(adapters: RowAdapters | None, parts: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants of `load_sums` that depend on the adapters and on the model's dtype."""
    slots, rank = (1, 16) if adapters is None else (len(adapters.b), adapters.b.shape[2])
    return {
        "parts": parts,
        "rank": rank,
        "depths": slots * rank,
        "depth_block": min(_MOST_DEPTHS, triton.next_power_of_2(slots * rank)),
        "precision": dot_precision(dtype),
    }


def take_sums_reference(
    sums: torch.Tensor, adapters: RowAdapters | None, rows: int, columns: Sequence[int]
) -> torch.Tensor:
    """W x plus LoRA, float32 [M, N], in plain torch; its sums are cleared.

    columns: where the parts of N begin, and N, as for `lora_expand_add`.
    """
    taken = sums[:, :rows].T.contiguous()
    sums.zero_()
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
def load_b(
    b: tl.tensor,
    slots: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    known: tl.tensor,
    real: tl.tensor,
    first: tl.constexpr,
    outputs: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The rows' slots, and B of all the slots they have side by side, [columns, depths].

    Depths are ranks of slot after slot, depth_block of them from `first` on. None of it is written
    within a step: it may be loaded before `wait_for_previous`.
    """
    # without adapters both are stand-ins that nobody looks at: a tuple can't hold None
    mine, weights = row, row
    if b is not None:
        mine = tl.load(slots + row, mask=real, other=0)
        depth = first + tl.arange(0, depth_block)
        used = tl.max((mine[:, None] == (depth // rank + 1)[None, :]).to(tl.int32), axis=0) > 0
        own = (depth // rank).to(tl.int64) * (outputs * rank) + depth % rank
        inside = known[:, None] & (used & (depth < depths))[None, :]
        weights = tl.load(b + own[None, :] + column[:, None] * rank, mask=inside, other=0.0)
    return mine, weights


@jit
def load_sums(
    sums: tl.tensor,
    shrunk: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    mine: tl.tensor,
    weights: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    known: tl.tensor,
    real: tl.tensor,
    part: tl.tensor,
    outputs: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
    padded: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """W x plus LoRA, float32 [rows, columns], of columns in one part; zeros outside.

    The rows' adapters are one product: A x of a row is zero at the depths of other slots than its
    own. mine, weights: from `load_b`, the first depths. row, real: [rows], `real` where it is no
    padding; column, known: [columns].
    """
    at = sums + column[None, :] * padded + row[:, None]
    # the padding too: a mask that ends at M would take loads and stores apart
    values = tl.load(at, mask=(row < padded)[:, None] & known[None, :], other=0.0)
    if b is not None:
        added = tl.zeros_like(values)
        if depths <= depth_block:
            added = _expand(
                *(added, shrunk, mine, weights, row, part),
                *(0, parts, rank, depths, depth_block, padded, precision),
            )
        else:
            for first in tl.static_range(0, depths, depth_block):
                within = (mine > first // rank) & ((mine - 1) * rank < first + depth_block)
                if tl.max((within & (mine > 0)).to(tl.int32), axis=0) > 0:
                    own_b = weights
                    if first > 0:
                        _, own_b = load_b(
                            *(b, slots, row, column, known, real),
                            *(first, outputs, rank, depths, depth_block),
                        )
                    added = _expand(
                        *(added, shrunk, mine, own_b, row, part),
                        *(first, parts, rank, depths, depth_block, padded, precision),
                    )
        values += tl.load(scales + row, mask=mine > 0, other=0.0)[:, None] * added
    return values


@jit
def _expand(
    added: tl.tensor,
    shrunk: tl.tensor,
    mine: tl.tensor,
    weights: tl.tensor,
    row: tl.tensor,
    part: tl.tensor,
    first: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    depths: tl.constexpr,
    depth_block: tl.constexpr,
    padded: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """added + A x @ B^T of the depths from `first` on, where A x is of each row's own slot."""
    depth = first + tl.arange(0, depth_block)
    below = (depth // rank * parts + part) * rank + depth % rank
    own = tl.load(
        shrunk + below[None, :] * padded + row[:, None],
        mask=(mine[:, None] == (depth // rank + 1)[None, :]) & (depth < depths)[None, :],
        other=0.0,
    )
    return tl.dot(own, tl.trans(weights.to(tl.float32)), added, input_precision=precision)


@jit
def clear_sums(
    sums: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    known: tl.tensor,
    padded: tl.constexpr,
) -> None:
    """Zeros where `load_sums` read, in the padding too."""
    # another thread than the one that reads an element may be the one to clear it
    tl.debug_barrier()
    zeros = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    at = sums + column[None, :] * padded + row[:, None]
    tl.store(at, zeros, mask=(row < padded)[:, None] & known[None, :])


@jit
def load_inverse_rms(
    squares: tl.tensor, row: tl.tensor, real: tl.tensor, eps: float, width: tl.constexpr
) -> tl.tensor:
    """What the norm that was put off multiplies each row by, float32 [rows, 1]."""
    return tl.rsqrt(tl.load(squares + row, mask=real, other=1.0) / width + eps)[:, None]
