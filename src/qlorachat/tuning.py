"""Measures on the card at hand how many blocks are best for each product of a model."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlorachat.errors import ConfigError
from qlorachat.kernels import nf4, tuned
from qlorachat.kernels.device import count_processors
from qlorachat.kernels.nf4_matmul import nf4_matmul
from qlorachat.kernels.nf4_tiled import Shrinking, nf4_matmul_tiled, runs_tiled
from qlorachat.kernels.tiles import rows_padded, tile

cuda: Any = torch.cuda
ROWS = (1, 16, 32)  # each stands for all that are padded like it
MOST_ROWS = 64  # where they are padded so: on Hopper
WAVES = (0.75, 0.9, 0.97, 1.0, 1.5, 1.94, 2.0, 3.0)  # blocks for each processor
ROTATED = 8  # times the L2: weights that a measurement walks through
GAIN = 0.99  # of the time that is kept before; less is noise
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, slots=True)
class Tuned:
    """One product: microseconds as it was launched before, and with the blocks that were best."""

    kernel: str
    rows: int
    shape: tuple[int, int]
    before: float
    after: float
    blocks: int | None  # None: those before


def tune(
    shapes: Mapping[str, tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> Iterator[Tuned]:
    """Each product of a model with modules of these shapes as it is measured; then all are kept.

    Raises ConfigError where the card does not run our products.
    """
    if reason := nf4.why_not(device):
        raise ConfigError(f"There is nothing to tune on {device}: {reason}.")
    measured = {}
    with torch.inference_mode(), torch.cuda.device(device):
        for heights, columns in _products(shapes):
            weights = _random_weights(heights, columns, device)
            for rows in (*ROWS, MOST_ROWS) if _is_tiled(device, dtype) else ROWS:
                best = _measure(weights, rows, device, dtype)
                if best.blocks is not None:
                    measured[best.kernel, rows_padded(rows), best.shape] = best.blocks
                yield best
    tuned.keep(measured, device)


def _products(shapes: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, ...], int]]:
    """Heights of the parts and columns of the fused projections of the first layer."""
    first = {
        name.rpartition(".")[2]: shape for name, shape in shapes.items() if ".layers.0." in name
    }
    if not all(name in first for names in FUSED for name in names):
        raise ConfigError("There is nothing to tune: the model is not of the Llama family.")
    return [(tuple(first[name][0] for name in names), first[names[0]][1]) for names in FUSED]


def _random_weights(
    heights: tuple[int, ...], columns: int, device: torch.device
) -> list[nf4.Nf4Matrix]:
    """As many as exceed the L2 by far: time depends on where the bytes are, not on their values."""
    elements = sum(heights) * columns
    properties: Any = torch.cuda.get_device_properties(device)
    count = max(2, ROTATED * properties.L2_cache_size // (elements // 2))
    groups = sum(-(-height * columns // 64 // 256) for height in heights)
    spread = torch.linspace(-1, 1, 256, device=device)
    code = spread[::17].contiguous()

    def random_bytes(size: int) -> torch.Tensor:
        return torch.randint(256, (size,), dtype=torch.uint8, device=device)

    return [
        nf4.Nf4Matrix(
            packed=random_bytes(elements // 2),
            absmax=random_bytes(elements // 64),
            absmax2=torch.rand(groups, device=device),
            code=code,
            code2=spread,
            heights=heights,
            offsets=(0.0,) * len(heights),
            columns=columns,
        )
        for _ in range(count)
    ]


def _is_tiled(device: torch.device, dtype: torch.dtype) -> bool:
    return runs_tiled(device) and dtype == torch.bfloat16


def _measure(
    weights: list[nf4.Nf4Matrix], rows: int, device: torch.device, dtype: torch.dtype
) -> Tuned:
    first = weights[0]
    shape, padded = (first.rows, first.columns), rows_padded(rows)
    x = torch.randn(rows, first.columns, device=device, dtype=dtype)
    kernel, launch = "nf4_matmul", _plain(x)
    if _is_tiled(device, dtype):
        kernel, launch = "nf4_matmul_tiled", _tiled(tile(x, padded), rows, first)
    before = _time(launch, weights, None)
    counts = sorted({round(waves * count_processors(device)) for waves in WAVES})
    times = {blocks: _time(launch, weights, blocks) for blocks in counts}
    blocks = min(times, key=lambda each: times[each])
    if times[blocks] > GAIN * before:
        return Tuned(kernel, rows, shape, before, before, None)
    return Tuned(kernel, rows, shape, before, times[blocks], blocks)


Launch = Callable[[nf4.Nf4Matrix, int | None], None]


def _plain(x: torch.Tensor) -> Launch:
    def launch(weight: nf4.Nf4Matrix, blocks: int | None) -> None:
        nf4_matmul(x, weight, blocks=blocks)

    return launch


def _tiled(x: torch.Tensor, rows: int, weight: nf4.Nf4Matrix) -> Launch:
    """With an adapter of rank 16 beside the weight."""
    ranks, padded = 16 * len(weight.heights), x.shape[1]
    sums = torch.zeros(weight.rows, padded, device=x.device)
    adapter = Shrinking(
        a=torch.randn(1, ranks, weight.columns, device=x.device, dtype=x.dtype),
        slots=torch.ones(rows, dtype=torch.int32, device=x.device),
        shrunk=torch.zeros(ranks, padded, device=x.device),
    )

    def launch(weight: nf4.Nf4Matrix, blocks: int | None) -> None:
        nf4_matmul_tiled(x, rows, weight, sums, adapter, blocks=blocks)

    return launch


def _time(launch: Launch, weights: list[nf4.Nf4Matrix], blocks: int | None) -> float:
    """Microseconds of one launch: the median of replays of a graph over all weights."""
    launch(weights[0], blocks)
    cuda.synchronize()
    graph, times = cuda.CUDAGraph(), []
    with cuda.graph(graph):
        for weight in weights:
            launch(weight, blocks)
    graph.replay()
    for _ in range(9):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        times.append(float(start.elapsed_time(end)) * 1e3 / len(weights))
    return statistics.median(times)
