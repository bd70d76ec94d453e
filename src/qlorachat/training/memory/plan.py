"""The memory plan: what each part of a run takes, predicted before anything is loaded."""

from dataclasses import dataclass

from rich.table import Table

from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.activations import Pass
from qlorachat.training.memory.shape import ModelShape
from qlorachat.training.wording import size

# a name's part -> what is kept for each weight; of the first that fits
_OPTIMIZER_STATES = {
    "adafactor": 0,  # a row and a column for each matrix
    "ademamix": 3,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
_UNKNOWN_STATES = 2  # as Adam


@dataclass(frozen=True, slots=True)
class Part:
    """A share of the memory, in bytes."""

    name: str
    predicted: int
    measured: int | None = None
    within: tuple["Part", ...] = ()  # predicted one by one, seen only together


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run takes; the parts "one layer" and "logits" are never there at one time."""

    device: str
    limit: int | None  # bytes that the process may take
    parts: tuple[Part, ...]

    @property
    def predicted(self) -> int:
        """Bytes at the fullest moment."""
        sizes = {part.name: part.predicted for part in self.parts}
        return sum(sizes.values()) - min(sizes.get("one layer", 0), sizes.get("logits", 0))

    @property
    def measured(self) -> int | None:
        """Bytes at the fullest moment, once every part is measured."""
        known = [part.measured for part in self.parts if part.measured is not None]
        return sum(known) if len(known) == len(self.parts) else None

    @property
    def needed(self) -> int:
        """The measured bytes, before that the predicted ones."""
        return self.predicted if self.measured is None else self.measured

    @property
    def fits(self) -> bool:
        return self.limit is None or self.needed <= self.limit

    def __str__(self) -> str:
        parts = ", ".join(
            f"{part.name} {size(part.predicted if part.measured is None else part.measured)}"
            for part in self.parts
        )
        return f"memory on {self.device}: {parts}; at most {size(self.needed)}. {self._verdict()}"

    def __rich__(self) -> Table:
        """Part, predicted, measured."""
        table = Table(title=f"Memory on {self.device}", caption=self._verdict(), show_footer=True)
        table.add_column("part", "at most at one time")
        table.add_column("predicted", size(self.predicted), justify="right")
        # a process's growth is all that can be seen on a CPU
        measured = "measured" if self.device != "cpu" else "measured, about"
        table.add_column(measured, _cell(self.measured), justify="right")
        for part in self.parts:
            table.add_row(part.name, size(part.predicted), _cell(part.measured))
        return table

    def _verdict(self) -> str:
        if self.limit is None:
            return "No limit is set."
        return f"{'Fits' if self.fits else 'Does not fit'} into {size(self.limit)}."


def predict(
    shape: ModelShape,
    config: TrainConfig,
    *,
    longest: int,
    device_type: str,
    limit: int | None,
) -> MemoryPlan:
    """The plan of a run whose longest row has `longest` tokens, on "cpu" or "cuda".

    An upper estimate: adapters of few layers and Liger's kernels keep less. States of a paged
    optimizer count too, although a driver short of memory moves them to the host; CUDA's own
    context and PyTorch's gaps between tensors do not.
    """
    weights = adapter_weights(shape, config)
    work = Pass(shape, config, config.micro_batch, row_tokens(config, longest), device_type)
    # float32 weights and gradients, and PEFT's way the 16-bit weights that autocast keeps
    adapter = weights * (8 if work.is_plain else 10)
    states = round(weights * optimizer_bytes(optimizer_name(config, device_type)))
    sizes = {
        "base weights": shape.base_bytes,
        "adapter and gradients": adapter,
        "optimizer": states,
        "checkpoints": work.stored,
        "one layer": work.one_layer,
        "logits": work.logits,
    }
    return MemoryPlan(device_type, limit, tuple(Part(*item) for item in sizes.items()))


def adapter_weights(shape: ModelShape, config: TrainConfig) -> int:
    """How many numbers are trained."""
    return sum(
        config.rank * (outputs + inputs) + (outputs if config.dora else 0)
        for outputs, inputs in shape.targets(config.targets)
    )


def row_tokens(config: TrainConfig, longest: int) -> int:
    """Tokens of the longest row under a config; packs fill theirs."""
    return config.max_length if config.packing else min(longest, config.max_length)


def optimizer_name(config: TrainConfig, device_type: str) -> str:
    """The optimizer asked for, else the default of the device."""
    return config.optimizer or ("adamw_torch" if device_type == "cpu" else "paged_adamw_8bit")


def optimizer_bytes(name: str) -> float:
    """Bytes that one of transformers' optimizers keeps for each trained weight."""
    found = (count for part, count in _OPTIMIZER_STATES.items() if part in name)
    states = next(found, _UNKNOWN_STATES)
    if "8bit" in name:
        return states * (1 + 4 / 256)  # a 32-bit scale for each 256
    return states * (0.5 if "4bit" in name else 4)


def _cell(count: int | None) -> str:
    return "" if count is None else size(count)
