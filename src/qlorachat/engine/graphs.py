"""Decode steps as CUDA graphs, one for each batch size and reach, captured when first needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from qlorachat.engine.batch import ScheduledRow
from qlorachat.model import DecodeRows, KVCache, PagedLlama, Rows
from qlorachat.model.lora import LoraRows

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
LEAST_WIDTH = 32  # blocks; wider tables come in powers of two
COLUMNS = 6  # of a row: row, position, slot in the cache, context length, adapter slot, scale


class _Shape(NamedTuple):
    """What a graph is captured for."""

    size: int  # rows
    width: int  # blocks of a block table: how far attention may reach decides how it is split
    adapters: int  # that rows have: 0, 1 or, for more, 2
    ranks: int  # the most that one of these has


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # (size, vocabulary), written by each replay
    greedy: torch.Tensor  # int64 (size,), their likeliest tokens


class DecodeGraphs:
    """Replays the decode step; a batch is padded to the next size with rows that write nothing."""

    def __init__(
        self, model: PagedLlama, cache: KVCache, last: torch.Tensor, blocks_per_sequence: int
    ) -> None:
        """`last` int64 (rows + 1,): the token that each row sampled last; its end is padding's."""
        self._model, self._cache, self._last = model, cache, last
        self._blocks = blocks_per_sequence
        length = SIZES[-1] * (COLUMNS + blocks_per_sequence)
        self._inputs = torch.zeros(length, dtype=torch.int32, device=model.device)
        self._graphs: dict[_Shape, _Graph] = {}
        self._pool: Any = None  # memory that all graphs share

    def clear(self) -> None:
        """The adapters moved: what was captured points to where they were."""
        self._graphs.clear()
        self._pool = None  # it went with its last graph

    def run(self, rows: Sequence[ScheduledRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (rows, vocabulary) of one decode step and the likeliest token of each row, which
        is the row's last token from now on; the next run overwrites both."""
        shape = self._shape(rows)
        self._write(rows, shape)
        graph = self._graphs.get(shape) or self._capture(shape)
        graph.graph.replay()
        return graph.logits[: len(rows)], graph.greedy[: len(rows)]

    def _shape(self, rows: Sequence[ScheduledRow]) -> _Shape:
        longest = max(len(row.block_table) for row in rows)
        slots = {row.slot for row in rows if row.slot}
        return _Shape(
            size=next(size for size in SIZES if size >= len(rows)),
            width=min(max(LEAST_WIDTH, 1 << (longest - 1).bit_length()), self._blocks),
            adapters=min(2, len(slots)),
            ranks=self._model.adapters.most_ranks(slots),
        )

    def _write(self, rows: Sequence[ScheduledRow], shape: _Shape) -> None:
        """One copy to the device for all inputs of a step: columns first, then block tables."""
        size = shape.size
        length = size * (COLUMNS + shape.width)
        host = torch.zeros(length, dtype=torch.int32, pin_memory=True)
        values = host.numpy()
        columns = values[: COLUMNS * size].reshape(COLUMNS, size)
        columns[:4, len(rows) :] = [[len(self._last) - 1], [0], [-1], [0]]
        columns[:5, : len(rows)] = np.array([_integers(row, self._cache) for row in rows]).T
        scales = np.array([row.request.adapter_scale for row in rows], dtype=np.float32)
        columns[5, : len(rows)] = scales.view(np.int32)
        tables = values[COLUMNS * size :].reshape(size, shape.width)
        for table, row in zip(tables, rows, strict=False):
            table[: len(row.block_table)] = row.block_table
        self._inputs[:length].copy_(host, non_blocking=True)

    def _capture(self, shape: _Shape) -> _Graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(shape)  # kernels compile and caches fill outside; no token may move on here
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(shape)
            greedy = logits.argmax(-1)
            self._last[self._columns(shape)[0]] = greedy
        self._pool = self._pool or graph.pool()
        captured = self._graphs[shape] = _Graph(graph, logits, greedy)
        return captured

    def _columns(self, shape: _Shape) -> torch.Tensor:
        return self._inputs[: COLUMNS * shape.size].view(COLUMNS, shape.size)

    def _step(self, shape: _Shape) -> torch.Tensor:
        size, width, adapters, ranks = shape
        columns = self._columns(shape)
        tables = self._inputs[COLUMNS * size :][: size * width].view(size, width)
        rows = Rows(
            ids=self._last[columns[0]],
            positions=columns[1],
            slots=columns[2],
            attention=DecodeRows(tables, columns[3]),
            lora=LoraRows(
                adapters > 0,
                slots=columns[4],
                scales=columns[5].view(torch.float32),
                one=adapters == 1,
                ranks=ranks,
            ),
        )
        return self._model.logits(self._model.hidden(rows, self._cache))


def _integers(row: ScheduledRow, cache: KVCache) -> tuple[int, int, int, int, int]:
    slot = row.cache_slot(row.start, cache.block_size)
    return row.row, row.start, slot, row.end, row.slot
