"""The next token of every row of a step, on the device; noise depends on seed and position only."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlorachat.engine.batch import ScheduledRow
from qlorachat.tokens import COLDEST, SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens (rows,) int64 on the device; where asked for, each one's logprob and the top ones."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None  # float32 (rows,)
    top_ids: torch.Tensor | None = None  # int64 (rows, k)
    top_logprobs: torch.Tensor | None = None  # float32 (rows, k)


class Sampler:
    """Chooses for many rows at once; each row's request has its own settings, seed and history."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._rows, self._vocabulary, self._device = rows, vocabulary, device
        self._seeds = [0] * rows
        self._seen: torch.Tensor | None = None  # bool (rows, vocabulary): in prompt or answer
        self._counts: torch.Tensor | None = None  # float32 (rows, vocabulary): in the answer

    def start(self, row: ScheduledRow) -> None:
        """Begin with a request anew: its seed, and what its penalties look back at."""
        params = row.request.sampling
        self._seeds[row.row] = secrets.randbits(63) if params.seed is None else params.seed
        if not _penalizes(params):
            return
        seen, counts = self._history()
        history = torch.tensor(row.history, device=self._device)
        seen[row.row].zero_()[history] = True
        answer = history[len(row.request.prompt) :]
        counts[row.row].zero_().index_add_(0, answer, torch.ones_like(answer, dtype=counts.dtype))

    def __call__(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> Sampled:
        """Sample from raw logits of shape (rows, vocabulary)."""
        params = [row.request.sampling for row in rows]
        places = self._tensor([row.row for row in rows], torch.int64)
        scores = self._penalize(logits.float(), places, params)
        tokens = scores.argmax(-1)
        if any(each.temperature > 0.0 for each in params):
            tokens = torch.where(
                self._tensor([each.temperature == 0.0 for each in params], torch.bool),
                tokens,
                self._draw(scores, rows, params),
            )
        self._remember(places, tokens, params)
        return self._report(logits, tokens, params)

    def _penalize(
        self, scores: torch.Tensor, places: torch.Tensor, params: Sequence[SamplingParams]
    ) -> torch.Tensor:
        if any(each.logit_bias for each in params):
            scores = scores.clone()  # the caller's logits stay as they are
        for index, each in enumerate(params):
            if each.logit_bias:
                ids = self._tensor(list(each.logit_bias), torch.int64)
                scores[index, ids] += self._tensor(list(each.logit_bias.values()), torch.float32)
        if not any(map(_penalizes, params)):
            return scores
        seen, counts = self._history()
        repetition = self._column([each.repetition_penalty for each in params])
        divided = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen[places], divided, scores)
        answer = counts[places]
        presence = self._column([each.presence_penalty for each in params])
        frequency = self._column([each.frequency_penalty for each in params])
        return scores - presence * (answer > 0) - frequency * answer

    def _draw(
        self,
        scores: torch.Tensor,
        rows: Sequence[ScheduledRow],
        params: Sequence[SamplingParams],
    ) -> torch.Tensor:
        """A token of each row by its chances (the exponential race: argmax of p / noise)."""
        scores = scores / self._column([max(each.temperature, COLDEST) for each in params])
        seeds = self._tensor([self._seeds[row.row] for row in rows], torch.int64)
        positions = self._tensor([row.end for row in rows], torch.int64)
        noise = exponential_noise(seeds, positions, scores.shape[1])
        if not any(map(_filters, params)):
            return (scores.softmax(-1) / noise).argmax(-1)
        ranked, ids = scores.sort(dim=-1, descending=True)
        chances = self._filtered(ranked, params)
        winner = (chances / noise.gather(1, ids)).argmax(-1, keepdim=True)
        return ids.gather(1, winner)[:, 0]

    def _filtered(self, ranked: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
        """Chances by descending rank, zero outside top_k, top_p and min_p, in this order."""
        size = ranked.shape[1]
        places = torch.arange(size, device=ranked.device)
        top_k = self._column([each.top_k or size for each in params])
        chances = ranked.masked_fill(places >= top_k, -torch.inf).softmax(-1)
        before = chances.cumsum(-1) - chances
        top_p = self._column([each.top_p for each in params])
        min_p = self._column([each.min_p for each in params])
        keep = ((before < top_p) & (chances >= min_p * chances[:, :1])) | (places == 0)
        return chances * keep

    def _remember(
        self, places: torch.Tensor, tokens: torch.Tensor, params: Sequence[SamplingParams]
    ) -> None:
        if any(map(_penalizes, params)):
            seen, counts = self._history()
            seen[places, tokens] = True
            counts[places, tokens] += 1

    def _report(
        self, logits: torch.Tensor, tokens: torch.Tensor, params: Sequence[SamplingParams]
    ) -> Sampled:
        wanted = [each.logprobs for each in params if each.logprobs is not None]
        if not wanted:
            return Sampled(tokens)
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(max(wanted))
        return Sampled(tokens, logprobs.gather(1, tokens[:, None])[:, 0], ids, values)

    def _history(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocated by the first request that penalizes."""
        shape = (self._rows, self._vocabulary)
        if self._seen is None or self._counts is None:
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(shape, dtype=torch.float32, device=self._device)
        return self._seen, self._counts

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return self._tensor(values, torch.float32)[:, None]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is all that a request asks for."""
    plain = params.temperature == 0.0 and params.logprobs is None and not params.logit_bias
    return plain and not _penalizes(params)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting for what runs there."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def exponential_noise(seeds: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Exponential noise (rows, size), a function of (seed, position, column) alone.

    The uniform bits are SplitMix64 (Steele, Lea, Flood 2014) of a counter, the same on every
    device; `seeds` and `positions` are int64 (rows,).
    """
    columns = torch.arange(size, device=seeds.device)
    row = _mix(_mix(seeds) + positions)
    return _exponential(_mix(row[:, None] + columns))


def _exponential(bits: torch.Tensor) -> torch.Tensor:
    """Exponential noise from random int64, above 0 and finite whatever the bits.

    23 bits and a half fill float32's 24; one more would round the largest up to log(1) = 0, and
    a chance of 0 divided by it wins the race.
    """
    uniform = ((bits >> 41 & 0x7FFFFF).float() + 0.5) / 2**23
    return -uniform.log()


def _mix(value: torch.Tensor) -> torch.Tensor:
    """One SplitMix64 output step on int64, which wraps as uint64 does."""
    value = value - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift right: int64 has only the arithmetic one."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
