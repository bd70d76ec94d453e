"""The Triton kernels of a plain step on a CUDA card: against their references, and their time.

    PYTHONPATH=src python bench/kernels_check.py

Shapes of Llama-2-7B in bfloat16, unless a line says otherwise. Needs torch and triton alone, and
under a minute. GB/s count what a kernel must read and write; weights and caches rotate over more
than the L2 of a card holds. Ends with status 1 if a kernel differs or breaks.
"""

import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch

from qlorachat.kernels import activation, attention, lora, lora_segments, norm, rotary
from qlorachat.kernels.device import runs_triton, triton
from qlorachat.kernels.eight_bits import INT8, SCALE_BYTES, narrow

cuda: Any = torch.cuda
SECONDS = 50  # after which nothing more is begun
LAYERS, HIDDEN, INNER, HEADS, HEAD_DIM = 32, 4096, 11008, 32, 128
BLOCK, MAX_CONTEXT = 16, 4096
SEVEN = (HEADS, HEADS, HEAD_DIM)
PROJECTIONS = {
    "qkv": (HIDDEN, (0, HIDDEN, 2 * HIDDEN, 3 * HIDDEN)),
    "o": (HIDDEN, (0, HIDDEN)),
    "gate_up": (HIDDEN, (0, INNER, 2 * INNER)),
    "down": (INNER, (0, HIDDEN)),
}
ROUNDED = 2**-7  # one step of bfloat16's last digit
SUMMED = 2**-6

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Check:
    """One line of the table; the reference runs first, so a kernel may work in place."""

    name: str
    kernel: Callable[[int], Tensors]  # takes the number of a set of inputs
    reference: Callable[[], Tensors]  # for set 0
    tolerance: float  # of the largest expected number
    moved: int  # bytes
    sets: int = 1
    rows: int = 0  # of the decode step whose layer has it, 0 for none
    times: int = 1  # in that layer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def check_norm(rows: int) -> Check:
    x, residual, weight = random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN)

    def kernel(_: int) -> Tensors:
        return norm.add_rms_norm(x, residual, weight, 1e-5)

    def reference() -> Tensors:
        return norm.add_rms_norm_reference(x, residual, weight, 1e-5)

    name = f"add_rms_norm T={rows}"
    return Check(name, kernel, reference, ROUNDED, 8 * x.numel(), rows=rows, times=2)


def check_plain_norm(rows: int) -> Check:
    x, weight = random(rows, HIDDEN), random(HIDDEN)

    def kernel(_: int) -> Tensors:
        return [norm.rms_norm(x, weight, 1e-5)]

    def reference() -> Tensors:
        return [norm.rms_norm_reference(x, weight, 1e-5)]

    return Check(f"rms_norm T={rows}", kernel, reference, ROUNDED, 4 * x.numel())


def check_activation(rows: int) -> Check:
    x = random(rows, 2 * INNER)

    def kernel(_: int) -> Tensors:
        return [activation.silu_mul(x)]

    def reference() -> Tensors:
        return [activation.silu_mul_reference(x)]

    return Check(f"silu_mul T={rows}", kernel, reference, ROUNDED, 3 * x.numel(), rows=rows)


def check_rope(rows: int, heads: int, kv_heads: int, dim: int) -> Check:
    cos, sin = torch.randn(2, MAX_CONTEXT, dim, device="cuda")
    cache = random(2, rows + 3, BLOCK, kv_heads, dim)
    slots = torch.randperm(cache.shape[1] * BLOCK, device="cuda")[:rows].int()
    if dim != HEAD_DIM:
        slots[::3] = -1
    positions = torch.randint(MAX_CONTEXT, (rows,), device="cuda", dtype=torch.int32)
    inputs = (random(rows, (heads + 2 * kv_heads) * dim), cos, sin, positions, slots)

    def kernel(_: int) -> Tensors:
        return [rotary.rope_and_cache(*inputs, *cache.unbind()), cache]

    def reference() -> Tensors:
        other = cache.clone()
        return [rotary.rope_and_cache_reference(*inputs, *other.unbind()), other]

    name = f"rope_and_cache T={rows} H={heads} G={kv_heads} D={dim}"
    layer = rows if dim == HEAD_DIM else 0
    return Check(name, kernel, reference, ROUNDED, 4 * inputs[0].numel(), rows=layer)


def check_attention(
    label: str,
    lengths: list[int],
    shape: tuple[int, int, int],
    splits: int | None = None,
    *,
    in_8_bits: bool = False,
) -> Check:
    heads, kv_heads, dim = shape
    moved = 4 * sum(lengths) * kv_heads * dim
    sets = min(24, 1 + 2**28 // moved)
    tables = lay_tables(lengths, sets)
    cache = random(2, int(tables.max()) + 1, BLOCK, kv_heads, dim)
    if in_8_bits:
        cache, moved = narrow(cache, INT8), moved * (dim + SCALE_BYTES) // (2 * dim)
    q = random(len(lengths), heads, dim)
    out = torch.full_like(q, float("nan"))
    contexts = torch.tensor(lengths, device="cuda", dtype=torch.int32)

    def kernel(index: int) -> Tensors:
        attention.paged_decode_attention(
            q, cache[0], cache[1], tables[index], contexts, 0.088, out, splits
        )
        return [out]

    def reference() -> Tensors:
        return [
            attention.paged_decode_attention_reference(
                q, cache[0], cache[1], tables[0], contexts, 0.088
            )
        ]

    # for the sum of a layer: context 256 everywhere
    usual = shape == SEVEN and splits is None and not in_8_bits
    rows = len(lengths) if set(lengths) == {256} and usual else 0
    return Check(f"attention {label}", kernel, reference, SUMMED, moved, sets=sets, rows=rows)


def lay_tables(lengths: list[int], sets: int) -> torch.Tensor:
    """Shuffled blocks for as many sets of contexts, [sets, B, max_blocks]."""
    needed = [-(-length // BLOCK) for length in lengths] * sets
    blocks = torch.randperm(sum(needed)).int()
    tables = torch.full((len(needed), MAX_CONTEXT // BLOCK), -1, dtype=torch.int32)
    for row, (start, stop) in enumerate(pairwise(accumulate(needed, initial=0))):
        tables[row, : stop - start] = blocks[start:stop]
    return tables.view(sets, len(lengths), -1).cuda()


@dataclass(frozen=True)
class Lora:
    """Rows of a step and stacked weights of more adapters than L2 holds; slot 0 is poisoned."""

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    y: torch.Tensor
    scales: torch.Tensor
    slots: list[torch.Tensor]  # by set


def make_lora(inputs: int, columns: Sequence[int], rank: int, rows: int, adapters: int) -> Lora:
    ranks = (len(columns) - 1) * rank
    sets = 1 + 2**27 // (2 * ranks * inputs * adapters)
    a = random(sets * adapters, ranks, inputs) / inputs**0.5
    b = random(sets * adapters, columns[-1], rank) / rank**0.5
    own = torch.arange(rows, device="cuda", dtype=torch.int32) % adapters + 1
    slots = [own + index * adapters for index in range(sets)]
    if rows % 2:
        slots[0][::4] = 0
    scales = torch.rand(rows, device="cuda")
    return Lora(random(rows, inputs), a, b, random(rows, columns[-1]), scales, slots)


def check_shrink(
    name: str, inputs: int, columns: Sequence[int], rank: int, rows: int, adapters: int
) -> Check:
    case = make_lora(inputs, columns, rank, rows, adapters)

    def kernel(index: int) -> Tensors:
        return [lora.lora_shrink(case.x, case.a, case.slots[index])]

    def reference() -> Tensors:
        return [lora.lora_shrink_reference(case.x, case.a, case.slots[0])]

    name = f"lora_shrink {name} r={rank} T={rows}, {adapters} adapters"
    moved = case.a[0].nbytes * min(adapters, rows) + case.x.nbytes
    layer = rows if adapters == 1 else 0
    return Check(name, kernel, reference, 1e-4, moved, sets=len(case.slots), rows=layer)


def check_expand(
    name: str, inputs: int, columns: Sequence[int], rank: int, rows: int, adapters: int
) -> Check:
    case = make_lora(inputs, columns, rank, rows, adapters)
    sums = lora.lora_shrink(case.x, case.a, case.slots[0])

    def kernel(index: int) -> Tensors:
        slots = case.slots[index]
        lora.lora_expand_add(sums, case.b, slots, case.scales, case.y, columns)
        return [case.y]

    def reference() -> Tensors:
        y = case.y.clone()
        lora.lora_expand_add_reference(sums, case.b, case.slots[0], case.scales, y, columns)
        return [y]

    name = f"lora_expand_add {name} r={rank} T={rows}, {adapters} adapters"
    moved = case.b[0].nbytes * min(adapters, rows) + 2 * case.y.nbytes
    layer = rows if adapters == 1 else 0
    return Check(name, kernel, reference, ROUNDED, moved, sets=len(case.slots), rows=layer)


def check_segments(rows: int, rank: int) -> Check:
    inputs, columns = PROJECTIONS["qkv"]
    case = make_lora(inputs, columns, rank, rows, 2)
    half = rows // 2
    segments = [
        lora_segments.LoraSegment(0, half, 1, 0.5),
        lora_segments.LoraSegment(half, rows, 2, 2.0),
    ]

    def kernel(_: int) -> Tensors:
        lora_segments.lora_add_segments(case.x, case.a, case.b, segments, case.y, columns)
        return [case.y]

    def reference() -> Tensors:
        y = case.y.double()
        for start, stop, slot, scale in segments:
            shrunk = lora.by_parts(case.x[start:stop].double() @ case.a[slot - 1].double().T, 3)
            for part, (first, last) in enumerate(pairwise(columns)):
                own = case.b[slot - 1, first:last].double()
                y[start:stop, first:last] += scale * shrunk[:, part] @ own.T
        return [y]

    moved = case.x.nbytes + 2 * case.y.nbytes
    return Check(f"lora_add_segments qkv r={rank} T={rows}", kernel, reference, SUMMED, moved)


def list_checks() -> Iterator[partial[Check]]:
    for rows in (1, 8, 64, 2048):
        yield partial(check_norm, rows)
        yield partial(check_activation, rows)
        yield partial(check_rope, rows, *SEVEN)
    yield partial(check_plain_norm, 5)
    yield partial(check_rope, 9, 9, 3, 64)
    yield partial(check_rope, 9, 8, 2, 80)
    for rows, length in (
        (1, 256),
        (8, 256),
        (64, 256),
        (1, 1024),
        (1, 4096),
        (8, 1024),
        (32, 1024),
    ):
        yield partial(check_attention, f"B={rows} context {length}", [length] * rows, SEVEN)
    mixed = [4096] + [256] * 31
    yield partial(check_attention, "B=32 context 256, one 4096", mixed, SEVEN)
    yield partial(check_attention, "B=8 context 1024 G=8", [1024] * 8, (32, 8, 128))
    ragged = [1, 0, 15, 16, 17, 500, 33, 2000]
    yield partial(check_attention, "ragged H=9 G=3 D=64", ragged, (9, 3, 64))
    narrow = partial(check_attention, in_8_bits=True)
    yield partial(narrow, "B=8 context 1024, 8 bits", [1024] * 8, SEVEN)
    yield partial(narrow, "ragged H=9 G=3 D=64, 8 bits", ragged, (9, 3, 64))
    yield partial(check_attention, "ragged H=8 G=2 D=80", ragged, (8, 2, 80))
    for check in (check_shrink, check_expand):
        for rows in (1, 8, 64):
            for name, (inputs, columns) in PROJECTIONS.items():
                yield partial(check, name, inputs, columns, 16, rows, 1)
        yield partial(check, "qkv", *PROJECTIONS["qkv"], 16, 64, 4)
        yield partial(check, "qkv", *PROJECTIONS["qkv"], 64, 8, 4)
        yield partial(check, "ragged", 700, (0, 90, 120, 150), 24, 19, 5)
    yield partial(check_segments, 2048, 16)
    # is the launcher's own choice of splits a good one?
    for rows, length, counts in ((1, 1024, (8, 32)), (8, 1024, (1, 2, 8)), (64, 256, (1, 2))):
        for splits in counts:
            label = f"B={rows} context {length}, {splits} splits"
            yield partial(check_attention, label, [length] * rows, SEVEN, splits)


def time_in_graph(call: Callable[[int], object], sets: int, calls: int) -> float:
    """Microseconds of one call: a graph of several, over the sets in turn; median of replays."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        call(0)
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for index in range(calls):
            call(index % sets)
    times: list[float] = []
    for _ in range(14):
        start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times[4:])


def measure_copy() -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_in_graph(lambda _: target.copy_(source), 1, calls=2) / 1e3


def find_error(check: Check) -> float:
    """The largest difference, as a part of the largest expected number; NaN is infinite."""
    expected = [tensor.double() for tensor in check.reference()]
    worst = 0.0
    for actual, right in zip(check.kernel(0), expected, strict=True):
        # partial sums of a shrink
        # a shrink's splits add up to the reference's only one
        whole = actual.double().sum_to_size(right.shape)
        difference = (whole - right).abs().nan_to_num(nan=float("inf"))
        worst = max(worst, float(difference.max() / right.abs().max().clamp(min=1e-6)))
    return worst


def run(make: partial[Check], copy: float, layers: dict[int, float]) -> bool:
    """Prints one line and adds its time to its layer; whether the kernel is right."""
    check = make()
    error = find_error(check)
    right = error <= check.tolerance
    took = time_in_graph(check.kernel, check.sets, calls=max(24, check.sets))
    speed = check.moved / took / 1e3
    share = 100 * speed / copy
    verdict = f"{'ok' if right else 'DIFFERS':8} error {error:.1e}"
    print(f"{check.name:48} {verdict} {took:8.2f} us {speed:6.0f} GB/s {share:3.0f} %", flush=True)
    layers[check.rows] += check.times * took
    return right


def run_all(copy: float, layers: dict[int, float]) -> int:
    """How many checks failed; one that breaks says why and stops no other."""
    begun, failed, left = time.monotonic(), 0, 0
    for make in list_checks():
        if time.monotonic() - begun > SECONDS:
            left += 1
            continue
        try:
            failed += not run(make, copy, layers)
        except Exception as error:
            print(f"{make.func.__name__}{make.args} BROKE: {error!r}", flush=True)
            traceback.print_exc(limit=-2, file=sys.stdout)
            failed += 1
    if left:
        print(f"{left} checks not run: {SECONDS} s are over")
    return failed


def main() -> int:
    if not cuda.is_available() or not runs_triton(torch.empty(0, device="cuda")):
        print("this needs triton and a CUDA card from Ampere on")
        return 2
    torch.manual_seed(0)
    copy = measure_copy()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{cuda.get_device_name()}, {versions}, copy {copy:.0f} GB/s")
    layers: dict[int, float] = defaultdict(float)
    failed = run_all(copy, layers)
    for rows in (1, 8, 64):
        total = LAYERS * layers[rows] / 1e3
        print(f"{LAYERS} layers of these at B={rows}, context 256, r=16: {total:.2f} ms")
    print(f"{failed} failed" if failed else "all right")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
