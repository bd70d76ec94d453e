"""The batch sampler against transformers' own processors, row by row; its noise and its seeds."""

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorachat.engine.batch import ScheduledRow
from qlorachat.engine.sampler import Sampler, _exponential, exponential_noise
from qlorachat.sampling import Sampler as ReferenceSampler
from qlorachat.tokens import SamplingParams, TokenRequest

VOCABULARY = 50
_ids = count(1)


def row(params: SamplingParams, place: int, history: tuple[int, ...] = (1, 2, 3)) -> ScheduledRow:
    request = TokenRequest(next(_ids), history[:2], params, frozenset())
    return ScheduledRow(request, place, 0, 0, history, (0,), True, history)


def sampler(*rows: ScheduledRow) -> Sampler:
    made = Sampler(8, VOCABULARY, torch.device("cpu"))
    for each in rows:
        made.start(each)
    return made


def chances(params: SamplingParams, logits: torch.Tensor, draws: int = 400) -> Counter[int]:
    """How often each token comes, of as many seeds."""
    rows = [row(replace(params, seed=seed), seed % 8) for seed in range(draws)]
    made: Counter[int] = Counter()
    for start in range(0, draws, 8):
        batch = rows[start : start + 8]
        tokens = sampler(*batch)(logits.expand(len(batch), -1).clone(), batch).tokens
        made.update(tokens.tolist())
    return made


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-6, 1e-5])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}])
def test_the_coldest_temperatures_take_the_likeliest(
    temperature: float, filters: dict[str, Any]
) -> None:
    params = SamplingParams(temperature=temperature, **{"top_p": 1.0, **filters})
    logits = torch.randn(1, VOCABULARY) * 20
    for likeliest in (3, 30):
        logits[0, likeliest] = logits.max() + 13
        assert set(chances(params, logits, 16)) == {likeliest}
        reference = ReferenceSampler(params, torch.tensor([[1, 2, 3]]))
        assert reference(logits) == likeliest


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7, "logit_bias": {1: 2.0, 2: -3.0, 40: 5.0}},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"logit_bias": {7: 50.0}},
        {"repetition_penalty": 1.3, "presence_penalty": -1.0, "logit_bias": {3: -100.0}},
    ],
)
def test_greedy_tokens_are_those_of_the_reference(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.0, **options)
    ours = row(params, 5, (1, 2))
    made, reference = sampler(ours), ReferenceSampler(params, torch.tensor([[1, 2]]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        logits = torch.randn(1, VOCABULARY, generator=generator) * 2
        assert made(logits.clone(), [ours]).tokens.tolist() == [reference(logits)]


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.8}]
)
def test_filters_keep_what_transformers_keeps(options: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, **options})
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    reference = Counter(
        ReferenceSampler(replace(params, seed=seed), torch.tensor([[1, 2]]))(logits)
        for seed in range(1500)
    )
    ours = chances(params, logits, 1500)
    assert set(ours) <= set(reference) | {t for t, n in ours.items() if n < 3}
    for token, number in reference.most_common(5):
        assert abs(ours[token] - number) < 5 * (number + 1) ** 0.5 + 5


def test_the_frequencies_are_the_softmax() -> None:
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    made = chances(SamplingParams(temperature=1.0, top_p=1.0), logits, 4000)
    for token, share in enumerate((0.4, 0.3, 0.2, 0.1)):
        assert abs(made[token] / 4000 - share) < 0.04


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 7), unique=True, min_size=1))
def test_a_row_draws_the_same_whoever_is_beside_it(seed: int, others: list[int]) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    mine = row(params, others[0])
    alone = sampler(mine)(logits.clone(), [mine]).tokens.tolist()
    beside = [row(SamplingParams(temperature=1.5), place) for place in others[1:]]
    everyone = [*beside, mine]
    together = sampler(*everyone)(logits.expand(len(everyone), -1).clone(), everyone)
    assert together.tokens.tolist()[-1:] == alone


def test_noise_is_above_zero_and_finite_whatever_the_bits() -> None:
    noise = _exponential(torch.tensor([-1, 0, 2**63 - 1, -(2**63)]))
    assert noise.isfinite().all()
    assert noise.min() > 0  # 0 / 0 is NaN, and argmax would choose it


def test_noise_is_exponential_and_a_function_of_seed_and_position() -> None:
    seeds, positions = torch.arange(64), torch.arange(64) * 7
    noise = exponential_noise(seeds, positions, 1000)
    assert torch.equal(noise[5:6], exponential_noise(seeds[5:6], positions[5:6], 1000))
    assert noise.min() > 0
    assert abs(float(noise.mean()) - 1.0) < 0.02
    assert abs(float(noise.var()) - 1.0) < 0.05
    flat = noise.flatten()
    assert abs(float(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1])) < 0.01


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1, VOCABULARY)
    params = SamplingParams(temperature=1.0, top_p=1.0)
    several = {int(sampler(r := row(params, 0))(logits.clone(), [r]).tokens) for _ in range(30)}
    assert len(several) > 5


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(temperature=0.0, logprobs=3, logit_bias={4: 100.0})
    mine = row(params, 0)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(2))
    sampled = sampler(mine)(logits.clone(), [mine])
    expected = logits.log_softmax(-1)
    assert sampled.tokens.tolist() == [4]
    assert sampled.logprobs is not None
    assert sampled.top_ids is not None
    assert torch.allclose(sampled.logprobs, expected[:, 4])
    assert sampled.top_ids.tolist() == expected.topk(3).indices.tolist()
