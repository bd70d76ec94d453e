"""The measured side of the plan: two passes that train nothing, on the longest and the median."""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import perf_counter

import psutil
import torch

from qlorachat.errors import ModelError
from qlorachat.training.memory.plan import MemoryPlan, Part
from qlorachat.training.wording import size

Batch = dict[str, torch.Tensor]  # see batches.collate

_PERIOD = 0.003  # seconds between two looks at the process's memory


@dataclass(frozen=True, slots=True)
class Measurement:
    """A plan with its measured column, and how fast a pass is."""

    plan: MemoryPlan
    seconds: float  # of the median pass
    tokens_per_second: float  # of the median pass, padding included


def measure(
    plan: MemoryPlan,
    *,
    step: Callable[[Batch], None],
    longest: Batch,
    median: Batch,
    static: Mapping[str, int],
    device: torch.device,
) -> Measurement:
    """Run `step`, a forward and backward pass, on both batches; the caller drops the gradients.

    `static` has the measured bytes of the parts that are there all the time. What the longest
    batch takes above what was there before is one part, "activations", in place of the plan's
    others: gradients must exist before, or they count twice. On a CPU it is the growth of the
    process, seen every few milliseconds. Raises ModelError when memory runs out.
    """
    try:
        peak = _peak_of(step, longest, device)
    except torch.OutOfMemoryError:
        raise _out_of_memory(plan, longest) from None
    seconds = _seconds_of(step, median, device)
    tokens = median["input_ids"].numel()
    return Measurement(_measured(plan, static, peak), seconds, tokens / seconds)


def _measured(plan: MemoryPlan, static: Mapping[str, int], activations: int) -> MemoryPlan:
    kept = [replace(part, measured=static[part.name]) for part in plan.parts if part.name in static]
    rest = plan.predicted - sum(part.predicted for part in kept)
    seen_as_one = tuple(part for part in plan.parts if part.name not in static)
    parts = (*kept, Part("activations", rest, activations, seen_as_one))
    return MemoryPlan(plan.device, plan.limit, parts)


def _peak_of(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> int:
    """Bytes that a pass takes at its fullest, above what is there when it begins."""
    if device.type == "cpu":
        _give_back_free_memory()
        with _watched_memory() as seen:
            step(batch)
        return max(seen) - seen[0]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(batch)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _seconds_of(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    began = perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - began


def _give_back_free_memory() -> None:
    """So that what a pass takes is growth, not memory that the process had no use for."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """The process's resident bytes, from the start on; complete when the block has ended."""
    process = psutil.Process()
    seen = [process.memory_info().rss]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_PERIOD):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch, name="memory-watcher", daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        seen.append(process.memory_info().rss)


def _out_of_memory(plan: MemoryPlan, batch: Batch) -> ModelError:
    rows, tokens = batch["input_ids"].shape
    allowed = "" if plan.limit is None else f" of {size(plan.limit)}"
    return ModelError(
        f"A trial pass over {rows} rows of {tokens} tokens ran out of memory{allowed} on "
        f"{plan.device}, although {size(plan.predicted)} was predicted: use --micro-batch 1 with "
        "more --accumulation, or a lower --max-length."
    )
