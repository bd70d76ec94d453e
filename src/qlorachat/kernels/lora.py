"""LoRA of many adapters in one decode step: y += scale * (x @ A^T) @ B^T, each row its adapter.

A row names its adapter by a slot of the stacked weights; slot s is [s - 1] of them, 0 means none. A
fused projection (q|k|v, gate|up) keeps its parts' A in one matrix, so that one shrink and one
expand serve all of them: the first 16 ranks of each part, then the next 16, and so on. So the ranks
of a small adapter are the first rows, whatever there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from qlorachat.kernels.device import (
    dependent_launch,
    dot_precision,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)

RANK_GROUP = 16  # ranks of a part that lie together; tensor cores take no fewer
_ROWS = 16  # of one program
_RANKS = 16  # of one program of the shrink
_SPAN = 512  # inputs that one program of the shrink sums, in steps of _INPUTS
_INPUTS = 128
_OUTPUTS = 64  # of one program of the expand


def lora_shrink(x: torch.Tensor, a: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Partial sums of x @ A^T, float32 [splits, T, parts * R]; over dimension 0 they sum to it.

    x: [T, K], contiguous. a: [S, parts * R, K], contiguous, of x's dtype; R is a multiple of 16, a
    rank below it is padded with zero rows. slots: int32 [T]; rows of slot 0 get zeros. The splits
    depend on K alone, so a row's sums are the same in every batch.
    """
    rows, inputs = x.shape
    ranks = a.shape[1]
    assert a.shape[2] == inputs
    assert a.dtype == x.dtype
    assert all(tensor.is_contiguous() for tensor in (x, a))
    _check_slots(slots, rows)
    if not runs_triton(x):
        return lora_shrink_reference(x, a, slots)
    sums = x.new_empty(triton.cdiv(inputs, _SPAN), rows, ranks, dtype=torch.float32)
    grid = (triton.cdiv(ranks, _RANKS), len(sums), triton.cdiv(rows, _ROWS))
    tile = {"row_block": _ROWS, "rank_block": _RANKS, "input_block": _INPUTS, "span": _SPAN}
    _shrink_kernel[grid](
        *(x, a, slots, sums, rows),
        inputs=inputs,
        ranks=ranks,
        precision=dot_precision(x.dtype),
        **tile,
        num_warps=2,
        **dependent_launch(x),
    )
    return sums


def lora_expand_add(
    sums: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    y: torch.Tensor,
    columns: Sequence[int],
) -> None:
    """y += scale * t @ B^T in place, where t is the sum of `sums` over dimension 0.

    sums: float32 [splits, T, parts * R] from `lora_shrink`. b: [S, N, R], contiguous, of y's dtype.
    slots: int32 [T], rows of slot 0 are left as they are. scales: float32 [T], alpha / r times the
    adapter's strength. y: [T, N], contiguous. columns: where the parts of y begin, and N: (0, N)
    for one part, (0, H * D, (H + G) * D, (H + 2 * G) * D) for q|k|v; three parts at most.
    """
    rows, outputs = y.shape
    parts, rank = len(columns) - 1, b.shape[2]
    assert rank % RANK_GROUP == 0
    assert sums.shape == (len(sums), rows, parts * rank)
    assert sums.dtype == scales.dtype == torch.float32
    assert b.shape[1] == outputs
    assert b.dtype == y.dtype
    assert all(tensor.is_contiguous() for tensor in (sums, b, y))
    assert scales.shape == (rows,)
    assert parts <= 3
    assert (columns[0], columns[-1]) == (0, outputs)
    _check_slots(slots, rows)
    if not runs_triton(y):
        lora_expand_add_reference(sums, b, slots, scales, y, columns)
        return
    widest = max(stop - start for start, stop in pairwise(columns))
    _expand_kernel[(triton.cdiv(widest, _OUTPUTS), parts, triton.cdiv(rows, _ROWS))](
        *(sums, b, slots, scales, y, rows),
        *(*columns[1:], outputs, outputs)[:3],
        outputs=outputs,
        parts=parts,
        rank=rank,
        group=RANK_GROUP,
        splits=len(sums),
        row_block=_ROWS,
        output_block=_OUTPUTS,
        rank_block=triton.next_power_of_2(rank),
        num_warps=4,
        **dependent_launch(y),
    )


def lora_shrink_reference(x: torch.Tensor, a: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`lora_shrink` in plain torch, in one split; copies the weights of each row."""
    sums = torch.bmm(a[slots.clamp(min=1) - 1].float(), x.float()[:, :, None])[:, :, 0]
    return torch.where(slots[:, None] > 0, sums, 0.0)[None]


def lora_expand_add_reference(
    sums: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    scales: torch.Tensor,
    y: torch.Tensor,
    columns: Sequence[int],
) -> None:
    """`lora_expand_add` in plain torch; copies the weights of each row."""
    shrunk = by_parts(sums.sum(0), len(columns) - 1)
    for part, (start, stop) in enumerate(pairwise(columns)):
        added = torch.bmm(b[slots.clamp(min=1) - 1, start:stop].float(), shrunk[:, part, :, None])[
            :, :, 0
        ]
        y[:, start:stop] += torch.where(slots[:, None] > 0, scales[:, None] * added, 0.0)


def by_parts(shrunk: torch.Tensor, parts: int) -> torch.Tensor:
    """[..., parts * R] in A's order -> [..., parts, R]."""
    groups: torch.Tensor = shrunk.unflatten(-1, (-1, parts, RANK_GROUP))
    return groups.transpose(-3, -2).flatten(-2)


def _check_slots(slots: torch.Tensor, rows: int) -> None:
    assert slots.shape == (rows,)
    assert slots.dtype == torch.int32


@jit
def _shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    rows: int,
    inputs: tl.constexpr,
    ranks: tl.constexpr,
    row_block: tl.constexpr,
    rank_block: tl.constexpr,
    input_block: tl.constexpr,
    span: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    split = tl.program_id(1)
    row = tl.program_id(2) * row_block + tl.arange(0, row_block)
    rank = tl.program_id(0) * rank_block + tl.arange(0, rank_block)
    mine = tl.load(slots + row, mask=row < rows, other=0)
    total = tl.zeros([row_block, rank_block], tl.float32)
    slot = _next_slot(mine, 0)
    while slot < 2147483647:
        own = a + (slot - 1).to(tl.int64) * (ranks * inputs)
        for offset in range(0, span, input_block):
            column = split * span + offset + tl.arange(0, input_block)
            values = tl.load(
                x + row[:, None] * inputs + column[None, :],
                mask=(mine == slot)[:, None] & (column < inputs)[None, :],
                other=0.0,
            ).to(tl.float32)
            weights = tl.load(
                own + rank[:, None] * inputs + column[None, :],
                mask=(rank < ranks)[:, None] & (column < inputs)[None, :],
                other=0.0,
            ).to(tl.float32)
            total = tl.dot(values, tl.trans(weights), total, input_precision=precision)
        slot = _next_slot(mine, slot)
    at = (split * rows + row)[:, None] * ranks + rank[None, :]
    tl.store(sums + at, total, mask=(row < rows)[:, None] & (rank < ranks)[None, :])


@jit
def _expand_kernel(
    sums: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    y: tl.tensor,
    rows: int,
    first_stop: int,
    second_stop: int,
    third_stop: int,
    outputs: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    group: tl.constexpr,
    splits: tl.constexpr,
    row_block: tl.constexpr,
    rank_block: tl.constexpr,
    output_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    part = tl.program_id(1)
    column, stop = find_columns(part, first_stop, second_stop, third_stop, output_block)
    row = tl.program_id(2) * row_block + tl.arange(0, row_block)
    depth = tl.arange(0, rank_block)
    mine = tl.load(slots + row, mask=row < rows, other=0)

    shrunk = tl.zeros([row_block, rank_block], tl.float32)
    known = (mine > 0)[:, None] & (depth < rank)[None, :]
    place = find_ranks(depth, part, parts, group)
    for split in tl.static_range(splits):
        at = (split * rows + row)[:, None] * (parts * rank) + place[None, :]
        shrunk += tl.load(sums + at, mask=known, other=0.0)

    total = tl.zeros([row_block, output_block], tl.float32)
    inside = (column < stop)[:, None] & (depth < rank)[None, :]
    slot = _next_slot(mine, 0)
    while slot < 2147483647:
        own = b + (slot - 1).to(tl.int64) * (outputs * rank)
        weights = tl.load(own + column[:, None] * rank + depth[None, :], mask=inside, other=0.0)
        values = tl.where((mine == slot)[:, None], shrunk, 0.0)
        weights = tl.trans(weights.to(tl.float32))
        total = tl.dot(values, weights, total, input_precision="tf32x3")
        slot = _next_slot(mine, slot)

    scale = tl.load(scales + row, mask=mine > 0, other=0.0)
    at = row[:, None] * outputs + column[None, :]
    touched = (mine > 0)[:, None] & (column < stop)[None, :]
    old = tl.load(y + at, mask=touched, other=0.0)
    new = old.to(tl.float32) + scale[:, None] * total
    tl.store(y + at, new.to(old.dtype), mask=touched)


@jit
def find_columns(
    part: tl.tensor,
    first_stop: int,
    second_stop: int,
    third_stop: int,
    output_block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A program's columns, by its first number, among those of a part; and where the part ends."""
    start = tl.where(part == 0, 0, tl.where(part == 1, first_stop, second_stop))
    stop = tl.where(part == 0, first_stop, tl.where(part == 1, second_stop, third_stop))
    return start + tl.program_id(0) * output_block + tl.arange(0, output_block), stop


@jit
def find_ranks(
    ranks: tl.tensor, part: tl.tensor, parts: tl.constexpr, group: tl.constexpr
) -> tl.tensor:
    """Where ranks of a part are among those of all, as A has them."""
    return (ranks // group * parts + part) * group + ranks % group


@jit
def _next_slot(slots: tl.tensor, after: tl.tensor) -> tl.tensor:
    """The smallest of the slots above `after`; the largest int32 where there is none."""
    return tl.min(tl.where(slots > after, slots, 2147483647), axis=0)
