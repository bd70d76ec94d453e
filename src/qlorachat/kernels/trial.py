"""Our CUDA kernels on the card at hand, against their references on small inputs.

Each function takes a tensor of the card and raises RuntimeError where a kernel can't be
launched or differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from qlorachat.kernels import decode_step
from qlorachat.kernels.decode_attention import (
    PagedContext,
    attend_sums,
    attend_sums_reference,
    make_meeting,
)
from qlorachat.kernels.decode_lora import Expanding, Shrinking
from qlorachat.kernels.eight_bits import narrow, widen
from qlorachat.kernels.nf4 import random_matrix
from qlorachat.kernels.nf4_matmul import nf4_matmul_tiled, nf4_matmul_tiled_reference
from qlorachat.kernels.nf4_write_out import (
    MOST_RANKS,
    LoraMatrices,
    nf4_write_out,
    nf4_write_out_reference,
)
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import rows_padded, tile, tiled_shape

HALF = torch.bfloat16
_NEAR = 2**-5  # of the largest number: many roundings of bfloat16
_RANK, _EPS = 16, 1e-5
_WRITTEN = range(16, MOST_RANKS + 1, 16)  # ranks of adapters in a weight


@torch.inference_mode()
def try_products(like: torch.Tensor) -> None:
    """NF4 products of every instance with their adapters, and weights written out."""
    make, heights = _Inputs(like), (48, 16, 96)
    for columns in (256, 320):
        weight = random_matrix(heights, columns, make.generator)
        for written in (None, *(make.matrices(ranks, heights, columns) for ranks in _WRITTEN)):
            own = (weight, written)
            _compare("a weight written out", nf4_write_out(*own), nf4_write_out_reference(*own))
        for rows in (3, 16, 20, 64):
            x = tile(make.normal(rows, columns), rows_padded(rows))
            sums = make.normal(rows, weight.rows).float()
            kernels = (nf4_matmul_tiled, nf4_matmul_tiled_reference)
            for one in (0, _RANK):  # all ranks that are held, and some
                inputs = (f"a product of {rows} rows", *kernels, x, weight, sums)
                _try(*inputs, make.shrinking(rows, columns, one=one))
                _try(*inputs, make.expanding(rows, heights, one=one))


@torch.inference_mode()
def try_step(like: torch.Tensor) -> None:
    """What comes between the products of a fused step, attention apart."""
    make, width = _Inputs(like), 192
    for rows, one in product((3, 20), (0, *decode_step.RANKS_OF_ONE)):  # each has its own kernels
        x = like.new_zeros(tiled_shape(width, rows_padded(rows)), dtype=HALF)
        shrinking = make.shrinking(rows, width, 3, one=one)
        residual, squares = make.normal(rows, width), make.ones(rows)
        normed = (make.normal(width), x, residual, squares, shrinking)
        ids = like.new_zeros(rows, dtype=torch.int64)
        begin = (decode_step.begin_residual, decode_step.begin_residual_reference)
        _try("the first residual", *begin, ids, make.normal(1, width), *normed)
        sums = make.normal(rows, width).float()
        add = (decode_step.add_to_residual, decode_step.add_to_residual_reference)
        lora = (make.expanding(rows, (width,), one=one), shrinking)
        _try("a residual", *add, sums, residual, normed[0], x, squares, *lora)
        sums = make.normal(rows, 2 * width).float()
        silu = (decode_step.silu_mul_sums, decode_step.silu_mul_sums_reference)
        expanding = make.expanding(rows, (width, width), one=one)
        _try("SwiGLU", *silu, sums, LateNorm(squares, 1, _EPS), x, expanding)


@torch.inference_mode()
def try_attention(like: torch.Tensor, group: int, head_dim: int, cached: torch.dtype) -> None:
    """Rope and attention of two key heads, one block a context and several.

    group: query heads of a key head. cached: the dtype of keys and values.
    """
    make, block, kv_heads = _Inputs(like), 16, 2
    lengths = like.new_tensor([1, 40, 300], dtype=torch.int32)
    rows, longest = len(lengths), int(lengths.max())
    heads, width = kv_heads * group, -(-longest // block)
    tables = like.new_tensor(range(rows * width), dtype=torch.int32).view(rows, width)
    slots = tables[:, 0] * block + lengths - 1  # a row's blocks follow each other
    keys, values = (
        narrow(make.normal(rows * width, block, kv_heads, head_dim), cached) for _ in range(2)
    )
    rope = (make.normal(longest, head_dim), make.normal(longest, head_dim))
    context = PagedContext(*rope, lengths - 1, slots, keys, values, tables, lengths)
    sums = make.normal(rows, (heads + 2 * kv_heads) * head_dim).float()
    out = like.new_zeros(tiled_shape(heads * head_dim, rows_padded(rows)), dtype=HALF)
    for splits in (1, 4):
        meeting = make_meeting(rows, heads, kv_heads, head_dim, like.device, splits)
        attend = partial(attend_sums, meeting=meeting, splits=splits)
        norm = LateNorm(make.ones(rows), 1, _EPS)
        kernels = (attend, attend_sums_reference)
        _try(f"attention in {splits} blocks", *kernels, sums, norm, context, head_dim**-0.5, out)


class _Inputs:
    """The same numbers whenever it is made; no other random number depends on them."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self.generator = torch.Generator(like.device).manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        return self._like.new_empty(shape, dtype=HALF).normal_(generator=self.generator)

    def ones(self, rows: int) -> torch.Tensor:
        return self._like.new_ones(rows, dtype=torch.float32)

    def slots(self, rows: int, one: int) -> torch.Tensor:
        """No adapter, and each of two; or no adapter and one, of so many ranks."""
        own = [2 * (row % 2) if one else row % 3 for row in range(rows)]
        return self._like.new_tensor(own, dtype=torch.int32)

    def ranks(self, one: int) -> tuple[int, int | None]:
        """That are held, and that rows have: one adapter some of them."""
        return (one + _RANK, one) if one else (_RANK, None)

    def matrices(self, ranks: int, heights: Sequence[int], columns: int) -> LoraMatrices:
        a = self.normal(len(heights) * ranks, columns) / columns**0.5
        return LoraMatrices(a, self.normal(sum(heights), ranks), ranks, 1.0)

    def shrinking(self, rows: int, columns: int, parts: int = 1, *, one: int = 0) -> Shrinking:
        held, ranks = self.ranks(one)
        a = self.normal(2, parts * held, columns) / columns**0.5
        shrunk = self._like.new_zeros(rows, parts * held, dtype=torch.float32)
        own = None if ranks is None else parts * ranks
        return Shrinking(a, self.slots(rows, one), shrunk, one > 0, own)

    def expanding(self, rows: int, heights: Sequence[int], *, one: int = 0) -> Expanding:
        held, ranks = self.ranks(one)
        shrunk = self.normal(rows, len(heights) * held).float()
        b = self.normal(2, sum(heights), held)
        return Expanding(shrunk, b, self.slots(rows, one), self.ones(rows), one > 0, ranks)


def _try(
    what: str,
    kernel: Callable[..., None],
    reference: Callable[..., None],
    *arguments: Any,
) -> None:
    """Both on copies of the arguments, of which every tensor must come out alike."""
    ours, theirs = ([_copy(each) for each in arguments] for _ in range(2))
    kernel(*ours)
    reference(*theirs)
    for own, other in zip(_tensors(ours), _tensors(theirs), strict=True):
        _compare(what, own, other)


def _copy(argument: Any) -> Any:
    """Of a tensor, or of a named tuple with some."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_copy, argument))
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple):
            yield from _tensors(each)


def _compare(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (widen(ours, HALF).float() - widen(theirs, HALF).float()).abs().max()
    if not error <= _NEAR * widen(theirs, HALF).float().abs().max():  # nor where it is NaN
        raise RuntimeError(f"{what} differs from its reference by {float(error):.2g}")
