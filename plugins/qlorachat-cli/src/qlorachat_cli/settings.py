"""What /set takes: every field of SamplingParams and two request options, each checked at once."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, get_args

from qlorachat import EngineConfig, SamplingParams
from qlorachat.errors import UnknownName, UsageError

DEFAULT = "default"  # the word that takes a setting back

SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
OVERFLOW = get_args(EngineConfig.model_fields["overflow"].annotation)


def change(settings: Mapping[str, Any], assignments: str, vocab_size: int) -> dict[str, Any]:
    """The settings after `temperature=0.2 seed=default`; UsageError names what is wrong."""
    changed = dict(settings)
    for assignment in re.split(r"\s+(?=\w+\s*=)", assignments.strip()):
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not text:
            raise UsageError(f"Write a setting as name=value, not `{assignment}`.")
        if text == DEFAULT:
            changed.pop(_known(name), None)
        else:
            changed[name] = checked(name, _value(text))
            if name == "logit_bias":
                SamplingParams(logit_bias=changed[name]).check_vocabulary(vocab_size)
    return changed


def checked(name: str, value: Any) -> Any:
    """The value in the form that the engine takes; UnknownName or UsageError when it takes none."""
    if _known(name) in _CHECKS:
        return _CHECKS[name](value)
    SamplingParams(**{name: value})
    return value


def in_force(settings: Mapping[str, Any], defaults: SamplingParams) -> dict[str, Any]:
    """Every setting with the value that the next answer is made with."""
    values = {name: getattr(defaults, name) for name in SAMPLING_FIELDS}
    return {**values, **settings}


def _known(name: str) -> str:
    if name not in NAMES:
        raise UnknownName("setting", name, NAMES)
    return name


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _adapter_scale(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
        raise UsageError(f"adapter_scale is a number from 0 to 2, not {value!r}.")
    return float(value)


def _overflow(value: Any) -> str:
    if value not in OVERFLOW:
        raise UsageError(f"overflow is one of {', '.join(OVERFLOW)}, not {value!r}.")
    return str(value)


def _logit_bias(value: Any) -> dict[int, float]:
    try:
        biases = {int(token): float(bias) for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise UsageError(
            f'logit_bias maps token ids to -100..100, as {{"17": -5}}, not {value!r}.'
        ) from None
    SamplingParams(logit_bias=biases)
    return biases


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "adapter_scale": _adapter_scale,
    "overflow": _overflow,
    "logit_bias": _logit_bias,
}
NAMES = tuple(dict.fromkeys((*SAMPLING_FIELDS, *_CHECKS)))
