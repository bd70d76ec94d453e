"""The CUDA kernels of a fused decode step on a card, against their references.

    PYTHONPATH=src python bench/fused_check.py [--as-ampere]
    PYTHONPATH=src compute-sanitizer --tool racecheck --kernel-regex kns=nf4_matmul \\
        --kernel-regex kns=attend --kernel-regex kns=residual --kernel-regex kns=silu \\
        python bench/fused_check.py --few

Random inputs from 1 to 64 rows, ranks 16 to 512, one adapter and several, heads of 64 to 256 and
groups of 1 to 8, contexts from nothing to thousands of positions in 16 and 8 bits, NaN where
nothing may look; of the products those with A x or B (A x) beside them. Each launch is repeated:
what has no atomic adds must come out equal to the bit, the rest within the spread of float32 sums;
A x, of the product's x or of the x that was written. Ends with status 1 if a kernel differs.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from as_ampere import as_ampere
from qlorachat.kernels import decode_attention, decode_step
from qlorachat.kernels.decode_attention import Meeting, PagedContext, make_meeting
from qlorachat.kernels.decode_lora import Expanding, Shrinking, shrink_reference
from qlorachat.kernels.eight_bits import INT8, narrow, widen
from qlorachat.kernels.nf4 import random_matrix
from qlorachat.kernels.nf4_matmul import nf4_matmul_tiled, nf4_matmul_tiled_reference
from qlorachat.kernels.sums import LateNorm
from qlorachat.kernels.tiles import rows_padded, tile, tiled_shape, untile

ROUNDED = 2**-7  # one step of bfloat16's last digit
SUMMED = 1e-5  # of float32 sums in another order
SPLIT = 2**-15  # of A x in two bfloat16
NAN, UNTOUCHED = float("nan"), 7.0
ROWS = (1, 2, 3, 8, 9, 16, 20, 32, 47, 64)
RANKS = (None, 16, 48, 64, 192, 512)
SLOTS = 4
# whether rows have one alone, ranks of what is added and of the next product's three parts, and how
# many more slots hold
ADAPTERS = (
    *((False, *ranks, 0) for ranks in zip(RANKS, (*RANKS[1:], RANKS[0]), strict=True)),
    # kernels of their own
    *((True, *ranks, 0) for ranks in ((16, None), (None, 48), (16, 48), (32, 96), (64, 192))),
    *((True, 16, 48, 48), (False, 16, 48, 48), (False, 64, 192, 16)),
)
SPLITS = (None, 1, 2, 4, 8)
EPS, HIDDEN = 1e-5, 100

Case = tuple[str, Callable[..., None], Callable[..., None], tuple[Any, ...]]


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def product(rows: int, outputs: int) -> tuple[torch.Tensor, LateNorm]:
    """Sums as a product of `rows` rows leaves them, and the norm that was put off."""
    squares = 100 * torch.rand(rows, device="cuda")
    return torch.randn(rows, outputs, device="cuda"), LateNorm(squares, HIDDEN, EPS)


def stacked(rows: int, one: bool, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of slots and each row's slot: the second is nobody's, NaN those that no row has."""
    known = torch.tensor([0, 3] if one else [0, 1, 3, 4], dtype=torch.int32)
    slots = known[torch.randint(0, len(known), (rows,))]
    slots[0] = 3
    weights = half(SLOTS, *shape) / shape[-1] ** 0.5
    for slot in range(1, SLOTS + 1):
        if slot not in slots:
            weights[slot - 1] = NAN
    return weights, slots.cuda()


def shrinking(
    rows: int, columns: int, rank: int | None, one: bool = False, more: int = 0
) -> Shrinking | None:
    """A is NaN where nothing may look."""
    if rank is None:
        return None
    a, slots = stacked(rows, one, rank + more, columns)
    a[:, rank:] = NAN
    shrunk = torch.randn(rows, a.shape[1], device="cuda")
    return Shrinking(a, slots, shrunk, one, rank if more else None)


def expanding(
    rows: int, width: int, parts: int, rank: int | None, one: bool = False, more: int = 0
) -> Expanding | None:
    """A x and B are NaN where nothing may look."""
    if rank is None:
        return None
    b, slots = stacked(rows, one, parts * width, rank + more)
    shrunk = torch.randn(rows, parts * (rank + more), device="cuda")
    shrunk[slots == 0] = NAN
    b[..., rank:], shrunk[..., parts * rank :] = NAN, NAN
    scales, ranks = 2 * torch.rand(rows, device="cuda"), rank if more else None
    return Expanding(shrunk, b, slots, scales, one, ranks)


def tiled(rows: int, columns: int) -> torch.Tensor:
    shape = tiled_shape(columns, rows_padded(rows))
    return torch.full(shape, UNTOUCHED, dtype=torch.bfloat16, device="cuda")


def step_cases() -> Iterator[Case]:
    for rows in ROWS:
        for width in (64, 576, 4096):
            h, weight, squares = half(rows, width), half(width), torch.rand(rows, device="cuda")
            ids = torch.randint(0, 50, (rows,), device="cuda")
            for one, rank, next_rank, more in ADAPTERS:
                adapters = shrinking(rows, width, next_rank, one, more)
                added = expanding(rows, width, 1, rank, one, more)
                swiglu = expanding(rows, width, 2, rank, one, more)
                normed = (weight, tiled(rows, width))
                said = f"{rows} rows of {width}, {'one adapter' if one else 'several'}"
                said += f" with {more} more" if more else ""
                heading = f"{said}, rank {rank}"
                yield (
                    f"begin_residual, {said}, rank {next_rank}",
                    *(decode_step.begin_residual, decode_step.begin_residual_reference),
                    (ids, half(50, width), *normed, h * NAN, squares, adapters),
                )
                yield (
                    f"add_to_residual, {heading}, next rank {next_rank}",
                    *(decode_step.add_to_residual, decode_step.add_to_residual_reference),
                    (product(rows, width)[0], h, *normed, squares, added, adapters),
                )
                yield (
                    f"the last add_to_residual, {heading}",
                    *(decode_step.add_to_residual, decode_step.add_to_residual_reference),
                    (product(rows, width)[0], h, None, None, None, added, None),
                )
                yield (
                    f"silu_mul_sums, {heading}",
                    *(decode_step.silu_mul_sums, decode_step.silu_mul_sums_reference),
                    (*product(rows, 2 * width), normed[1], swiglu),
                )


def product_cases() -> Iterator[Case]:
    """Of weights whose 16 code values are exact in bfloat16, as kernels have them."""
    for columns in (576, 4096):
        matrix = random_matrix((1024, 272), columns, torch.Generator("cuda").manual_seed(columns))
        weight = replace(matrix, code=matrix.code.bfloat16().float())
        ranks = [(rank, more) for rank in RANKS for more in ((0, 48) if rank else (0,))]
        for rows, (rank, more) in itertools.product((1, 8, 9, 20, 64), ranks):
            x = tile(half(rows, columns), rows_padded(rows))
            x[:, rows:] = NAN
            sums = torch.randn(rows, weight.rows, device="cuda")
            beside: dict[str, Shrinking | Expanding | None] = {
                "A": shrinking(rows, columns, rank, more=more)
            }
            if rank:
                beside["B"] = expanding(rows, weight.rows // 2, 2, rank, more=more)
            for what, lora in beside.items():
                yield (
                    f"nf4_matmul_tiled, {rows} rows of {columns}, {what} of rank {rank} + {more}",
                    *(nf4_matmul_tiled, nf4_matmul_tiled_reference),
                    (x, weight, sums, lora),
                )


def attention_cases() -> Iterator[Case]:
    shapes = (
        (4, 4, 64),
        (9, 3, 64),
        (8, 1, 64),
        (4, 4, 128),
        (8, 2, 128),
        (8, 1, 128),
        (2, 1, 256),
    )
    longest = (0, 1, 2, 16, 17, 129, 1000, 3000)
    for (number, rows), in_8_bits in itertools.product(enumerate(ROWS * 7), (False, True)):
        heads, kv_heads, dim = shapes[number % len(shapes)]
        splits = SPLITS[number // len(ROWS) % len(SPLITS)]
        contexts = [longest[(number + i) % (3 + number % 6)] for i in range(rows)]
        width = max(1, -(-max(contexts) // 16))
        blocks = rows * width + 1
        cache = half(2, blocks, 16, kv_heads, dim)
        tables = torch.randperm(blocks, device="cuda")[: rows * width].int().view(rows, width)
        lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        places = (lengths - 1).clamp(min=0)
        slots = tables.gather(1, (places // 16)[:, None].long())[:, 0] * 16 + places % 16
        for row, length in enumerate(contexts):  # what lies beyond a context is not looked at
            if length % 16:
                cache[:, tables[row, length // 16], length % 16 :] = NAN
        if in_8_bits:
            cache = narrow(cache, INT8)
        angles = torch.rand(4096, dim, device="cuda")
        context = PagedContext(
            *(angles.cos().bfloat16(), angles.sin().bfloat16(), places),
            *(torch.where(lengths > 0, slots, -1), *cache.unbind(), tables, lengths),
        )
        heading = f"attend_sums, {rows} rows, heads {heads}/{kv_heads}/{dim}, {cache.dtype}"
        meeting = make_meeting(rows, heads, kv_heads, dim, cache.device, splits)
        yield (
            f"{heading}, splits {splits}",
            decode_attention.attend_sums,
            decode_attention.attend_sums_reference,
            (
                *(*product(rows, (heads + 2 * kv_heads) * dim), context),
                *(dim**-0.5, tiled(rows, heads * dim)),
                *((meeting,) if splits is None else (meeting, splits)),
            ),
        )


def copy(argument: Any) -> Any:
    """Of a tensor, or of a named tuple with some."""
    if isinstance(argument, tuple):
        return type(argument)(*map(copy, argument))
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Of all arguments but those that atomic adds leave, and scratch."""
    for each in arguments:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, tuple) and not isinstance(each, Shrinking | Meeting):
            yield from tensors(each)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, of the largest expected number; infinite where NaN and numbers do not match."""
    ours, theirs = widen(ours, torch.float32).float(), widen(theirs, torch.float32).float()
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def check(case: Case) -> str | None:
    """What differs, in a few words."""
    name, kernel, reference, arguments = case
    allowed = allowance(kernel, arguments)
    runs = [[copy(argument) for argument in arguments] for _ in range(3)]
    reference(*runs[2][: reference.__code__.co_argcount])  # it has no meeting and splits
    for own in runs[:2]:
        kernel(*own)
    torch.cuda.synchronize()
    for place, (first, second, expected) in enumerate(zip(*map(tensors, runs), strict=True)):
        if (worst := difference(first, expected)) > allowed:
            return f"{name}: tensor {place} differs by {worst:.2e}"
        if expected.dtype != torch.float32 and not torch.equal(
            first.float().nan_to_num(), second.float().nan_to_num()
        ):
            return f"{name}: tensor {place} differs from run to run"
    if any(not shrunk_well(own, arguments) for own in runs[:2]):
        return f"{name}: A x differs"
    return None


def allowance(kernel: Callable[..., None], arguments: Sequence[Any]) -> float:
    """Of a difference."""
    if kernel is nf4_matmul_tiled:
        expands = any(isinstance(each, Expanding) for each in arguments)
        return SPLIT if expands else SUMMED
    # one new key or value that is rounded to another code
    in_8_bits = any(each.dtype == INT8 for each in tensors(arguments))
    return 2 * ROUNDED if in_8_bits else ROUNDED


def shrunk_well(run: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether A x of the tiled x, of three dimensions, was added where it belongs."""
    for own, old in zip(run, given, strict=True):
        if isinstance(old, Shrinking):
            (x,) = (each for each in run if isinstance(each, torch.Tensor) and each.ndim == 3)
            expected = copy(old)
            shrink_reference(untile(x, len(old.slots), old.a.shape[2]), expected)
            ours, theirs = own.shrunk.flatten(), expected.shrunk.flatten()
            others = (theirs == old.shrunk.flatten()).nonzero()
            return difference(ours, theirs) <= SUMMED and torch.equal(ours[others], theirs[others])
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--as-ampere", action="store_true", help="what cards before Hopper run")
    parser.add_argument("--few", action="store_true", help="every 23rd case, for a sanitizer")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    failed, counted = [], 0
    with as_ampere(arguments.as_ampere):
        cases = itertools.chain(step_cases(), product_cases(), attention_cases())
        for case in itertools.islice(cases, 0, None, 23 if arguments.few else 1):
            counted += 1
            if problem := check(case):
                failed.append(problem)
                print(problem, flush=True)
    print(f"{counted} cases, {len(failed)} failed, on {torch.cuda.get_device_name()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
