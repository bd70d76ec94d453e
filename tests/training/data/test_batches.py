"""Every sample once an epoch, whatever the sizes; packed rows are to a model as rows of one."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import (
    MicroBatch,
    Schedule,
    collate,
    plan_evaluation,
    plan_schedule,
)
from qlorachat.training.data.packing import pack
from qlorachat.training.data.samples import Sample

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=120)
SIZES = st.integers(1, 5)
ORDERS = st.sampled_from([{}, {"packing": True}, {"group_by_length": True}])


def plan(lengths: Sequence[int], **options: Any) -> Schedule:
    return plan_schedule(lengths, TrainConfig(**{"max_length": 64, **options}))


def indices(micro_batches: Sequence[MicroBatch]) -> list[int]:
    return [index for micro_batch in micro_batches for row in micro_batch for index in row]


def seen(schedule: Schedule) -> list[int]:
    return [index for step in schedule.steps for index in indices(step)]


@settings(deadline=None)
@given(LENGTHS, SIZES, SIZES, ORDERS, st.integers(1, 3), st.integers(0, 9))
def test_each_epoch_has_every_sample_once(
    lengths: list[int],
    micro_batch: int,
    accumulation: int,
    order: dict[str, bool],
    epochs: int,
    seed: int,
) -> None:
    schedule = plan(
        lengths,
        micro_batch=micro_batch,
        accumulation=accumulation,
        epochs=epochs,
        seed=seed,
        **order,
    )
    samples = seen(schedule)
    for epoch in range(epochs):
        part = samples[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))
    assert len(samples) == epochs * len(lengths)
    assert all(1 <= len(step) <= accumulation for step in schedule.steps)
    assert all(1 <= len(micro) <= micro_batch for step in schedule.steps for micro in step)
    rows = [row for step in schedule.steps for micro in step for row in micro]
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    if "packing" not in order:
        assert all(len(row) == 1 for row in rows)
        # only the last step of an epoch is short
        steps = -(-len(lengths) // (micro_batch * accumulation))
        assert len(schedule.steps) == steps * epochs


@settings(deadline=None)
@given(LENGTHS, ORDERS, st.floats(0.01, 3))
def test_tokens_and_epochs_after_each_step(
    lengths: list[int], order: dict[str, bool], epochs: float
) -> None:
    schedule = plan(lengths, epochs=epochs, **order)
    assert list(schedule.tokens) == [
        sum(lengths[index] for index in indices(step)) for step in schedule.steps
    ]
    assert all(earlier < later for earlier, later in pairwise((0.0, *schedule.epochs)))
    assert schedule.epochs[-1] == len(seen(schedule)) / len(lengths)


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.001, 1), (0.5, 5), (0.51, 6), (1, 10), (1.1, 11), (2.3, 23)]
)
def test_a_part_of_an_epoch_is_a_part_of_its_steps(epochs: float, steps: int) -> None:
    assert len(plan([7] * 79, epochs=epochs).steps) == steps  # 8 samples a step


@pytest.mark.parametrize("order", [{}, {"packing": True}])
def test_max_steps_goes_round_as_often_as_needed(order: dict[str, bool]) -> None:
    lengths = [60] * 10
    schedule = plan(lengths, max_steps=7, epochs=1, **order)  # steps of 8 and 2 samples
    assert len(schedule.steps) == 7
    assert Counter(seen(schedule)).most_common()[-1][1] >= 3
    assert schedule.epochs[1] == 1.0
    assert schedule.epochs[-1] == 3.8
    assert len(plan(lengths, max_steps=1, epochs=9).steps) == 1


@pytest.mark.parametrize("order", [{}, {"packing": True}, {"group_by_length": True}])
def test_the_order_is_the_seeds_and_new_each_epoch(order: dict[str, bool]) -> None:
    lengths = [1 + index * 7 % 60 for index in range(200)]
    first = plan(lengths, epochs=2, **order)
    assert first == plan(lengths, epochs=2, **order)
    assert first.steps != plan(lengths, epochs=2, seed=1, **order).steps
    samples = seen(first)
    assert samples[:200] != samples[200:]
    assert seen(plan(lengths, epochs=1, **order)) == samples[:200]


@given(LENGTHS, SIZES, SIZES)
def test_grouping_puts_the_longest_first(
    lengths: list[int], micro_batch: int, accumulation: int
) -> None:
    schedule = plan(
        lengths,
        group_by_length=True,
        micro_batch=micro_batch,
        accumulation=accumulation,
        epochs=1,
    )
    assert lengths[seen(schedule)[0]] == max(lengths)


def test_grouping_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 2000).tolist()

    def padded(schedule: Schedule) -> int:
        micro_batches = [micro for step in schedule.steps for micro in step]
        return sum(len(m) * max(lengths[i] for i in indices([m])) for m in micro_batches)

    grouped = padded(plan(lengths, epochs=1, group_by_length=True))
    assert grouped < 1.05 * sum(lengths)
    assert padded(plan(lengths, epochs=1)) > 1.4 * sum(lengths)


@given(LENGTHS)
@example([64, 1, 32, 32, 63])
def test_packs_hold_every_sample_and_are_nearly_as_few_as_can_be(lengths: list[int]) -> None:
    packs = pack(range(len(lengths)), lengths, 64)
    assert sorted(index for each in packs for index in each) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in each) <= 64 for each in packs)
    # two packs never fit in one, so at most one is half empty or more
    assert 2 * sum(lengths) > 64 * (len(packs) - 1)
    assert len(packs) >= sum(lengths) / 64


def test_packing_fits_each_sample_where_it_leaves_least() -> None:
    lengths = [4, 6, 3, 7, 2, 8]
    assert pack(range(6), lengths, 10) == [(5, 4), (3, 2), (1, 0)]


@given(LENGTHS, SIZES)
def test_evaluation_has_every_sample_once_the_longest_first(lengths: list[int], size: int) -> None:
    passes = plan_evaluation(lengths, TrainConfig(micro_batch=size, packing=True))
    order = indices(passes)
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(row) == 1 for micro_batch in passes for row in micro_batch)
    assert all(len(micro_batch) == size for micro_batch in passes[:-1])


def test_no_samples_no_evaluation() -> None:
    assert plan_evaluation([], TrainConfig()) == ()


def make_sample(ids: list[int], prompt: int) -> Sample:
    """A sample whose first `prompt` tokens are not trained."""
    trained = np.arange(len(ids)) >= prompt
    return Sample(1, np.array(ids, np.int32), trained, truncated=False)


A, B, C = make_sample([5, 6, 7], 1), make_sample([8, 9], 1), make_sample([3, 4, 2, 1], 2)


def test_collate() -> None:
    batch = collate([[A, B], [C]], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9], [3, 4, 2, 1, 0]],
        "labels": [[-100, 6, 7, -100, 9], [-100, -100, 2, 1, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_packed_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()

    def logits(rows: list[list[Sample]]) -> torch.Tensor:
        batch = collate(rows, pad_id=0)
        with torch.inference_mode():
            out: torch.Tensor = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        return out

    packed = logits([[A, C, B], [C, A]])
    alone = [logits([[sample]])[0] for sample in (A, C, B)]
    torch.testing.assert_close(packed[0], torch.cat(alone))
    torch.testing.assert_close(packed[1, :7], torch.cat([alone[1], alone[0]]))
