"""The CUDA kernels of a fused decode step on a Hopper card, against their references.

    PYTHONPATH=src python bench/fused_check.py

Random inputs from 1 to 64 rows, ranks 16 to 256, several slots, heads of 64 to 256 and groups of 1
to 8, contexts from nothing to thousands of positions, in NaN where nothing may look. Each launch is
repeated: what has no atomic adds must come out equal to the bit, the rest within the spread of
float32 sums. Ends with status 1 if a kernel differs.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qlorachat.kernels import decode_attention, decode_step
from qlorachat.kernels.sums import RowAdapters
from qlorachat.kernels.tiles import rows_padded, tiled_shape

ROUNDED = 2**-7  # one step of bfloat16's last digit
NAN, UNTOUCHED = float("nan"), 7.0
ROWS = (1, 2, 3, 8, 9, 16, 20, 32, 47, 64)
RANKS = (None, 16, 48, 64, 256)
EPS, HIDDEN = 1e-5, 100

Case = tuple[str, Callable[..., None], Callable[..., None], tuple[Any, ...]]


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def product(rows: int, parts: tuple[int, ...], rank: int | None) -> tuple[Any, ...]:
    """Sums, adapters and squares, as a product of `rows` rows leaves them."""
    outputs, slots, adapters = sum(parts), 4, None
    if rank is not None:
        own = torch.randint(0, slots + 1, (rows,), dtype=torch.int32, device="cuda")
        shrunk = torch.randn(rows, slots, len(parts) * rank, device="cuda")
        shrunk[own[:, None] != torch.arange(1, slots + 1, device="cuda")] = NAN
        adapters = RowAdapters(
            shrunk=shrunk.flatten(1),
            b=half(slots, outputs, rank) / rank**0.5,
            slots=own,
            scales=torch.rand(rows, device="cuda") * 2,
        )
    sums = torch.randn(rows, outputs, device="cuda")
    return sums, adapters, 100 * torch.rand(rows, device="cuda")


def tiled(rows: int, columns: int) -> torch.Tensor:
    shape = tiled_shape(columns, rows_padded(rows))
    return torch.full(shape, UNTOUCHED, dtype=torch.bfloat16, device="cuda")


def step_cases() -> Iterator[Case]:
    for rows in ROWS:
        for width in (64, 576, 4096):
            h, weight, squares = half(rows, width), half(width), torch.rand(rows, device="cuda")
            ids = torch.randint(0, 50, (rows,), device="cuda")
            yield (
                f"begin_residual, {rows} rows of {width}",
                *(decode_step.begin_residual, decode_step.begin_residual_reference),
                (ids, half(50, width), weight, tiled(rows, width), h * NAN, squares),
            )
            for rank in RANKS:
                sums, adapters, squares = product(rows, (width,), rank)
                name = f"add_to_residual, {rows} rows of {width}, rank {rank}"
                kernel = (decode_step.add_to_residual, decode_step.add_to_residual_reference)
                yield name, *kernel, (sums, adapters, h, weight, tiled(rows, width), squares)
                yield f"the last {name}", *kernel, (sums, adapters, h, None, None, None)
                taken = product(rows, (width, width), rank)
                yield (
                    f"silu_mul_sums, {rows} rows of {width}, rank {rank}",
                    *(decode_step.silu_mul_sums, decode_step.silu_mul_sums_reference),
                    (*taken, HIDDEN, EPS, tiled(rows, width)),
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
    for number, rows in enumerate(ROWS * 7):
        heads, kv_heads, dim = shapes[number % len(shapes)]
        rank, splits = RANKS[number % len(RANKS)], (None, 1, 2, 4, 8)[number % 3]
        lengths = [longest[(number + i) % (3 + number % 6)] for i in range(rows)]
        width = max(1, -(-max(lengths) // 16))
        blocks = rows * width + 1
        cache = half(2, blocks, 16, kv_heads, dim)
        tables = torch.randperm(blocks, device="cuda")[: rows * width].int().view(rows, width)
        context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        places = (context - 1).clamp(min=0)
        slots = tables.gather(1, (places // 16)[:, None].long())[:, 0] * 16 + places % 16
        for row, length in enumerate(lengths):  # what lies beyond a context is not looked at
            if length % 16:
                cache[:, tables[row, length // 16], length % 16 :] = NAN
        parts = (heads * dim, kv_heads * dim, kv_heads * dim)
        angles = torch.rand(4096, dim, device="cuda")
        heading = f"attend_sums, {rows} rows, heads {heads}/{kv_heads}/{dim}"
        yield (
            f"{heading}, rank {rank}, splits {splits}",
            decode_attention.attend_sums,
            decode_attention.attend_sums_reference,
            (
                *(*product(rows, parts, rank), HIDDEN, EPS),
                *(angles.cos().bfloat16(), angles.sin().bfloat16(), places),
                *(torch.where(context > 0, slots, -1), *cache.unbind(), tables, context),
                *(dim**-0.5, tiled(rows, heads * dim)),
                *(() if splits is None else (splits,)),
            ),
        )


def copy(argument: Any) -> Any:
    if isinstance(argument, RowAdapters):
        return RowAdapters(*(tensor.clone() for tensor in argument))
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, of the largest expected number; infinite where NaN and numbers do not match."""
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return float("inf")
    ours, theirs = ours.float().nan_to_num(), theirs.float().nan_to_num()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


def check(case: Case) -> str | None:
    """What differs, in a few words."""
    name, kernel, reference, arguments = case
    runs = [[copy(argument) for argument in arguments] for _ in range(3)]
    reference(*runs[2][: reference.__code__.co_argcount])  # it has no splits
    for own in runs[:2]:
        kernel(*own)
    torch.cuda.synchronize()
    for place, (first, second, expected) in enumerate(zip(*runs, strict=True)):
        if not isinstance(expected, torch.Tensor) or expected.numel() == 0:
            continue
        if (worst := difference(first, expected)) > ROUNDED:
            return f"{name}: argument {place} differs by {worst:.2e}"
        if expected.dtype != torch.float32 and not torch.equal(
            first.nan_to_num(), second.nan_to_num()
        ):
            return f"{name}: argument {place} differs from run to run"
    return None


def main() -> int:
    torch.manual_seed(0)
    failed, counted = [], 0
    for cases in (step_cases, attention_cases):
        for case in cases():
            counted += 1
            if problem := check(case):
                failed.append(problem)
                print(problem, flush=True)
    print(f"{counted} cases, {len(failed)} failed, on {torch.cuda.get_device_name()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
