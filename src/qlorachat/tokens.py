"""Integer nouns: what crosses the waist between text and the engine; no text is in here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from time import perf_counter

from qlorachat.errors import QlorachatError, UsageError


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # an end-of-turn token or a stop string
    LENGTH = "length"  # max_tokens or the context
    ABORTED = "aborted"  # closed by the caller


# field -> (lowest, highest) allowed; both ends belong to the range
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "max_tokens": (1, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, 20),
}
_INTEGERS = {"top_k", "max_tokens", "seed", "logprobs"}
COLDEST = 1e-6  # a temperature below it counts as this one: scores over it stay finite
_OPTIONAL = {"seed", "logprobs"}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; a wrong value is a UsageError that names its field.

    `temperature` 0 is greedy. `top_k` 0 and `min_p` 0.0 are off. `repetition_penalty` divides
    (arXiv:1909.05858) over prompt and answer; `presence_penalty` and `frequency_penalty` are
    subtracted from the logits of answer tokens, as OpenAI's API reference defines them.
    `logit_bias` maps token ids to additive biases in -100..100. `logprobs` is how many likeliest
    tokens to report beside each chosen one; None reports nothing.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 512
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            kinds = (int,) if name in _INTEGERS else (int, float)
            wanted = "a whole number" if name in _INTEGERS else "a number"
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UsageError(f"{name} is {wanted}, not {value!r}.", param=name)
            if not math.isfinite(value) or not low <= value <= high:
                raise UsageError(
                    f"{name} is {wanted} from {low} to {high}, not {value}.", param=name
                )
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(
                f"logit_bias maps token ids to -100..100, not {self.logit_bias!r}.",
                param="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            if not (_is_token(token) and _is_bias(bias)):
                raise UsageError(
                    f"logit_bias maps token ids to -100..100, not {token!r} to {bias!r}.",
                    param="logit_bias",
                )

    def check_vocabulary(self, size: int) -> None:
        """UsageError for a bias of a token that a model with `size` of them does not have."""
        if wrong := [token for token in self.logit_bias if token >= size]:
            raise UsageError(
                f"logit_bias has the token id {wrong[0]}; the model's are 0 to {size - 1}.",
                param="logit_bias",
            )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_bias(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -100.0 <= value <= 100.0


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One generation as the engine sees it."""

    request_id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_ids: frozenset[int]  # sampling one of these ends the answer; the id itself is emitted
    adapter: str | None = None  # content hash of a loaded adapter; None is the base model
    adapter_scale: float = 1.0  # strength of the adapter, 0 to 2
    prompt_logprobs: bool = False  # report each prompt token's own log-probability


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of a generation; the last one of a request has `finish` or `error`.

    `logprob` and `top` (token id, log-probability) are set when the request asked for them.
    `prompt_logprobs` comes with the first token when asked for: one value for each prompt token
    but the first. `time` is when the backend made the event, in seconds of `time.perf_counter`.
    """

    request_id: int
    token_id: int | None = None
    finish: FinishReason | None = None
    error: QlorachatError | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    time: float = field(default_factory=perf_counter)


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What observers learn of a finished request; holds no text. Times are in seconds."""

    request_id: int
    model: str
    adapter: str | None
    finish_reason: FinishReason | None  # None: it ended in an error
    prompt_tokens: int
    completion_tokens: int
    first_token: float  # from submission to the first token: waiting and prefill
    decode: float  # from the first token to the last
