"""LoRA in a fused decode step of M rows, each with the slot of its adapter.

A x is computed by who makes x, or beside the product; then B (A x) is added beside the product, or
by who reads its sums. A slot is 0 for none; slot s is [s - 1] of A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.lora import RANK_GROUP, lora_expand_add_reference, lora_shrink_reference

_APART = 256  # float32 numbers from a row of A x to the next: its readers are all blocks


def shrunk_stride(size: int) -> int:
    """How far apart rows of A x should be, in numbers: an L2 serves neighbours one by one."""
    return -(-size // _APART) * _APART


class Shrinking(NamedTuple):
    """shrunk += A x, of each row's own slot.

    a: [S, parts * R, K], contiguous, of x's dtype, its ranks in the order of `lora`. slots: int32
    [M]. shrunk: float32 [M, parts * R], rows contiguous; atomic adds, in no order. one: whether no
    two rows have different adapters. ranks: of the parts together, the first ones, that rows have;
    None: all. The others are not looked at. All of them are multiples of 16.
    """

    a: torch.Tensor
    slots: torch.Tensor
    shrunk: torch.Tensor
    one: bool = False
    ranks: int | None = None

    @property
    def own_ranks(self) -> int:
        """That rows have."""
        return self.a.shape[1] if self.ranks is None else self.ranks

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots that rows may have, and ranks that they have."""
        return 1 if self.one else self.a.shape[0], self.own_ranks

    def check(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        slots, ranks, _ = self.a.shape
        assert self.a.shape == (slots, ranks, columns)
        assert self.a.dtype == dtype
        assert ranks % RANK_GROUP == 0
        assert self.own_ranks in range(0, ranks + 1, RANK_GROUP)
        assert self.slots.shape == (rows,)
        assert self.slots.dtype == torch.int32
        assert self.shrunk.shape == (rows, ranks)
        _check_shrunk(self.shrunk)
        assert self.a.is_contiguous()
        assert self.slots.is_contiguous()


class Expanding(NamedTuple):
    """sums += scale * B (A x), of each row's own slot.

    shrunk: float32 [M, parts * R], A x as `Shrinking` leaves it. b: [S, N, R], contiguous, of x's
    dtype, alpha / r folded in; R is a multiple of 16. slots: int32 [M]. scales: float32 [M], the
    adapter's strength. one: as in `Shrinking`. ranks: of R the first ones, that rows have; None:
    all.
    """

    shrunk: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor
    one: bool = False
    ranks: int | None = None

    @property
    def own_ranks(self) -> int:
        """That rows have."""
        return self.b.shape[2] if self.ranks is None else self.ranks

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots that rows may have, and ranks that they have."""
        return 1 if self.one else self.b.shape[0], self.own_ranks

    def check(self, rows: int, heights: Sequence[int], dtype: torch.dtype) -> None:
        _, outputs, ranks = self.b.shape
        assert outputs == sum(heights)
        assert ranks % RANK_GROUP == 0
        assert self.own_ranks in range(0, ranks + 1, RANK_GROUP)
        assert self.b.dtype == dtype
        assert self.shrunk.shape == (rows, len(heights) * ranks)
        assert self.slots.shape == self.scales.shape == (rows,)
        assert self.slots.dtype == torch.int32
        assert self.scales.dtype == torch.float32
        _check_shrunk(self.shrunk)
        assert all(each.is_contiguous() for each in (self.b, self.slots, self.scales))


def _check_shrunk(shrunk: torch.Tensor) -> None:
    assert shrunk.dtype == torch.float32
    assert shrunk.stride(1) == 1
    assert shrunk.stride(0) % 4 == 0  # read by fours


def beside_arguments(lora: Shrinking | Expanding | None) -> Sequence[Argument]:
    """What the products' sources call lora_a, shrunk, lora_b and so on, to ranks."""
    if lora is None:
        return None, None, None, None, None, 0, 0, 0
    stride, own = lora.shrunk.stride(0), lora.own_ranks
    if isinstance(lora, Shrinking):
        return lora.a, lora.shrunk, None, lora.slots, None, stride, lora.a.shape[1], own
    return None, lora.shrunk, lora.b, lora.slots, lora.scales, stride, lora.b.shape[2], own


def shrinking_arguments(shrinking: Shrinking | None) -> Sequence[Argument]:
    """What the sources call lora_a, lora_slots, shrunk, stride, held and ranks."""
    if shrinking is None:
        return None, None, None, 0, 0, 0
    a, slots, shrunk = shrinking[:3]
    return a, slots, shrunk, shrunk.stride(0), a.shape[1], shrinking.own_ranks


def expanding_arguments(expanding: Expanding | None) -> Sequence[Argument]:
    """What the sources call lora_shrunk, lora_b, lora_slots, lora_scales, stride, held, ranks."""
    if expanding is None:
        return None, None, None, None, 0, 0, 0
    shrunk, b, slots, scales = expanding[:4]
    return shrunk, b, slots, scales, shrunk.stride(0), b.shape[2], expanding.own_ranks


def shrink_reference(x: torch.Tensor, shrinking: Shrinking | None) -> None:
    """`Shrinking` of x [M, K] in plain torch."""
    if shrinking is None:
        return
    a, slots, shrunk = shrinking[:3]
    ranks = shrinking.own_ranks
    shrunk[:, :ranks] += lora_shrink_reference(x, a[:, :ranks], slots)[0]


def expand_reference(
    sums: torch.Tensor, expanding: Expanding | None, heights: Sequence[int]
) -> None:
    """`Expanding` of sums [M, N] in plain torch; heights: of the parts of N."""
    if expanding is None:
        return
    shrunk, b, slots, scales = expanding[:4]
    columns = [sum(heights[:part]) for part in range(len(heights) + 1)]
    ranks = expanding.own_ranks
    own = shrunk[None, :, : len(heights) * ranks]
    lora_expand_add_reference(own, b[:, :, :ranks], slots, scales, sums, columns)
