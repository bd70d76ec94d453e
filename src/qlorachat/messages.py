"""Text nouns: what goes into a chat and what comes out; no token ids are decided here."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from qlorachat.errors import DialogError
from qlorachat.tokens import FinishReason

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog."""

    role: Role
    content: str

    @classmethod
    def parse(cls, value: "Message | Mapping[str, object]") -> "Message":
        """A message from a `{"role", "content"}` mapping; DialogError says what is wrong."""
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            raise DialogError(f"A message is a role and a content, not {type(value).__name__}.")
        role, content = value.get("role"), value.get("content")
        if role not in get_args(Role):
            raise DialogError(
                f"A message's role is one of {', '.join(get_args(Role))}, not {role!r}."
            )
        if not isinstance(content, str):
            raise DialogError(
                f"A message's content is text, not {type(content).__name__} (role {role})."
            )
        return cls(cast(Role, role), content)


def parse_messages(
    messages: "str | Iterable[Message | Mapping[str, object]]",
) -> tuple[Message, ...]:
    """A dialog from messages or mappings; a plain string is one user turn."""
    if isinstance(messages, str):
        return (Message("user", messages),)
    if not isinstance(messages, Iterable):
        raise DialogError(f"A dialog is text or a list of messages, not {messages!r}.")
    return tuple(Message.parse(message) for message in messages)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token as text with its natural-log probability, and the likeliest in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer that is safe to show: never a broken character or part of a stop."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """A text's tokens, and the natural-log probability of each but the first."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; 1.0 for a text of one token."""
        mean = sum(self.logprobs) / len(self.logprobs) if self.logprobs else 0.0
        return math.exp(-mean)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `dropped` ones are of old turns left out to fit the context."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_dropped: int = 0
    dropped_messages: tuple[int, ...] = ()  # indexes into the dialog as it was given


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds: from submission to the first token, and from there to the last."""

    first_token: float
    decode: float
    completion_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Decode rate: tokens after the first over the time since it; 0.0 for less than two."""
        return (self.completion_tokens - 1) / self.decode if self.decode > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; `finish_reason` is the real cause, not a count."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    adapter: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
