"""Segments become token ids: control tokens by name, all other text as plain text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

from qlorachat.config import Tags
from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Template, Tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")

_Token = tuple[int, bool]  # an id, and whether it is trained


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered dialog: its text with control tokens written out, and its ids.

    `trained` has one mark for each id: whether a model learns to say it.
    """

    text: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]


@runtime_checkable
class ChecksTokenizer(Protocol):
    """What a template may offer besides `render`: a look at the tokenizer before it is used."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DialogError when the ids would not be those that the format's models know."""
        ...


def build_prompt(
    template: Template,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tags: Tags = "refuse",
    add_generation_prompt: bool = True,
) -> Prompt:
    """The dialog in the template's format, for this tokenizer.

    Neighbouring pieces of plain text are encoded as one, between the control tokens beside it;
    where the first piece says so, as the start of a text. A token is trained when all the text it
    covers is. Raises DialogError for contents that hold the format's plain-text tags (unless
    `tags` is "allow"), for a dialog that the format has no place for, and for a template that does
    not fit the tokenizer.
    """
    _check_contents(messages, () if tags == "allow" else template.reserved, template.name)
    if isinstance(template, ChecksTokenizer):
        template.check_tokenizer(tokenizer)
    segments = template.render(messages, add_generation_prompt=add_generation_prompt)
    _check_controls(segments, tokenizer, template.name)
    tokens: list[_Token] = []
    runs = [list(run) for _, run in groupby(segments, key=lambda segment: segment.control)]
    for i, run in enumerate(runs):
        if run[0].control:
            tokens += _encode_controls(run, tokenizer)
        else:
            after = runs[i - 1][-1].text if i and not run[0].first else None
            before = runs[i + 1][0].text if i + 1 < len(runs) else None
            tokens += _encode_text(run, tokenizer, after, before)
    return Prompt(
        text="".join(segment.text for segment in segments),
        ids=tuple(token_id for token_id, _ in tokens),
        trained=tuple(trained for _, trained in tokens),
    )


def _check_contents(messages: Sequence[Message], reserved: Sequence[str], name: str) -> None:
    for index, message in enumerate(messages):
        if tag := next((tag for tag in reserved if tag in message.content), None):
            raise DialogError(
                f"messages[{index}] holds {tag}, which the template {name} reads as control text: "
                "take it out, or allow it with --tags allow (in code, tags='allow').",
                param="messages",
            )
        if _SURROGATE.search(message.content):
            raise DialogError(
                f"messages[{index}] holds half of a surrogate pair, which is no character: send "
                "the text as valid Unicode.",
                param="messages",
            )


def _check_controls(segments: Sequence[Segment], tokenizer: Tokenizer, name: str) -> None:
    controls = tokenizer.control_tokens
    if missing := next((s.text for s in segments if s.control and s.text not in controls), None):
        raise DialogError(
            f"The template {name} doesn't fit this tokenizer, which has no control token "
            f"{missing}: choose another with --template (in code, template=).",
            param="template",
        )


def _encode_controls(run: Sequence[Segment], tokenizer: Tokenizer) -> list[_Token]:
    return [(tokenizer.control_tokens[segment.text], segment.trained) for segment in run]


def _encode_text(
    run: Sequence[Segment], tokenizer: Tokenizer, after: str | None, before: str | None
) -> list[_Token]:
    text = "".join(segment.text for segment in run)
    ids, spans = tokenizer.encode(text, after=after, before=before)
    # one byte a character, 1 where it is trained
    marks = b"".join(bytes([segment.trained]) * len(segment.text) for segment in run)
    return [
        (token_id, start < end and 0 not in marks[start:end])
        for token_id, (start, end) in zip(ids, spans, strict=True)
    ]
