"""What happened in a run: steps, evaluations and sample chats, in the order that they came."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from qlorachat.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, as it ended."""

    step: NonNegativeInt  # from 1
    epoch: FiniteFloat
    loss: FiniteFloat  # nats a token, the mean over its trained tokens
    learning_rate: FiniteFloat
    grad_norm: float  # before clipping; not finite where fp16's loss scaling skipped the step
    tokens: NonNegativeInt  # since the run began, padding excluded
    seconds: FiniteFloat  # of wall clock since the run began
    memory: NonNegativeInt  # bytes, the peak of this step


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss over what was held out, after a step; step 0 is before the first."""

    step: NonNegativeInt
    loss: FiniteFloat  # nats a token


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt with the base's answer and the adapter's after a step."""

    step: NonNegativeInt
    prompt: str
    base: str
    answer: str


@dataclass
class History:
    """A run so far; only the trainer adds to it."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)

    @property
    def best(self) -> Evaluation | None:
        """The lowest evaluation after a step, the earliest of equal ones."""
        return next(iter(self.best_first), None)

    @property
    def best_first(self) -> list[Evaluation]:
        """The evaluations after a step, from the lowest loss on."""
        judged = [each for each in self.evaluations if each.step]
        return sorted(judged, key=lambda each: each.loss)

    def to_json(self) -> str:
        """One line that `from_json` reads back equal, floats to the last bit."""
        file = _File(version=1, steps=self.steps, evaluations=self.evaluations, chats=self.chats)
        return file.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "History":
        """Read what `to_json` wrote; ConfigError names the first thing that is damaged."""
        try:
            file = _File.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise _damaged(f"{place}: {first['msg']}" if place else first["msg"]) from None
        _check_order(file.steps)
        return cls(file.steps, file.evaluations, file.chats)


class _File(BaseModel):
    """The keys of history.json; another set of them is another version."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    version: Literal[1]
    steps: list[Step]
    evaluations: list[Evaluation]
    chats: list[Chat]


def _check_order(steps: Sequence[Step]) -> None:
    for earlier, later in pairwise(steps):
        if later.step <= earlier.step:
            raise _damaged(f"step {later.step} comes after step {earlier.step}")


def _damaged(finding: str) -> ConfigError:
    return ConfigError(
        f"A run's history.json is damaged ({finding}): delete its checkpoint's folder, and "
        "--resume goes on from the one before it."
    )
