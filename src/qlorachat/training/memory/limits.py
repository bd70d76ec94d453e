"""What a run may take, and what to change when its plan takes more."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psutil
import torch

from qlorachat.checkpoints.memory import parse_memory
from qlorachat.errors import ModelError
from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.activations import checkpoints_layers
from qlorachat.training.memory.plan import (
    MemoryPlan,
    optimizer_bytes,
    optimizer_name,
    predict,
    row_tokens,
)
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.wording import size

# bytes of a card's free memory: libraries that load late, gaps between tensors
_MARGIN = 2**28

# no change goes below these
_SHORTEST = 256  # tokens of a row
_LOWEST_RANK = 8


class Alternative(NamedTuple):
    """A run that takes less."""

    change: str  # all flags that differ from the run asked for
    config: TrainConfig
    total: int  # bytes predicted


def memory_limit(memory: str | None, device: torch.device) -> int | None:
    """Bytes that training may take, by TrainConfig's `memory`; asked before the base is loaded.

    On a card never more than is free now, since Windows' driver gives the rest from shared memory;
    a fraction is of all its memory. On a CPU there is a limit only where one is asked for. Raises
    ConfigError.
    """
    if device.type == "cpu":
        return parse_memory(memory, psutil.virtual_memory().total) if memory else None
    free, total = torch.cuda.mem_get_info(device)
    room = max(0, free - _MARGIN)
    return min(parse_memory(memory, total), room) if memory else room


def cap_process(limit: int | None, device: torch.device) -> None:
    """On a card, have torch raise OutOfMemoryError `limit` bytes from here, so nothing spills.

    On a CPU there is no such cap: the plan alone refuses.
    """
    if limit is None or device.type == "cpu":
        return
    _, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_reserved(device)  # by an engine or a run before this one
    torch.cuda.set_per_process_memory_fraction(min(1.0, (taken + limit) / total), device)


def what_would_fit(
    shape: ModelShape,
    config: TrainConfig,
    *,
    longest: int,
    device_type: str,
    limit: int | None,
) -> list[Alternative]:
    """Changes, each beside those before it, up to the first that fits; [] for a plan that fits.

    What leaves the training as it is comes first: layers computed twice, smaller passes and more
    of them, 8-bit optimizer states; then a 4-bit base, shorter rows, a lower rank.
    """

    def total(config: TrainConfig, shape: ModelShape) -> int:
        return predict(
            shape, config, longest=longest, device_type=device_type, limit=limit
        ).predicted

    tried: list[Alternative] = []
    if limit is None or total(config, shape) <= limit:
        return tried
    for changes in _ladder(config, longest, device_type):
        changed = config.model_copy(update=changes)
        needed = total(changed, shape.in_nf4() if "quantization" in changes else shape)
        tried.append(Alternative(_flags(changes), changed, needed))
        if needed <= limit:
            break
    return tried


def check_fits(plan: MemoryPlan, alternatives: Sequence[Alternative]) -> None:
    """ModelError for a plan that does not fit, with what would (see what_would_fit)."""
    if plan.fits:
        return
    assert plan.limit is not None
    said = (
        f"Training takes about {size(plan.needed)} on {plan.device}, where it may take "
        f"{size(plan.limit)}"
    )
    if not alternatives:
        raise ModelError(f"{said}, and no setting makes it smaller: take a smaller model.")
    last = alternatives[-1]
    if last.total > plan.limit:
        raise ModelError(
            f"{said}, and no setting makes it fit: {last.change} would still take "
            f"{size(last.total)}; take a smaller model."
        )
    raise ModelError(f"{said}: use {last.change}, which takes about {size(last.total)}.")


def _ladder(config: TrainConfig, longest: int, device_type: str) -> Iterator[dict[str, Any]]:
    """All changes so far, one step more each time."""
    changes: dict[str, Any] = {}
    for step in _steps(config, longest, device_type):
        changes = changes | step
        yield changes


def _steps(config: TrainConfig, longest: int, device_type: str) -> Iterator[dict[str, Any]]:
    if not checkpoints_layers(config, device_type):
        yield {"gradient_checkpointing": True}
    for rows in range(config.micro_batch - 1, 0, -1):
        if config.micro_batch % rows == 0:
            passes = config.micro_batch * config.accumulation // rows
            yield {"micro_batch": rows, "accumulation": passes}
    lean = "adamw_8bit" if device_type == "cpu" else "paged_adamw_8bit"
    if optimizer_bytes(lean) < optimizer_bytes(optimizer_name(config, device_type)):
        yield {"optimizer": lean}
    if config.quantization == "16bit":
        yield {"quantization": "nf4"}
    for tokens in _halvings(row_tokens(config, longest), _SHORTEST):
        yield {"max_length": tokens}
    if config.init_adapter is None:  # it brings its own rank
        for rank in _halvings(config.rank, _LOWEST_RANK):
            yield {"rank": rank}


def _halvings(count: int, lowest: int) -> list[int]:
    """The powers of two under `count`, from the highest to `lowest`."""
    powers = [2**power for power in range(count.bit_length())]
    return [power for power in reversed(powers) if lowest <= power < count]


def _flags(changes: dict[str, Any]) -> str:
    """As on the command line."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in changes.items()
    )
