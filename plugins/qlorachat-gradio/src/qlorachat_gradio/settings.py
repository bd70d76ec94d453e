"""The settings beside the chat: one control for each, preset to what the engine would do anyway."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from qlorachat import ChatEngine, ModelInfo, SamplingParams
from qlorachat_gradio.texts import say

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")
BASE = ""  # the adapter menu's value for the base model: a menu has no None


def sampling_controls(info: ModelInfo, i18n: gr.I18n) -> dict[str, Any]:
    """A control for each field of SAMPLING, under its name."""
    preset = info.sampling

    def slider(name: str, highest: float, lowest: float = 0.0) -> gr.Slider:
        return gr.Slider(
            lowest,
            max(highest, getattr(preset, name)),
            getattr(preset, name),
            step=0.01,
            label=i18n(name),
            info=i18n(f"{name}_info"),
        )

    def number(name: str) -> gr.Number:
        return gr.Number(
            getattr(preset, name),
            precision=0,
            label=i18n(name),
            info=i18n(f"{name}_info"),
            placeholder=i18n("seed_hint"),
        )

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


def chat_options(settings: Mapping[str, Any], preset: SamplingParams) -> dict[str, Any]:
    """What `engine.astream` is asked for.

    Sampling that was left as it was preset is not asked for, so that a max_tokens nobody chose
    may shrink to what the context has left.
    """
    changed = {
        name: settings[name]
        for name in SAMPLING
        if settings[name] is not None and settings[name] != getattr(preset, name)
    }
    return {
        **changed,
        "adapter": settings["adapter"] or None,
        "adapter_scale": settings["adapter_scale"],
        "overflow": "drop_oldest_turns" if settings["drop_oldest"] else "error",
    }
