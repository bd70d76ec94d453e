"""Measures on the card at hand how many blocks are best for each product of a model."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlorachat.errors import ConfigError
from qlorachat.kernels import nf4, tuned
from qlorachat.kernels.card import why_not_products
from qlorachat.kernels.decode_lora import Expanding
from qlorachat.kernels.device import count_processors
from qlorachat.kernels.nf4_matmul import nf4_matmul_tiled
from qlorachat.kernels.tiles import rows_padded, tile
from qlorachat.model.lora import GROUPS

cuda: Any = torch.cuda
ROWS = (1, 16, 32, 64)  # each stands for all that are padded like it
WAVES = (0.75, 0.9, 0.97, 1.0, 1.5, 1.94, 2.0, 3.0)  # blocks for each processor
ROTATED = 8  # times the L2: weights that a measurement walks through
GAIN = 0.99  # of the time that is kept before; less is noise


@dataclass(frozen=True, slots=True)
class Tuned:
    """One product: microseconds as it was launched before, and with the blocks that were best."""

    rows: int
    shape: tuple[int, int]
    before: float
    after: float
    blocks: int | None  # None: those before


def tune(shapes: Mapping[str, tuple[int, int]], device: torch.device) -> Iterator[Tuned]:
    """Each product of a model with modules of these shapes, kept as soon as it is measured.

    Raises ConfigError where the card or the shapes are none for our products, and where nothing
    can be kept.
    """
    if reason := why_not_products(device):
        raise ConfigError(f"There is nothing to tune on {device}: {reason}.")
    return _tune(_products(shapes), device)


def _tune(products: Sequence[tuple[tuple[int, ...], int]], device: torch.device) -> Iterator[Tuned]:
    with torch.inference_mode(), torch.cuda.device(device):
        for heights, columns in products:
            weights = _random_weights(heights, columns, device)
            for rows in ROWS:
                launch = _with_adapter(weights[0], rows)
                yield _keep(_measure(launch, weights, rows), device)


def _keep(best: Tuned, device: torch.device) -> Tuned:
    if best.blocks is not None:
        key = rows_padded(best.rows), best.shape
        try:
            tuned.keep({key: best.blocks}, device)
        except OSError as error:
            raise ConfigError(f"What was measured can't be kept: {error}.") from error
    return best


def _products(shapes: Mapping[str, tuple[int, int]]) -> list[tuple[tuple[int, ...], int]]:
    """Heights of the parts and columns of the fused projections of the first layer."""
    products = []
    for modules in GROUPS.values():
        parts = [shapes.get(f"model.layers.0.{module}") for module in modules]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise ConfigError("There is nothing to tune: the model is not of the Llama family.")
        if any(height % 16 or columns % 64 for height, columns in known):
            raise ConfigError(f"There is nothing to tune: our products take no weights of {known}.")
        products.append((tuple(height for height, _ in known), known[0][1]))
    return products


def _random_weights(
    heights: tuple[int, ...], columns: int, device: torch.device
) -> list[nf4.Nf4Matrix]:
    """As many as exceed the L2 by far: time depends on where the bytes are, not on their values."""
    elements = sum(heights) * columns
    properties: Any = torch.cuda.get_device_properties(device)
    count = max(2, ROTATED * properties.L2_cache_size // (elements // 2))
    generator = torch.Generator(device)
    return [nf4.random_matrix(heights, columns, generator) for _ in range(count)]


def _measure(launch: "Launch", weights: Sequence[nf4.Nf4Matrix], rows: int) -> Tuned:
    device, shape = weights[0].packed.device, (weights[0].rows, weights[0].columns)
    before = _time(launch, weights, None)
    counts = sorted({round(waves * count_processors(device)) for waves in WAVES})
    times = {blocks: _time(launch, weights, blocks) for blocks in counts}
    blocks = min(times, key=lambda each: times[each])
    if times[blocks] > GAIN * before:
        return Tuned(rows, shape, before, before, None)
    return Tuned(rows, shape, before, times[blocks], blocks)


Launch = Callable[[nf4.Nf4Matrix, int | None], None]


def _with_adapter(weight: nf4.Nf4Matrix, rows: int) -> Launch:
    """With an adapter of rank 16 beside the weight."""
    ranks, device = 16 * len(weight.heights), weight.packed.device
    plain = torch.randn(rows, weight.columns, device=device, dtype=weight.pairs.dtype)
    x = tile(plain, rows_padded(rows))
    sums = torch.zeros(rows, weight.rows, device=device)
    adapter = Expanding(
        shrunk=torch.zeros(rows, ranks, device=x.device),
        b=torch.randn(1, weight.rows, 16, device=x.device, dtype=x.dtype),
        slots=torch.ones(rows, dtype=torch.int32, device=x.device),
        scales=torch.ones(rows, device=x.device),
    )

    def launch(weight: nf4.Nf4Matrix, blocks: int | None) -> None:
        nf4_matmul_tiled(x, weight, sums, adapter, blocks=blocks)

    return launch


def _time(launch: Launch, weights: Sequence[nf4.Nf4Matrix], blocks: int | None) -> float:
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
