"""What a template writes around contents, found by rendering random stand-ins in their place."""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlorachat.messages import Message
from qlorachat.protocols import Segment

Skeleton = tuple[str | int, ...]  # the template's own text, and indexes of messages


@dataclass(frozen=True, slots=True)
class StandIns:
    """Random words for the contents of a dialog.

    `contents` are the messages' with the whitespace around them kept, so that a template may strip
    them; blank ones stay as they are. `indexes` says which message a word stands for.
    """

    contents: tuple[str, ...]
    indexes: dict[str, int]

    @classmethod
    def make(cls, messages: Sequence[Message]) -> "StandIns":
        """New words for the messages."""
        words = [secrets.token_hex(16) for _ in messages]
        cores = [message.content.strip() for message in messages]
        return cls(
            tuple(
                message.content.replace(core, word, 1) if core else message.content
                for message, core, word in zip(messages, cores, words, strict=True)
            ),
            {words[index]: index for index, core in enumerate(cores) if core},
        )

    def skeleton(self, rendering: str) -> Skeleton:
        """The rendering with its words as the indexes of their messages."""
        if not self.indexes:
            return (rendering,)
        parts = re.split(f"({'|'.join(self.indexes)})", rendering)
        return tuple(self.indexes.get(part, part) for part in parts)


def fill(skeleton: Skeleton, messages: Sequence[Message]) -> str:
    """The skeleton with the real contents in their places."""
    return "".join(_text(part, messages) for part in skeleton)


def split_controls(text: str, controls: re.Pattern[str]) -> list[Segment]:
    """The text in segments, control tokens apart; `controls` has one group, around all of it."""
    parts = controls.split(text)
    return [Segment(part, control=bool(index % 2)) for index, part in enumerate(parts)]


def to_segments(
    skeleton: Skeleton, messages: Sequence[Message], controls: re.Pattern[str]
) -> list[Segment]:
    """The filled skeleton in segments: control tokens in the template's text only.

    An answer is trained, with the spaces right before it (many a tokenizer fuses them with its
    first word) and all that follows it up to the next control token in the same text.
    """
    segments: list[Segment] = []
    neighbours = zip(("", *skeleton[:-1]), skeleton, (*skeleton[1:], ""), strict=True)
    for before, part, after in neighbours:
        if isinstance(part, int):
            segments.append(Segment(_text(part, messages), trained=_is_answer(part, messages)))
            continue
        pieces = split_controls(part, controls)
        if _is_answer(before, messages):
            pieces = _train_end(pieces)
        if _is_answer(after, messages):
            pieces = _train_spaces(pieces)
        segments += pieces
    return [segment for segment in segments if segment.text]


def _text(part: str | int, messages: Sequence[Message]) -> str:
    return messages[part].content.strip() if isinstance(part, int) else part


def _is_answer(part: str | int, messages: Sequence[Message]) -> bool:
    return isinstance(part, int) and messages[part].role == "assistant"


def _train_end(pieces: list[Segment]) -> list[Segment]:
    """Train the first control token and the text before it, if there is one."""
    end = next((index + 1 for index, piece in enumerate(pieces) if piece.control), 0)
    return [replace(piece, trained=True) for piece in pieces[:end]] + pieces[end:]


def _train_spaces(pieces: list[Segment]) -> list[Segment]:
    """Train the spaces at the end of the last piece, which is plain text."""
    *rest, last = pieces
    stem = last.text.rstrip(" ")
    return [*rest, replace(last, text=stem), Segment(last.text[len(stem) :], trained=True)]
