"""The settings beside the chat: one control for each, preset to what the engine would do anyway."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from qlorachat import ChatEngine, SamplingParams
from qlorachat_gradio.texts import say

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")
BASE = ""  # the adapter menu's value for the base model: a menu has no None
RANDOM = -1  # the seed's value for none


def presets(sampling: SamplingParams) -> dict[str, float]:
    """What the controls show at first."""
    values = {name: getattr(sampling, name) for name in SAMPLING}
    return values if sampling.seed is not None else {**values, "seed": RANDOM}


def sampling_controls(sampling: SamplingParams, i18n: gr.I18n) -> dict[str, Any]:
    """A control for each field of SAMPLING, under its name."""
    preset = presets(sampling)

    def slider(name: str, highest: float, lowest: float = 0.0) -> gr.Slider:
        return gr.Slider(
            lowest,
            max(highest, preset[name]),
            preset[name],
            step=0.01,
            label=i18n(name),
            info=i18n(f"{name}_info"),
        )

    def number(name: str) -> gr.Number:
        return gr.Number(preset[name], precision=0, label=i18n(name), info=i18n(f"{name}_info"))

    return {
        "temperature": slider("temperature", 2.0),
        "top_p": slider("top_p", 1.0),
        "top_k": number("top_k"),
        "min_p": slider("min_p", 1.0),
        "repetition_penalty": slider("repetition_penalty", 2.0, lowest=0.5),
        "max_tokens": number("max_tokens"),
        "seed": number("seed"),
    }


def adapter_menu(engine: ChatEngine, language: str) -> gr.Dropdown:
    """The adapter menu as it is now, with the first adapter chosen."""
    names = list(engine.adapters)
    choices = [(say(language, "base"), BASE), *((name, name) for name in names)]
    return gr.Dropdown(choices=choices, value=names[0] if names else BASE)


def chat_options(settings: Mapping[str, Any], sampling: SamplingParams) -> dict[str, Any]:
    """What `engine.astream` is asked for.

    Sampling that was left as it was preset is not asked for, so that a max_tokens nobody chose
    may shrink to what the context has left.
    """
    changed = {
        name: settings[name]
        for name, preset in presets(sampling).items()
        if settings[name] not in (None, preset)
    }
    return {
        **changed,
        "adapter": settings["adapter"] or None,
        "adapter_scale": settings["adapter_scale"],
        "overflow": "drop_oldest_turns" if settings["drop_oldest"] else "error",
    }
