"""The NF4 product beside bitsandbytes' on one CUDA card, by shape and rows, in % of a copy's speed.

    PYTHONPATH=src python bench/kernels.py

Random weights quantized by bitsandbytes with double quantization; each result is compared with
float64 first. Times are medians inside a CUDA graph over weights that exceed the L2. On Hopper
both of our kernels are measured, mma as on cards before it. Writes bench/results/kernels.json.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

from as_ampere import as_ampere
from qlorachat.kernels import nf4
from qlorachat.kernels.decode_lora import Expanding
from qlorachat.kernels.device import is_hopper
from qlorachat.kernels.nf4_matmul import nf4_matmul, nf4_matmul_tiled
from qlorachat.kernels.nf4_write_out import (
    MOST_RANKS,
    LoraMatrices,
    nf4_write_out,
    nf4_write_out_reference,
)
from qlorachat.kernels.tiles import rows_padded, tile

cuda: Any = torch.cuda
RESULTS = Path(__file__).parent / "results" / "kernels.json"
SHAPES = {
    "7B o": ((4096,), 4096),
    "7B qkv": ((4096, 4096, 4096), 4096),
    "7B gate_up": ((11008, 11008), 4096),
    "7B down": ((4096,), 11008),
    "13B o": ((5120,), 5120),
    "13B gate_up": ((13824, 13824), 5120),
    "13B down": ((5120,), 13824),
    "smollm2 qkv": ((576, 192, 192), 576),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
ROTATED = 420e6  # bytes of weights that a measurement walks through; an H100's L2 holds 50e6
ROUNDING = 2**-9  # of bfloat16, relative, at most; codes and results are rounded once
SPLIT = 2**-15  # of an A x in two halves, relative
SUMMED = 1e-5  # of float32 sums, of the sum of sizes
EXTREME = 200.0  # times a usual absmax

Quantized = list[tuple[torch.Tensor, QuantState]]


def quantized(heights: tuple[int, ...], columns: int) -> Quantized:
    parts = []
    for height in heights:
        values = torch.randn(height, columns, device="cuda") * 0.02
        values[0] *= EXTREME
        parts.append(quantize_4bit(values.bfloat16(), quant_type="nf4", compress_statistics=True))
    return parts


def fused_state(parts: Quantized, weight: nf4.Nf4Matrix) -> QuantState:
    """What one bitsandbytes call takes for all parts: absmax in float32."""
    state = parts[0][1]
    scales = nf4.absmax(weight)
    return QuantState(
        absmax=scales, shape=torch.Size((weight.rows, weight.columns)), code=state.code,
        blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
    )  # fmt: skip


def excess(
    actual: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, added: torch.Tensor | float = 0.0
) -> float:
    """The largest error over what one rounding of codes and one of results allow.

    added: by adapters, to x exact^T.
    """
    x = x.double()
    expected = x @ exact.T + added
    allowed = ROUNDING * (expected.abs() + x.abs() @ exact.abs().T)
    assert bool(actual.isfinite().all())
    return float(((actual.double() - expected).abs() / allowed).max())


def graph_time(call: Callable[[int], object], sets: int) -> float:
    """Microseconds of one call, the median of 12 replays over all sets."""
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        call(0)
    cuda.current_stream().wait_stream(stream)
    graph, times = cuda.CUDAGraph(), []
    calls = max(sets, 20)
    with cuda.graph(graph):
        for index in range(calls):
            call(index % sets)
    graph.replay()
    for _ in range(12):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a device copy of 4 GiB, bytes read and written."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(12):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        cuda.synchronize()
        times.append(float(start.elapsed_time(end)))
    return 2 * 2**32 / statistics.median(times) / 1e6


def measure(name: str, copy: float) -> list[dict[str, Any]]:
    heights, columns = SHAPES[name]
    own = quantized(heights, columns)
    weight = nf4.stack(own, torch.bfloat16)
    moved = weight.packed.numel() + weight.absmax.numel() + 4 * weight.absmax2.numel()
    state, exact = fused_state(own, weight), nf4.nf4_dequantize(weight).double()
    written = nf4_write_out(weight)
    decoded = [dequantize_4bit(packed, own_state) for packed, own_state in own]
    assert torch.equal(written, torch.cat(decoded)), name
    for ranks in range(16, MOST_RANKS + 1, 16):
        assert written_excess(weight, ranks) <= 1, (name, ranks)
    sets = max(1, int(ROTATED / moved))
    weights = [
        replace(
            weight,
            packed=weight.packed.clone(),
            absmax=weight.absmax.clone(),
            absmax2=weight.absmax2.clone(),
        )
        for _ in range(sets)
    ]
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, columns, device="cuda").bfloat16()
        error = excess(nf4_matmul(x, weight), x, exact)
        assert error < 1.0, f"{name}, {rows} rows: {error}"

        def theirs(index: int, x: torch.Tensor = x) -> torch.Tensor:
            out: torch.Tensor = matmul_4bit(x, weights[index].packed, state)
            return out

        line: dict[str, Any] = {"shape": name, "rows": rows}
        if is_hopper(x.device):
            line |= measure_ours("wgmma", x, weights, exact, copy)
        with as_ampere(is_hopper(x.device)):
            line |= measure_ours("mma", x, weights, exact, copy)
        time = graph_time(theirs, sets)
        line["bitsandbytes, us"] = round(time, 2)
        line["bitsandbytes, % of copy"] = round(100 * moved / time / 1e3 / copy, 1)
        lines.append(line)
        print(line, flush=True)
    return lines


def written_excess(weight: nf4.Nf4Matrix, ranks: int) -> float:
    """Of a weight written out with an adapter in it: its largest error, by one rounding."""
    a = torch.randn(len(weight.heights) * ranks, weight.columns, device="cuda").bfloat16()
    b = torch.randn(weight.rows, ranks, device="cuda").bfloat16()
    lora, sizes = LoraMatrices(a, b, ranks, 0.01), LoraMatrices(a.abs(), b.abs(), ranks, 0.01)
    plain, exact, most = (nf4_write_out_reference(weight, own) for own in (None, lora, sizes))
    allowed = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
    allowed += SUMMED * (plain.abs() + (most - plain).abs())
    return float(((nf4_write_out(weight, lora).float() - exact).abs() / allowed).max())


def random_adapters(weight: nf4.Nf4Matrix, rows: int, slots: int) -> Expanding:
    """Of rank 16; with one slot all rows have it, with more some have none."""
    own = torch.arange(1, rows + 1, dtype=torch.int32, device="cuda") % (slots + 1)
    own = torch.ones_like(own) if slots == 1 else own
    shrunk = torch.randn(rows, 16 * len(weight.heights), device="cuda")
    shrunk[own == 0] = float("nan")  # not looked at
    b = torch.randn(slots, weight.rows, 16, device="cuda").bfloat16()
    b[~torch.isin(torch.arange(1, slots + 1, device="cuda"), own)] = float("nan")
    return Expanding(shrunk, b, own, 2 * torch.rand(rows, device="cuda"))


def expanded(expanding: Expanding, heights: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """scale * B (A x) and scale * |B| |A x| in float64."""
    shrunk, b, slots, scales = expanding[:4]
    every = shrunk.double().view(len(slots), len(heights), -1)
    added = torch.zeros(2, len(slots), b.shape[1], dtype=torch.float64, device="cuda")
    for row, slot in enumerate(slots.tolist()):
        if slot:
            own = b[slot - 1].double().split_with_sizes(heights)
            pairs = zip(own, every[row], strict=True)
            parts = [torch.stack((part @ x, part.abs() @ x.abs())) for part, x in pairs]
            added[:, row] = scales[row].double() * torch.cat(parts, 1)
    return added[0], added[1]


def measure_ours(
    kernel: str,
    x: torch.Tensor,
    weights: Sequence[nf4.Nf4Matrix],
    exact: torch.Tensor,
    copy: float,
) -> dict[str, Any]:
    """The kernel at hand, alone and with an adapter of rank 16 in its launch."""
    weight, rows, padded = weights[0], len(x), rows_padded(len(x))
    tiled, sums = tile(x, padded), torch.zeros(2, rows, weight.rows, device="cuda")
    several = random_adapters(weight, rows, slots=3)
    tiled[:, rows:] = float("nan")  # padding is not looked at
    for own_sums, adapters in zip(sums, (None, several), strict=True):
        nf4_matmul_tiled(tiled, weight, own_sums, adapters)
    tiled[:, rows:] = 0
    added, sizes = expanded(several, weight.heights)
    error = max(excess(sums[0], x, exact), excess(sums[1], x, exact, added))
    assert error < 1.0, f"{kernel}, {rows} rows: {error}"
    # both products round the same codes: what B added is known better
    allowed = SUMMED * (x.double().abs() @ exact.abs().T) + (SPLIT + SUMMED) * sizes
    beside = float(((sums[1].double() - sums[0].double() - added).abs() / allowed).max())
    assert beside < 1.0, f"{kernel} with adapters, {rows} rows: {beside}"
    sums = sums[0]
    adapter = random_adapters(weight, rows, slots=1)
    moved = weight.packed.numel() + weight.absmax.numel() + 4 * weight.absmax2.numel()
    line: dict[str, Any] = {f"{kernel}, error / bound": round(error, 3)}
    for name, own in {kernel: None, f"{kernel} with B": adapter}.items():

        def launch(index: int, own: Expanding | None = own) -> None:
            nf4_matmul_tiled(tiled, weights[index], sums, own)

        time = graph_time(launch, len(weights))
        line |= {f"{name}, us": round(time, 2)}
        line |= {f"{name}, % of copy": round(100 * moved / time / 1e3 / copy, 1)}
    return line


def main() -> None:
    copy = copy_bandwidth()
    names = ("torch", "bitsandbytes", "cuda-bindings")
    record: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in names},
        "copy GB/s": round(copy),
    }
    print(record, flush=True)
    record["lines"] = [line for name in SHAPES for line in measure(name, copy)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
