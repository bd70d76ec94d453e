"""How closely one model follows another: both are asked for the same answers, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import kl_div
from transformers import GenerationConfig, PreTrainedModel

from qlorachat.templates import Prompt
from qlorachat.training.data.samples import Sample

MOST_TOKENS = 1024  # answer tokens compared; their float32 log-probabilities are kept, all of them


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a model says beside what a reference says, over `tokens` answer positions."""

    tokens: int
    top_1: float  # share of positions where both have the same likeliest token
    mean_kl: float  # Kullback-Leibler divergence from the reference, in nats
    max_kl: float


class Reference:
    """A model's log-probabilities at the answers of some samples, on the CPU."""

    def __init__(self, model: PreTrainedModel, samples: Sequence[Sample]) -> None:
        """Of the samples, whole ones from the first on are taken, up to MOST_TOKENS together."""
        self.samples = tuple(_first(samples))
        self._logprobs = [_logprobs(model, sample) for sample in self.samples]

    @property
    def tokens(self) -> int:
        """Answer positions that are compared."""
        return sum(map(len, self._logprobs))

    def compare(self, model: PreTrainedModel) -> Agreement:
        """How another model follows; both must have the same vocabulary."""
        same, divergence = [], []
        for sample, ours in zip(self.samples, self._logprobs, strict=True):
            theirs = _logprobs(model, sample)
            same.append(ours.argmax(-1) == theirs.argmax(-1))
            divergence.append(kl_div(theirs, ours, reduction="none", log_target=True).sum(-1))
        kl = torch.cat(divergence).clamp(min=0)  # rounding alone makes it negative
        return Agreement(
            tokens=self.tokens,
            top_1=torch.cat(same).float().mean().item(),
            mean_kl=kl.mean().item(),
            max_kl=kl.max().item(),
        )


def _first(samples: Sequence[Sample]) -> Iterator[Sample]:
    tokens = 0
    for sample in samples:
        tokens += int(sample.trained.sum())
        if tokens > MOST_TOKENS:
            return
        yield sample


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """Natural-log probabilities (answer tokens, vocabulary), float32, before each answer token."""
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None].to(model.device)
    places = torch.from_numpy(sample.trained).nonzero()[:, 0] - 1
    output = model(input_ids=ids, logits_to_keep=places.to(model.device), use_cache=False)
    logprobs: torch.Tensor = output.logits[0].float().log_softmax(-1).cpu()
    return logprobs


@torch.inference_mode()
def answer(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, stop_ids: frozenset[int], max_tokens: int
) -> list[Sample]:
    """Each prompt with the answer that the model finds likeliest, up to its end or `max_tokens`."""
    longest = max(len(prompt.ids) for prompt in prompts)
    pad = min(stop_ids, default=0)
    rows = [(pad,) * (longest - len(prompt.ids)) + prompt.ids for prompt in prompts]
    asked = torch.tensor(rows, device=model.device)
    mask = torch.tensor(
        [[place >= longest - len(prompt.ids) for place in range(longest)] for prompt in prompts],
        device=model.device,
    )
    # in place of the model's own, whose penalties and temperatures would join in
    model.generation_config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=pad,
    )
    generated = model.generate(asked, attention_mask=mask.long())
    answers = generated[:, longest:].tolist()
    return [
        _sample(line, prompt.ids, _up_to_end(ids, stop_ids))
        for line, (prompt, ids) in enumerate(zip(prompts, answers, strict=True), start=1)
    ]


def _up_to_end(ids: Sequence[int], stop_ids: frozenset[int]) -> Sequence[int]:
    """An answer with the first token that ends it, and without the padding after that."""
    ends = (place for place, token in enumerate(ids, start=1) if token in stop_ids)
    return ids[: next(ends, len(ids))]


def _sample(line: int, prompt: Sequence[int], answer: Sequence[int]) -> Sample:
    ids = np.array([*prompt, *answer], np.int32)
    return Sample(line, ids, np.arange(len(ids)) >= len(prompt), truncated=False)
