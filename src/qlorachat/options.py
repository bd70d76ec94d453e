"""What an engine and a request take by keyword, and the checks that no type can make."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, get_args

from qlorachat.config import BackendChoice, CacheChoice, Overflow, QuantizationChoice, Tags
from qlorachat.errors import UsageError, suggest
from qlorachat.tokens import SamplingParams


class EngineOptions(TypedDict, total=False):
    """What `ChatEngine(...)` takes beside the model; see EngineConfig."""

    adapters: Mapping[str, str | Path]
    revision: str | None
    offline: bool
    device: str
    quantization: QuantizationChoice
    backend: BackendChoice
    memory: str | None
    kv_cache: CacheChoice
    max_sequences: int
    max_adapters: int
    template: str | None
    system: str | None
    overflow: Overflow
    tags: Tags
    max_queue: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    max_tokens: int | None
    seed: int | None


class ChatOptions(TypedDict, total=False):
    """What one request may say; see SamplingParams for the numbers and their ranges."""

    adapter: str | None  # the name of a loaded adapter; None is the base model
    adapter_scale: float  # strength, 0 to 2
    stop: str | Sequence[str]  # strings that end the answer and are not part of it
    overflow: Overflow
    tags: Tags
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    seed: int | None
    logit_bias: Mapping[int, float]
    logprobs: int | None


_NO_SAMPLING = {"adapter", "adapter_scale", "stop", "overflow", "tags"}
_CHOICES = {"overflow": get_args(Overflow), "tags": get_args(Tags)}


def check_options(options: ChatOptions) -> None:
    """UsageError for an option that does not exist, or one of a few words that is another."""
    for name, value in options.items():
        if name not in ChatOptions.__annotations__:
            raise UsageError(
                f"There is no option `{name}`{suggest(name, ChatOptions.__annotations__)}",
                param=name,
            )
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{name} is {' or '.join(_CHOICES[name])}, not {value!r}.", param=name)


def request_sampling(defaults: SamplingParams, options: ChatOptions) -> SamplingParams:
    """The defaults with what a request asks for."""
    asked: dict[str, Any] = {k: v for k, v in options.items() if k not in _NO_SAMPLING}
    return replace(defaults, **asked)


def stop_strings(options: ChatOptions) -> tuple[str, ...]:
    """The strings that end the answer."""
    stop: object = options.get("stop", ())
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or any(
        not isinstance(string, str) or not string for string in strings
    ):
        raise UsageError("stop is a string or a list of strings, none of them empty.", param="stop")
    return tuple(strings)


def adapter_scale(options: ChatOptions) -> float:
    """The adapter's strength, 0 to 2."""
    scale = options.get("adapter_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0.0 <= scale <= 2.0:
        raise UsageError(
            f"adapter_scale is a number from 0 to 2, not {scale!r}.", param="adapter_scale"
        )
    return float(scale)
