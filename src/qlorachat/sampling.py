"""From the logits of one position to its token: transformers' processors, a seed a request."""

from collections import Counter

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qlorachat.tokens import COLDEST, SamplingParams


class Sampler:
    """Chooses the tokens of one request; the noise comes from the request's seed alone."""

    def __init__(self, params: SamplingParams, prompt: torch.Tensor) -> None:
        """`prompt` holds the prompt's ids, shape (1, tokens), on the model's device."""
        self._params = params
        self._ids = prompt
        self._answer: Counter[int] = Counter()
        self._random = torch.Generator(prompt.device)
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)
        self._warpers = _warpers(params)
        self._bias_ids = torch.tensor(list(params.logit_bias), device=prompt.device)
        self._biases = torch.tensor(list(params.logit_bias.values()), device=prompt.device)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token id from raw logits of shape (1, vocabulary)."""
        scores = self._penalize(logits.float())
        if self._params.temperature == 0.0:
            chosen = int(scores.argmax(-1))
        else:
            chances = self._warpers(self._ids, scores).softmax(-1)
            chosen = int(torch.multinomial(chances, 1, generator=self._random))
        self._answer[chosen] += 1
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[chosen]])], dim=1)
        return chosen

    def _penalize(self, scores: torch.Tensor) -> torch.Tensor:
        params = self._params
        if params.logit_bias:
            scores = scores.clone()
            scores[0, self._bias_ids] += self._biases
        if params.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            scores = penalty(self._ids, scores)
        if self._answer and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self._answer), device=scores.device)
            counts = torch.tensor(list(self._answer.values()), device=scores.device)
            scores = scores.clone()
            scores[0, ids] -= params.presence_penalty + params.frequency_penalty * counts
        return scores


def likeliest(
    logits: torch.Tensor, chosen: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural-log probability of the chosen token, and the `count` likeliest with theirs.

    From the raw logits, shape (1, vocabulary): before temperature, penalties and biases.
    """
    logprobs = logits[0].float().log_softmax(-1)
    values, ids = logprobs.topk(count)
    return float(logprobs[chosen]), tuple(zip(ids.tolist(), values.tolist(), strict=True))


def prompt_logprobs(logits: torch.Tensor, following: torch.Tensor) -> list[float]:
    """The natural-log probability of each following token, from raw logits (tokens, vocabulary)."""
    logprobs = logits.float().log_softmax(-1)
    values: list[float] = logprobs.gather(1, following[:, None])[:, 0].tolist()
    return values


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(max(float(params.temperature), COLDEST)))
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    return warpers
