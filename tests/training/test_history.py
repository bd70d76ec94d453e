"""A run's history reads back as it was written, or says what is damaged."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorachat.errors import ConfigError
from qlorachat.training.history import Chat, Evaluation, History, Step

finite = st.floats(allow_nan=False, allow_infinity=False)
count = st.integers(0, 2**62)
steps = st.lists(
    st.builds(
        Step,
        step=count,
        epoch=finite,
        loss=finite,
        learning_rate=finite,
        grad_norm=st.floats(allow_nan=False),
        tokens=count,
        seconds=finite,
        memory=count,
    ),
    unique_by=lambda step: step.step,
).map(lambda items: sorted(items, key=lambda step: step.step))
text = st.text(st.characters(codec="utf-8"))
histories = st.builds(
    History,
    steps,
    st.lists(st.builds(Evaluation, count, finite)),
    st.lists(st.builds(Chat, count, text, text, text)),
)


def step(number: int, loss: float = 1.5) -> Step:
    return Step(number, number / 10, loss, 2e-4, 0.3, 100 * number, 2.0 * number, 2**30)


def history() -> History:
    return History(
        [step(1), step(2), step(3)],
        [Evaluation(0, 1.0), Evaluation(1, 3.0), Evaluation(2, 2.0), Evaluation(3, 2.0)],
        [Chat(0, "誰?", "AIです。", "AIです。"), Chat(3, "誰?", "AIです。", "ぼくなのだ。")],
    )


@given(histories)
def test_reads_back_equal(written: History) -> None:
    assert History.from_json(written.to_json()) == written


def test_overflown_gradients_are_kept_in_plain_json() -> None:
    written = History([Step(1, 0.1, 1.5, 2e-4, float("inf"), 100, 2.0, 2**30)])
    json.loads(written.to_json(), parse_constant=pytest.fail)
    assert History.from_json(written.to_json()) == written


def test_the_best_is_the_first_of_the_lowest_after_a_step() -> None:
    assert history().best == Evaluation(2, 2.0)
    assert History(evaluations=[Evaluation(0, 1.0)]).best is None


def changed(**keys: Any) -> str:
    return json.dumps(json.loads(history().to_json()) | keys)


@pytest.mark.parametrize(
    ("damaged", "finding"),
    [
        ("", "JSON"),
        (history().to_json()[:-20], "JSON"),
        ("[]", "object"),
        ("{}", "version"),
        (changed(version=2), "version"),
        (changed(surprise=1), "surprise"),
        (changed(evaluations=[{"step": 1}]), "evaluations.0.loss"),
        (changed(evaluations=[{"step": -1, "loss": 1.0}]), "evaluations.0.step"),
        (changed(evaluations=[{"step": 1, "loss": "NaN"}]), "evaluations.0.loss"),
        (history().to_json().replace('"step":3,"epoch"', '"step":2,"epoch"'), "step 2"),
    ],
)
def test_damage_is_one_clear_line(damaged: str, finding: str) -> None:
    with pytest.raises(ConfigError) as caught:
        History.from_json(damaged)
    message = str(caught.value)
    assert finding in message
    assert "history.json" in message
    assert "--resume" in message
    assert "\n" not in message
