"""LoRA in a fused decode step of M rows, each with the slot of its adapter.

A x is computed by who makes x, or beside the product; then B (A x) is added beside the product, or
by who reads its sums. A slot is 0 for none; slot s is [s - 1] of A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qlorachat.kernels.cuda_source import Argument
from qlorachat.kernels.lora import lora_expand_add_reference

_APART = 256  # float32 numbers from a row of A x to the next: its readers are all blocks


def shrunk_stride(size: int) -> int:
    """How far apart rows of A x should be, in numbers: an L2 serves neighbours one by one."""
    return -(-size // _APART) * _APART


class Shrinking(NamedTuple):
    """shrunk += A x, of each row's own slot.

    a: [S, parts * R, K], contiguous, of x's dtype; R is a multiple of 16. slots: int32 [M]. shrunk:
    float32 [M, S * parts * R], rows contiguous; atomic adds, in no order. one: whether no two rows
    have different adapters. ranks: a multiple of 16, of each part's R the first ones, that rows
    have; None: all. The others are not looked at.
    """

    a: torch.Tensor
    slots: torch.Tensor
    shrunk: torch.Tensor
    one: bool = False
    parts: int = 1
    ranks: int | None = None

    @property
    def own_ranks(self) -> int:
        """That rows have, of each part."""
        return self.a.shape[1] // self.parts if self.ranks is None else self.ranks

    @property
    def sizes(self) -> tuple[int, int]:
        """Slots that rows may have, and ranks of all parts that they have."""
        return 1 if self.one else self.a.shape[0], self.parts * self.own_ranks

    def check(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        slots, ranks, _ = self.a.shape
        assert self.a.shape == (slots, ranks, columns)
        assert self.a.dtype == dtype
        assert ranks % self.parts == ranks // self.parts % 16 == 0
        assert self.own_ranks in range(0, ranks // self.parts + 1, 16)
        assert self.slots.shape == (rows,)
        assert self.slots.dtype == torch.int32
        assert self.shrunk.shape == (rows, slots * ranks)
        _check_shrunk(self.shrunk)
        assert self.a.is_contiguous()
        assert self.slots.is_contiguous()


class Expanding(NamedTuple):
    """sums += scale * B (A x), of each row's own slot.

    shrunk: float32 [M, S * parts * R], A x of every slot and part, rows contiguous. b: [S, N, R],
    contiguous, of x's dtype, alpha / r folded in; R is a multiple of 16. slots: int32 [M]. scales:
    float32 [M], the adapter's strength. one, ranks: as in `Shrinking`.
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
        slots, outputs, ranks = self.b.shape
        assert outputs == sum(heights)
        assert ranks % 16 == 0
        assert self.own_ranks in range(0, ranks + 1, 16)
        assert self.b.dtype == dtype
        assert self.shrunk.shape == (rows, slots * len(heights) * ranks)
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
    """What the products' sources call lora_a, shrunk, lora_b and so on, to ranks; these are all."""
    if lora is None:
        return None, None, None, None, None, 0, 0
    assert lora.ranks is None
    stride = lora.shrunk.stride(0)
    if isinstance(lora, Shrinking):
        return lora.a, lora.shrunk, None, lora.slots, None, stride, lora.a.shape[1]
    return None, lora.shrunk, lora.b, lora.slots, lora.scales, stride, lora.b.shape[2]


def shrinking_arguments(shrinking: Shrinking | None) -> Sequence[Argument]:
    """What the sources call lora_a, lora_slots, shrunk, stride, held, ranks, own_ranks and gap."""
    if shrinking is None:
        return None, None, None, 0, 0, 0, 0, 0
    a, slots, shrunk = shrinking[:3]
    held, parts, own = a.shape[1], shrinking.parts, shrinking.own_ranks
    return a, slots, shrunk, shrunk.stride(0), held, parts * own, own, held // parts - own


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
    parts, ranks = shrinking.parts, slice(shrinking.own_ranks)
    of_parts = a.unflatten(1, (parts, -1))[:, :, ranks]
    every = torch.einsum("mk,sprk->mspr", x.float(), of_parts.float())
    own = slots[:, None] == torch.arange(1, len(a) + 1, device=slots.device)
    sums = shrunk.unflatten(1, (len(a), parts, -1))[..., ranks]
    sums += torch.where(own[:, :, None, None], every, 0)


def expand_reference(
    sums: torch.Tensor, expanding: Expanding | None, heights: Sequence[int]
) -> None:
    """`Expanding` of sums [M, N] in plain torch; heights: of the parts of N."""
    if expanding is None:
        return
    shrunk, b, slots, scales = expanding[:4]
    columns = [sum(heights[:part]) for part in range(len(heights) + 1)]
    ranks = slice(expanding.own_ranks)
    every = shrunk.unflatten(1, (len(b), len(heights), -1))[..., ranks].flatten(2)
    own = every[torch.arange(len(sums), device=slots.device), slots.clamp(min=1) - 1]
    lora_expand_add_reference(own[None], b[:, :, ranks], slots, scales, sums, columns)
