"""Runs batches on the device: launches return at once, tokens stay there until somebody asks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from qlorachat.adapters import Adapter
from qlorachat.engine.batch import Batch, ScheduledRow
from qlorachat.engine.graphs import DecodeGraphs
from qlorachat.engine.sampler import Sampled, Sampler, is_greedy, to_device
from qlorachat.engine.scheduler import Logprobs
from qlorachat.kernels import LoraSegment, list_places
from qlorachat.model import GatheredRows, KVCache, PagedLlama, PrefillChunk, PrefillChunks, Rows
from qlorachat.model.lora import LoraRows

SCORED_AT_ONCE = 512  # positions: their logits are in memory together


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way; its two methods wait for the device."""

    batch: Batch
    rows: Sequence[ScheduledRow]  # those that sampled
    parts: Sequence[Sampled]  # the same, in the same order
    ready: Callable[[], None]
    host_tokens: torch.Tensor
    scores: Sequence[tuple[int, torch.Tensor]] = ()  # row index, logprobs of its prompt's tokens

    def tokens(self) -> dict[int, int]:
        """Row index -> sampled token."""
        self.ready()
        places = (row.row for row in self.rows)
        return dict(zip(places, self.host_tokens.tolist(), strict=True))

    def logprobs(self) -> dict[int, Logprobs]:
        """Row index -> log-probabilities, of the rows whose requests ask for them."""
        reports: Iterable[Logprobs | None] = (
            report for part in self.parts for report in _reports(part)
        )
        return {
            row.row: (report[0], report[1][: row.request.sampling.logprobs])
            for row, report in zip(self.rows, reports, strict=True)
            if report is not None and row.request.sampling.logprobs is not None
        }

    def prompt_logprobs(self) -> dict[int, list[float]]:
        """Row index -> log-probabilities of the prompt's tokens after those of this step."""
        return {row: values.tolist() for row, values in self.scores}


class Runner:
    """Owns the model, the cache and every running sequence's last token; one thread only."""

    def __init__(
        self, model: PagedLlama, cache: KVCache, *, rows: int, blocks_per_sequence: int
    ) -> None:
        self.adapters: dict[str, Adapter] = {}  # by content hash; the backend adds and removes
        self._model, self._cache = model, cache
        self._device = model.device
        vocabulary = model.config.vocab_size
        self._last = torch.zeros(rows + 1, dtype=torch.int64, device=self._device)  # and padding's
        self._sampler = Sampler(rows, vocabulary, self._device)
        self._in_slot: dict[int, str] = {}
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda":
            self._graphs = DecodeGraphs(model, cache, self._last, blocks_per_sequence)

    def use_device(self) -> None:
        """First, by the thread that launches: Triton and graphs take the current device."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a step; nothing here waits for the device."""
        for row in batch.rows:
            self._place_adapter(row)
            if row.history:
                self._sampler.start(row)
        parts: list[tuple[Sequence[ScheduledRow], Sampled]] = []
        scores: list[tuple[int, torch.Tensor]] = []
        if batch.decodes:
            # rows with one adapter side by side: kernels take its weights once for all of them
            decodes = sorted(batch.decodes, key=lambda row: row.slot)
            most = self._model.most_decode_rows or len(decodes)
            for start in range(0, len(decodes), most):
                own = decodes[start : start + most]
                sampled = self._decode(own)
                if start + most < len(decodes):  # a graph's next run overwrites them
                    sampled = replace(sampled, tokens=sampled.tokens.clone())
                parts.append((own, sampled))
        if batch.prefills:
            hidden = self._prefill(batch.prefills)
            scores = self._score(hidden, batch.prefills)
            if sampling := [row for row in batch.prefills if row.sample]:
                last = self._tensor(_last_positions(batch.prefills), torch.int64)
                parts.append((sampling, self._sample(self._model.logits(hidden[last]), sampling)))
        host, ready = _to_host([part.tokens for _, part in parts], self._device)
        rows = [row for rows, _ in parts for row in rows]
        return Launched(batch, rows, [part for _, part in parts], ready, host, scores)

    @torch.inference_mode()
    def forget(self, sha256: str) -> None:
        """An adapter was unloaded; its slot holds nothing that may be used.

        Ranks that no other has are given up: every slot has room for as many as there are, and
        products and graphs of all rows would go on with it.
        """
        self.adapters.pop(sha256, None)
        self._in_slot = {slot: held for slot, held in self._in_slot.items() if held != sha256}
        stacks = self._model.adapters
        most = max((each.largest_rank for each in self.adapters.values()), default=0)
        if most < stacks.rank:
            try:
                self._make_room(stacks.slots, most)
            except torch.OutOfMemoryError:  # who needs an adapter next makes room for it
                torch.cuda.empty_cache()

    def _sample(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> Sampled:
        sampled = self._sampler(logits, rows)
        self._last[self._tensor([row.row for row in rows], torch.int64)] = sampled.tokens
        return sampled

    def _decode(self, rows: Sequence[ScheduledRow]) -> Sampled:
        if self._graphs is None:
            return self._sample(self._decode_eagerly(rows), rows)
        logits, greedy = self._graphs.run(rows)
        if all(is_greedy(row.request.sampling) for row in rows):
            return Sampled(greedy)
        return self._sample(logits, rows)

    def _decode_eagerly(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        places = self._tensor([row.row for row in rows], torch.int64)
        width = max(len(row.block_table) for row in rows)
        tables = [[*row.block_table, *[0] * (width - len(row.block_table))] for row in rows]
        inputs = Rows(
            ids=self._last[places],
            positions=self._tensor([row.start for row in rows], torch.int32),
            slots=self._tensor(
                [row.cache_slot(row.start, self._cache.block_size) for row in rows], torch.int32
            ),
            attention=GatheredRows(
                list_places(
                    self._tensor(tables, torch.int32),
                    self._tensor([row.end for row in rows], torch.int32),
                    self._cache.block_size,
                )
            ),
            lora=_lora(rows),
        )
        return self._model.logits(self._model.hidden(inputs, self._cache))

    def _prefill(self, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """The hidden state of every position."""
        ids = [token for row in rows for token in row.tokens or ()]
        chunks = self._chunks(rows)
        # listed on the device: Python takes a third of a millisecond and more for a long prompt
        places = [
            _cache_slots(chunk.blocks, self._cache)[row.start : row.end]
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        positions = [
            torch.arange(row.start, row.end, dtype=torch.int32, device=self._device) for row in rows
        ]
        inputs = Rows(
            ids=self._tensor(ids, torch.int64),
            positions=torch.cat(positions),
            slots=torch.cat(places),
            attention=PrefillChunks(chunks),
            lora=_lora(rows),
        )
        return self._model.hidden(inputs, self._cache)

    def _score(
        self, hidden: torch.Tensor, rows: Sequence[ScheduledRow]
    ) -> list[tuple[int, torch.Tensor]]:
        """Log-probabilities of the prompt tokens that follow, of rows whose requests ask for it."""
        scores, start = [], 0
        for row in rows:
            following = row.request.prompt[row.start + 1 : row.end + 1]
            if row.request.prompt_logprobs and following:
                states = hidden[start : start + len(following)].split(SCORED_AT_ONCE)
                tokens = self._tensor(following, torch.int64).split(SCORED_AT_ONCE)
                values = [self._likelihood(*pair) for pair in zip(states, tokens, strict=True)]
                scores.append((row.row, torch.cat(values)))
            start += row.num_tokens
        return scores

    def _likelihood(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logprobs = self._model.logits(hidden).float().log_softmax(-1)
        return logprobs.gather(1, tokens[:, None])[:, 0]

    def _chunks(self, rows: Sequence[ScheduledRow]) -> list[PrefillChunk]:
        chunks, start = [], 0
        for row in rows:
            blocks = row.block_table[: -(-row.end // self._cache.block_size)]
            end = start + row.num_tokens
            chunks.append(PrefillChunk(start, end, row.end, self._find(blocks)))
            start = end
        return chunks

    def _find(self, blocks: Sequence[int]) -> torch.Tensor | slice:
        """A slice of the cache where they follow each other, as they mostly do."""
        first, end = blocks[0], blocks[0] + len(blocks)
        if list(blocks) == list(range(first, end)):
            return slice(first, end)
        return self._tensor(blocks, torch.int64)

    def _place_adapter(self, row: ScheduledRow) -> None:
        """See to it that the row's slot holds its adapter; the copy is one more piece of work
        on the device, after every launch that still used what was there."""
        sha256 = row.request.adapter
        if sha256 is None or self._in_slot.get(row.slot) == sha256:
            return
        adapter, stacks = self.adapters[sha256], self._model.adapters
        self._make_room(max(row.slot, stacks.slots), max(adapter.largest_rank, stacks.rank))
        self._write(row.slot, sha256)

    def _make_room(self, slots: int, rank: int) -> None:
        """For so many adapters of so many ranks; those that are in slots are so again."""
        if self._model.adapters.has_room(slots, rank):
            return
        if self._graphs is not None:
            self._graphs.clear()
        held, self._in_slot = self._in_slot, {}
        self._model.adapters.allocate(slots, rank)
        for slot, sha256 in held.items():
            self._write(slot, sha256)

    def _write(self, slot: int, sha256: str) -> None:
        self._in_slot.pop(slot, None)  # if memory runs out meanwhile, the slot holds nothing
        self._model.adapters.write(slot, self.adapters[sha256])
        self._in_slot[slot] = sha256

    def _tensor(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)


def _cache_slots(blocks: torch.Tensor | slice, cache: KVCache) -> torch.Tensor:
    """Where the positions of a sequence's blocks are in the cache: int32, in order."""
    size, device = cache.block_size, cache.keys.device
    if isinstance(blocks, slice):
        return torch.arange(
            blocks.start * size, blocks.stop * size, dtype=torch.int32, device=device
        )
    return (blocks[:, None] * size + torch.arange(size, device=device)).flatten().int()


def _last_positions(rows: Sequence[ScheduledRow]) -> list[int]:
    """Where the last position of each sampling row is in a prefill."""
    ends = accumulate(row.num_tokens for row in rows)
    return [end - 1 for end, row in zip(ends, rows, strict=True) if row.sample]


def _lora(rows: Sequence[ScheduledRow]) -> LoraRows:
    """Runs of neighbouring rows with one adapter at one strength; the bare base is left out."""
    segments: list[LoraSegment] = []
    start = 0
    for row in rows:
        stop, scale = start + row.num_tokens, row.request.adapter_scale
        if segments and segments[-1][1:] == (start, row.slot, scale):
            segments[-1] = segments[-1]._replace(stop=stop)
        elif row.slot:
            segments.append(LoraSegment(start, stop, row.slot, scale))
        start = stop
    return LoraRows(active=bool(segments), segments=segments)


def _to_host(
    parts: Sequence[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, Callable[[], None]]:
    """The tokens on the host, and what to call before they are read."""
    if not parts:
        return torch.empty(0, dtype=torch.int64), lambda: None
    tokens = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if device.type == "cpu":
        return tokens, lambda: None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize


def _reports(part: Sampled) -> list[Logprobs | None]:
    if part.logprobs is None or part.top_ids is None or part.top_logprobs is None:
        return [None] * len(part.tokens)
    rows = zip(
        part.logprobs.tolist(), part.top_ids.tolist(), part.top_logprobs.tolist(), strict=True
    )
    return [(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in rows]
