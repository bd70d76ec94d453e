"""LoRA of a prefill: whole stretches of rows that share an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

from qlorachat.kernels.device import (
    dependent_launch,
    dot_precision,
    jit,
    runs_triton,
    tl,
    triton,
    wait_for_previous,
)
from qlorachat.kernels.lora import RANK_GROUP, by_parts, find_columns, find_ranks

_ROWS, _OUTPUTS = 64, 128  # of one program
_RANKS = 64  # that it takes at a time


class LoraSegment(NamedTuple):
    """Rows start to stop of one adapter; neighbours of one slot and scale are better joined."""

    start: int
    stop: int
    slot: int  # s: the adapter at [s - 1] of the stacks; 0: none
    scale: float  # alpha / r times the adapter's strength


def lora_add_segments(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    segments: Sequence[LoraSegment],
    y: torch.Tensor,
    columns: Sequence[int],
) -> None:
    """y += scale * (x @ A^T) @ B^T in place, segment by segment.

    x: [T, K]. a: [S, parts * R, K], its ranks in the order of `lora`. b: [S, N, R]. y: [T, N]. All
    contiguous and of one dtype; R is a multiple of 16. columns: where the parts of y begin, and N,
    as for `lora_expand_add`.
    """
    parts, rank = len(columns) - 1, b.shape[2]
    assert rank % RANK_GROUP == 0
    assert x.dtype == a.dtype == b.dtype == y.dtype
    assert a.shape[1:] == (parts * rank, x.shape[1])
    assert y.shape == (len(x), b.shape[1])
    assert all(tensor.is_contiguous() for tensor in (b, y))
    assert parts <= 3
    assert (columns[0], columns[-1]) == (0, y.shape[1])
    add = _expand_add if runs_triton(y) else _expand_add_reference
    for start, stop, slot, scale in segments:
        if slot != 0:
            shrunk = functional.linear(x[start:stop], a[slot - 1])
            add(shrunk, b[slot - 1], scale, y[start:stop], columns)


def _expand_add(
    shrunk: torch.Tensor, b: torch.Tensor, scale: float, y: torch.Tensor, columns: Sequence[int]
) -> None:
    """All parts in one launch: y, many times as large as the rest, is read and written once."""
    (rows, outputs), rank = y.shape, b.shape[1]
    widest = max(stop - start for start, stop in pairwise(columns))
    parts = len(columns) - 1
    _expand_segment_kernel[(triton.cdiv(widest, _OUTPUTS), parts, triton.cdiv(rows, _ROWS))](
        *(shrunk, b, y, scale, rows),
        *(*columns[1:], outputs, outputs)[:3],
        outputs=outputs,
        parts=parts,
        rank=rank,
        group=RANK_GROUP,
        row_block=_ROWS,
        output_block=_OUTPUTS,
        rank_block=min(_RANKS, triton.next_power_of_2(rank)),
        precision=dot_precision(y.dtype),
        num_warps=4,
        **dependent_launch(y),
    )


def _expand_add_reference(
    shrunk: torch.Tensor, b: torch.Tensor, scale: float, y: torch.Tensor, columns: Sequence[int]
) -> None:
    own = by_parts(shrunk, len(columns) - 1)
    for part, (first, last) in enumerate(pairwise(columns)):
        y[:, first:last].addmm_(own[:, part], b[first:last].T, alpha=scale)


@jit
def _expand_segment_kernel(
    shrunk: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    scale: float,
    rows: int,
    first_stop: int,
    second_stop: int,
    third_stop: int,
    outputs: tl.constexpr,
    parts: tl.constexpr,
    rank: tl.constexpr,
    group: tl.constexpr,
    row_block: tl.constexpr,
    output_block: tl.constexpr,
    rank_block: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr,
) -> None:
    wait_for_previous(early)
    part = tl.program_id(1)
    column, stop = find_columns(part, first_stop, second_stop, third_stop, output_block)
    row = (tl.program_id(2) * row_block + tl.arange(0, row_block)).to(tl.int64)
    total = tl.zeros([row_block, output_block], tl.float32)
    for first in range(0, rank, rank_block):
        depth = first + tl.arange(0, rank_block)
        values = tl.load(
            shrunk + row[:, None] * (parts * rank) + find_ranks(depth, part, parts, group)[None, :],
            mask=(row < rows)[:, None] & (depth < rank)[None, :],
            other=0.0,
        ).to(tl.float32)
        weights = tl.load(
            b + column[:, None] * rank + depth[None, :],
            mask=(column < stop)[:, None] & (depth < rank)[None, :],
            other=0.0,
        ).to(tl.float32)
        total = tl.dot(values, tl.trans(weights), total, input_precision=precision)
    at = y + row[:, None] * outputs + column[None, :]
    inside = (row < rows)[:, None] & (column < stop)[None, :]
    old = tl.load(at, mask=inside, other=0.0)
    tl.store(at, (old.to(tl.float32) + scale * total).to(old.dtype), mask=inside)
