"""/set: every field, its form, and one line for what is wrong."""

import math
from typing import Any

import pytest

from qlorachat import SamplingParams
from qlorachat.errors import UsageError
from qlorachat_cli.settings import NAMES, SAMPLING_FIELDS, change, checked, in_force

VOCABULARY = 258

VALUES = {
    "temperature": ("0.2", 0.2),
    "top_p": ("1", 1),
    "top_k": ("40", 40),
    "min_p": ("0.05", 0.05),
    "repetition_penalty": ("1.1", 1.1),
    "presence_penalty": ("-0.5", -0.5),
    "frequency_penalty": ("2.0", 2.0),
    "max_tokens": ("64", 64),
    "seed": ("none", None),
    "logit_bias": ('{"17": -5}', {17: -5.0}),
    "logprobs": ("3", 3),
    "adapter_scale": ("0.5", 0.5),
    "overflow": ("drop_oldest_turns", "drop_oldest_turns"),
}


def test_every_sampling_field_is_a_setting() -> None:
    assert set(SAMPLING_FIELDS) <= set(NAMES) == set(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_is_set_and_taken_back(name: str) -> None:
    text, value = VALUES[name]
    settings = change({}, f"{name}={text}", VOCABULARY)
    assert settings == {name: value}
    assert change(settings, f"{name}=default", VOCABULARY) == {}


@pytest.mark.parametrize(
    ("assignments", "settings"),
    [
        ("temperature=0.2 top_k=40", {"temperature": 0.2, "top_k": 40, "seed": 1}),
        ('logit_bias={"5": 1, "6": 2} seed=2', {"logit_bias": {5: 1.0, 6: 2.0}, "seed": 2}),
        ("temperature = 1", {"temperature": 1, "seed": 1}),
    ],
)
def test_several_at_once(assignments: str, settings: dict[str, Any]) -> None:
    assert change({"seed": 1}, assignments, VOCABULARY) == settings


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ("temperature", "Write a setting as name=value, not `temperature`."),
        ("temperature=", "Write a setting as name=value, not `temperature=`."),
        ("temprature=1", "The setting `temprature` does not exist; did you mean `temperature`?"),
        ("temprature=default", "did you mean `temperature`?"),
        ("temperature=hot", "temperature is a number, not 'hot'."),
        ("temperature=9", "temperature is a number from 0.0 to 2.0, not 9."),
        ("temperature=NaN", "temperature is a number from 0.0 to 2.0, not nan."),
        ("temperature=none", "temperature is a number, not None."),
        ("top_k=1.5", "top_k is a whole number, not 1.5."),
        ("max_tokens=true", "max_tokens is a whole number, not True."),
        ("logit_bias=5", "logit_bias maps token ids to"),
        ('logit_bias={"a": 1}', "logit_bias maps token ids to"),
        ('logit_bias={"1": 500}', "logit_bias maps token ids to"),
        ('logit_bias={"1": 5, "258": 5}', "the token id 258; the model's are 0 to 257."),
        ("adapter_scale=3", "adapter_scale is a number from 0 to 2, not 3."),
        ("overflow=maybe", "overflow is one of error, drop_oldest_turns, not 'maybe'."),
        ("overflow=[1]", "overflow is one of error, drop_oldest_turns, not [1]."),
    ],
)
def test_what_is_wrong_is_one_line(assignments: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        change({}, assignments, VOCABULARY)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_failed_change_changes_nothing() -> None:
    settings = {"seed": 1}
    with pytest.raises(UsageError):
        change(settings, "seed=2 temperature=9", VOCABULARY)
    assert settings == {"seed": 1}


def test_in_force_adds_the_defaults() -> None:
    values = in_force({"overflow": "error", "seed": 3}, SamplingParams(temperature=0.1))
    assert (values["temperature"], values["seed"], values["overflow"]) == (0.1, 3, "error")


def test_saved_values_are_checked_like_typed_ones() -> None:
    assert checked("logit_bias", {"3": 1}) == {3: 1.0}
    with pytest.raises(UsageError):
        checked("temperature", math.inf)
