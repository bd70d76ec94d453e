"""Samples become the whole run's micro-batches before it starts: every sample once an epoch.

The order hangs on the lengths, the config and its seed alone, so that a run can resume anywhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import TypeVar

import numpy as np
import torch

from qlorachat.training.config import TrainConfig
from qlorachat.training.data.packing import Pack, pack
from qlorachat.training.data.samples import Sample

T = TypeVar("T")

MicroBatch = tuple[Pack, ...]  # the rows of one pass; indices are places in the samples
StepPlan = tuple[MicroBatch, ...]  # the passes that one optimizer step accumulates

IGNORED = -100  # a label that has no loss, as in torch and transformers
_WINDOW = 50  # steps whose samples are sorted together, as transformers' length grouping has it
_ROUNDING = 1e-9  # 1.1 epochs of 10 steps are 11 steps, not 12


@dataclass(frozen=True, slots=True)
class Schedule:
    """Every step of a run, with its tokens (padding excluded) and the epoch that it ends at."""

    steps: tuple[StepPlan, ...]
    tokens: tuple[int, ...]
    epochs: tuple[float, ...]


def plan_schedule(lengths: Sequence[int], config: TrainConfig) -> Schedule:
    """The run's steps for samples of these lengths in tokens, of which there is at least one.

    Each epoch has a new order, and its last step may be a short one. A part of an epoch is as many
    of its steps, rounded up; `max_steps` takes the place of `epochs`. With packing,
    `group_by_length` has nothing to do.
    """
    assert lengths, "a schedule needs samples"
    steps = tuple(_steps(lengths, config))
    seen = [[index for micro in step for row in micro for index in row] for step in steps]
    tokens = tuple(sum(lengths[index] for index in samples) for samples in seen)
    counts = accumulate(len(samples) for samples in seen)
    return Schedule(steps, tokens, tuple(count / len(lengths) for count in counts))


def plan_evaluation(lengths: Sequence[int], config: TrainConfig) -> tuple[MicroBatch, ...]:
    """Every sample once, a row each, the longest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return tuple(_chunk([(index,) for index in order], config.micro_batch))


def collate(rows: Sequence[Sequence[Sample]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """The tensors of one pass, int64 (rows, tokens), padded at the right to the longest row.

    `labels` are the ids themselves where they are trained, unshifted, else -100. `position_ids`
    begin anew with each sample of a row, by which transformers knows that none may see another,
    and run on over the padding, where labels are -100.
    """
    width = max(sum(len(sample.ids) for sample in row) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), pad_id),
        "labels": torch.full((len(rows), width), IGNORED),
        "position_ids": torch.zeros((len(rows), width), dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        ids = torch.from_numpy(np.concatenate([sample.ids for sample in row])).long()
        trained = torch.from_numpy(np.concatenate([sample.trained for sample in row]))
        batch["input_ids"][index, : len(ids)] = ids
        batch["labels"][index, : len(ids)] = ids.where(trained, IGNORED)
        batch["position_ids"][index] = _positions([len(sample.ids) for sample in row], width)
    return batch


def _positions(lengths: Sequence[int], width: int) -> torch.Tensor:
    """0, 1, … for each sample; the last one's go on to the end of the row."""
    others = lengths[:-1]
    return torch.cat([torch.arange(length) for length in (*others, width - sum(others))])


def _steps(lengths: Sequence[int], config: TrainConfig) -> Iterable[StepPlan]:
    epochs = _epochs(lengths, config)
    if config.max_steps is not None:
        return islice(chain.from_iterable(epochs), config.max_steps)
    part, whole = math.modf(config.epochs)
    steps = list(chain.from_iterable(islice(epochs, int(whole))))
    last = next(epochs)
    return steps + last[: math.ceil(part * len(last) - _ROUNDING)]


def _epochs(lengths: Sequence[int], config: TrainConfig) -> Iterator[list[StepPlan]]:
    """Each epoch's steps, without end."""
    generator = np.random.default_rng(config.seed)
    while True:
        rows = _rows(lengths, config, generator)
        yield _chunk(_chunk(rows, config.micro_batch), config.accumulation)


def _rows(
    lengths: Sequence[int], config: TrainConfig, generator: np.random.Generator
) -> Sequence[Pack]:
    """An epoch's samples in a new order, one in a row unless packed."""
    order: list[int] = generator.permutation(len(lengths)).tolist()
    if config.packing:
        packs = pack(order, lengths, config.max_length)
        return [packs[place] for place in generator.permutation(len(packs))]
    if config.group_by_length:
        order = _grouped(order, lengths, config.micro_batch * config.accumulation)
    return [(index,) for index in order]


def _grouped(order: Sequence[int], lengths: Sequence[int], step: int) -> list[int]:
    """Sorted in windows of some steps, with the longest of all first: it fits, or fails at once."""
    window = step * max(1, min(_WINDOW, len(order) // (4 * step)))
    windows = [
        sorted(part, key=lengths.__getitem__, reverse=True) for part in _chunk(order, window)
    ]
    first, longest = windows[0], max(windows, key=lambda part: lengths[part[0]])
    first[0], longest[0] = longest[0], first[0]
    return list(chain.from_iterable(windows))


def _chunk(items: Sequence[T], size: int) -> list[tuple[T, ...]]:
    """Runs of `size` items; the last may be shorter."""
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]
