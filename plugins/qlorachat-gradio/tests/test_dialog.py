"""A visitor's dialog, and what a visitor's settings ask of the engine."""

from typing import Any

import gradio as gr
import pytest

from qlorachat import SamplingParams
from qlorachat_gradio.dialog import Dialog, before_last_question, shown, with_turn
from qlorachat_gradio.settings import chat_options, presets

TWO: Dialog = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@pytest.mark.parametrize(
    ("dialog", "expected"),
    [
        (TWO, (TWO[:2], "c")),
        (with_turn(TWO, "assistant", "d"), (TWO[:2], "c")),
        (TWO[:2], ([], "a")),
        ([], ([], "")),
    ],
)
def test_before_the_last_question(dialog: Dialog, expected: tuple[Dialog, str]) -> None:
    assert before_last_question(dialog) == expected


def test_a_new_turn_leaves_the_dialog_as_it_was() -> None:
    longer = with_turn(TWO, "assistant", "d")
    assert len(longer) == 4
    assert len(TWO) == 3


def test_indents_survive_the_chatbot() -> None:
    code = "    if x:\n        y"
    value = gr.Chatbot().postprocess(shown([{"role": "user", "content": code}]))
    assert value.root[0].content[0].text == code


def settings(**changed: Any) -> dict[str, Any]:
    return {
        **presets(SamplingParams()),
        "adapter": "",
        "adapter_scale": 1,
        "drop_oldest": False,
        **changed,
    }


def test_untouched_settings_ask_for_nothing() -> None:
    assert chat_options(settings(), SamplingParams()) == {
        "adapter": None,
        "adapter_scale": 1,
        "overflow": "error",
    }


def test_changed_settings_are_asked_for() -> None:
    changed = settings(
        temperature=0.0, max_tokens=9, adapter="a", adapter_scale=2, drop_oldest=True
    )
    assert chat_options(changed, SamplingParams()) == {
        "temperature": 0.0,
        "max_tokens": 9,
        "adapter": "a",
        "adapter_scale": 2,
        "overflow": "drop_oldest_turns",
    }


def test_a_cleared_number_is_the_preset() -> None:
    assert "max_tokens" not in chat_options(settings(max_tokens=None), SamplingParams())


@pytest.mark.parametrize(("preset", "chosen", "asked"), [(None, -1, None), (None, 0, 0), (7, 8, 8)])
def test_a_seed_is_asked_for_when_chosen(
    preset: int | None, chosen: int, asked: int | None
) -> None:
    options = chat_options(settings(seed=chosen), SamplingParams(seed=preset))
    assert options.get("seed") == asked
