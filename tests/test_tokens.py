"""SamplingParams takes what it says and names the field that is wrong."""

import math
from typing import Any

import pytest

from qlorachat.errors import UsageError
from qlorachat.tokens import SamplingParams

WRONG: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", 1e308),
    ("top_p", 1.1),
    ("top_k", -1),
    ("top_k", 1.5),
    ("min_p", 2),
    ("repetition_penalty", 0.0),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -math.inf),
    ("max_tokens", 0),
    ("max_tokens", 2**63),
    ("seed", 2**63),
    ("seed", "1"),
    ("logprobs", 21),
    ("logit_bias", {5: 101}),
    ("logit_bias", {"5": 1}),
    ("logit_bias", {5: "1"}),
    ("logit_bias", {5: True}),
    ("logit_bias", {True: 1}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", None),
    ("logit_bias", [5]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_field(name: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_edges_of_every_range_are_allowed() -> None:
    SamplingParams(
        temperature=0, top_p=1, top_k=0, min_p=0, max_tokens=1, seed=-(2**63), logprobs=0
    )
    SamplingParams(temperature=2.0, top_p=0.0, min_p=1.0, seed=2**63 - 1, logprobs=20)
