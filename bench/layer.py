"""What a layer of a decode step takes on one CUDA card, without scheduling and sampling.

    python bench/layer.py [--rows 1 8 32 64] [--ranks 16 64] [--context 256] [--kv-cache int8]

A quick look before and after a change to a kernel: eight layers of the Llama-2-7B shape with
random NF4 weights, without adapter, with one of each rank, with one of rank 16 where there is room
for 64, and with eight of rank 16. Each is captured several times, with its adapters and all that
kernels hand on elsewhere in memory; all are timed in turn, several times over, for a card drifts by
a percent within a minute. Shown are medians, and of these the mean over places. Writes
bench/results/layer.json, with every place's, named further for another size and with keys and
values in 8 bits.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import fmean, median
from typing import Any

import torch

from decode import RESULTS, copy_bandwidth, machine
from qlorachat.kernels.eight_bits import INT8, narrow
from qlorachat.model import DecodeRows, KVCache, PagedLlama, Rows
from qlorachat.model.fused_decode import FusedDecode
from qlorachat.model.lora import AdapterStacks, LoraRows
from random_model import HEAD_DIM, SHAPES, build, opened

LAYERS, BLOCK, MOST_ROWS = 8, 16, 64
PLACES = 3  # in memory
STEPS, REPLAYS, ROUNDS = 4, 12, 5  # in a graph, of it between two events, of all that is compared

Graph = tuple[torch.cuda.CUDAGraph, Rows]  # and what it reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="7b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--kv-cache", choices=["auto", "int8"], default="auto")
    arguments = parser.parse_args()
    trial = Trial(arguments.size, arguments.context, arguments.kv_cache)
    taken: dict[str, dict[str, list[float]]] = {}
    for rows in arguments.rows:
        taken[f"{rows} rows"] = own = trial.run(rows, arguments.ranks)
        print(f"{rows} rows:", ", ".join(f"{name} {fmean(of):.1f}" for name, of in own.items()))
    record = {"machine": machine(), "copy GB/s": round(copy_bandwidth())}
    record |= {name: getattr(arguments, name) for name in ("size", "ranks", "context", "kv_cache")}
    record["microseconds a layer"] = taken
    file = "layer" if arguments.size == "7b" else f"layer_{arguments.size}"
    file += "" if arguments.kv_cache == "auto" else f"_{arguments.kv_cache}"
    (RESULTS / f"{file}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class Trial:
    """A model of a few layers, and graphs of its fused steps; all rows have one context."""

    def __init__(self, size: str, context: int, kv_cache: str) -> None:
        SHAPES["layers"] = {**SHAPES[size], "num_hidden_layers": LAYERS}
        HEAD_DIM["layers"] = HEAD_DIM[size]
        model = build("layers", "cuda")
        self.context = context
        self.stacks = AdapterStacks(
            LAYERS, opened(model, "layers").info.shapes, dtype=model.dtype, device=model.device
        )
        self.paged = PagedLlama(model, self.stacks)
        self.blocks = -(-context // BLOCK)  # of a row
        self.cache = KVCache(
            layers=LAYERS,
            blocks=MOST_ROWS * self.blocks,
            block_size=BLOCK,
            kv_heads=model.config.num_key_value_heads,
            head_dim=self.paged.head_dim,
            dtype=INT8 if kv_cache == "int8" else model.dtype,
            device=model.device,
        )
        for cached in (*self.cache.keys, *self.cache.values):  # of one layer
            shape = (*cached.shape[:-1], self.paged.head_dim)
            values = torch.randn(shape, dtype=model.dtype, device=model.device)
            cached.copy_(narrow(values, cached.dtype))

    @property
    def fused(self) -> FusedDecode:
        assert self.paged._fused is not None
        return self.paged._fused

    def run(self, rows: int, ranks: list[int]) -> dict[str, list[float]]:
        """Microseconds a layer in each place, by what is compared."""
        kinds = {"base": (0, 0, 0)} | {f"rank {rank}": (1, rank, rank) for rank in ranks}
        kinds["rank 16 of 64"] = (1, 64, 16)
        if rows >= 8:
            kinds["eight of rank 16"] = (8, 16, 16)
        graphs: dict[str, list[Graph]] = {name: [] for name in kinds}
        kept = []  # what graphs have the addresses of
        for (name, (slots, room, rank)), _ in product(kinds.items(), range(PLACES)):
            kept.append((self.fused._workspaces, [self.matrices(layer) for layer in range(LAYERS)]))
            self.fused._workspaces = {}
            if slots:
                self.allocate(slots, room)
            graphs[name].append(self.capture(self.make_rows(rows, slots, rank)))
        return measure(graphs)

    def matrices(self, layer: int) -> list[torch.Tensor]:
        return [each for own in self.stacks.layer(layer).projections for each in (own.a, own.b)]

    def allocate(self, slots: int, rank: int) -> None:
        self.stacks.allocate(slots, rank)
        for layer in range(LAYERS):
            for matrix in self.matrices(layer):
                matrix.normal_(std=0.01)

    def make_rows(self, count: int, slots: int, ranks: int) -> Rows:
        """Neighbours share one of `slots` adapters of so many ranks; 0: none has any."""
        device = self.paged.device
        whole = torch.arange(count, dtype=torch.int32, device=device)
        tables = torch.arange(count * self.blocks, dtype=torch.int32, device=device)
        tables = tables.view(count, self.blocks)
        last = self.context - 1
        lora = LoraRows(False)
        if slots:
            own = (whole * slots // count + 1).int()
            scales = torch.ones(count, device=device)
            lora = LoraRows(True, slots=own, scales=scales, one=slots == 1, ranks=ranks)
        return Rows(
            ids=whole.long() + 5,
            positions=torch.full_like(whole, last),
            slots=tables[:, last // BLOCK] * BLOCK + last % BLOCK,
            attention=DecodeRows(tables, torch.full_like(whole, self.context)),
            lora=lora,
        )

    def capture(self, rows: Rows) -> Graph:
        for _ in range(2):
            self.fused(rows, self.cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(STEPS):
                self.fused(rows, self.cache)
        return graph, rows


def measure(graphs: Mapping[str, Sequence[Graph]]) -> dict[str, list[float]]:
    """Of each, the median of rounds."""
    times: dict[str, list[list[float]]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, places in graphs.items():
            times[name].append([time(graph) for graph, _ in places])
    return {
        name: [round(median(place), 2) for place in zip(*rounds, strict=True)]
        for name, rounds in times.items()
    }


def time(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds a layer."""
    graph.replay()
    events: Any = torch.cuda.Event
    start, end = (events(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / (REPLAYS * STEPS * LAYERS)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
