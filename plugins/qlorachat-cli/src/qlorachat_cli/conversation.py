"""The dialog as a value: every change makes a new one, so a failed turn leaves the old in place."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlorachat import Message


@dataclass(frozen=True, slots=True)
class Conversation:
    """What has been said, and with what the next answer is made."""

    messages: tuple[Message, ...] = ()  # user and assistant; the system prompt is apart
    system: str | None = None  # None: the engine's or the adapter's own
    adapter: str | None = None  # None: the base model
    settings: Mapping[str, Any] = field(default_factory=dict)  # only what /set changed
    name: str | None = None  # under which it was saved or loaded last

    @property
    def dialog(self) -> tuple[Message, ...]:
        """The messages as the engine takes them."""
        system = (Message("system", self.system),) if self.system else ()
        return (*system, *self.messages)

    @property
    def last_question(self) -> str | None:
        """What the user said last."""
        questions = (m.content for m in reversed(self.messages) if m.role == "user")
        return next(questions, None)

    def asked(self, question: str) -> "Conversation":
        """With one more user turn."""
        return replace(self, messages=(*self.messages, Message("user", question)))

    def answered(self, answer: str) -> "Conversation":
        """With one more answer."""
        return replace(self, messages=(*self.messages, Message("assistant", answer)))

    def without_answer(self) -> "Conversation":
        """Without what follows the last user turn."""
        return replace(self, messages=self.messages[: self._last_turn() + 1])

    def without_turn(self) -> "Conversation":
        """Without the last user turn and what follows it."""
        return replace(self, messages=self.messages[: max(self._last_turn(), 0)])

    def _last_turn(self) -> int:
        """The index of the last user message; -1 without one."""
        turns = [index for index, m in enumerate(self.messages) if m.role == "user"]
        return turns[-1] if turns else -1


@dataclass(frozen=True, slots=True)
class Draft:
    """Text put into the entry line, and the dialog that it continues when it is sent."""

    text: str
    base: Conversation
