"""A visitor's dialog as plain values: it lives with the visitor's open page and nowhere else."""

from collections.abc import Sequence
from typing import Any, TypedDict


class Turn(TypedDict):
    """One message, as the engine takes it."""

    role: str
    content: str


Dialog = list[Turn]


def with_turn(dialog: Sequence[Turn], role: str, content: str) -> Dialog:
    """The dialog and one more message."""
    return [*dialog, Turn(role=role, content=content)]


def before_last_question(dialog: Sequence[Turn]) -> tuple[Dialog, str]:
    """The dialog up to the last question, and that question; ([], "") where there is none."""
    for index in range(len(dialog) - 1, -1, -1):
        if dialog[index]["role"] == "user":
            return list(dialog[:index]), dialog[index]["content"]
    return [], ""


def shown(dialog: Sequence[Turn]) -> list[dict[str, Any]]:
    """The dialog for a Chatbot: as text parts, since it strips the indent off plain strings."""
    return [
        {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
        for turn in dialog
    ]
