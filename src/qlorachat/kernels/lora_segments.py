"""LoRA of a prefill, in plain torch: whole stretches of rows that share an adapter."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional


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
    """y += scale * (x @ A^T) @ B^T in place, a few matrix products a segment.

    x: [T, K]. a: [S, parts * R, K]. b: [S, N, R]. y: [T, N], rows contiguous. All of one dtype.
    columns: where the parts of y begin, and N, as for `lora_expand_add`; any number of parts.
    """
    rank = b.shape[2]
    assert x.dtype == a.dtype == b.dtype == y.dtype
    assert a.shape[1:] == ((len(columns) - 1) * rank, x.shape[1])
    assert y.shape == (len(x), b.shape[1])
    assert (columns[0], columns[-1]) == (0, y.shape[1])
    for start, stop, slot, scale in segments:
        if slot == 0:
            continue
        shrunk = functional.linear(x[start:stop], a[slot - 1])
        for part, (first, last) in enumerate(pairwise(columns)):
            own = shrunk[:, part * rank : (part + 1) * rank]
            y[start:stop, first:last].addmm_(own, b[slot - 1, first:last].T, alpha=scale)
