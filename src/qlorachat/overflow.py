"""Dialogs and answers longer than the context: refused with both counts, or without old turns."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace

from qlorachat.errors import ContextOverflow
from qlorachat.generation import NOTHING_DROPPED, Dropped
from qlorachat.messages import Message
from qlorachat.templates import Prompt
from qlorachat.tokens import SamplingParams


def fit_context(
    sampling: SamplingParams, prompt_tokens: int, context_length: int, *, asked: bool
) -> SamplingParams:
    """Refuse what the context can't hold; a max_tokens that nobody asked for shrinks."""
    room = context_length - prompt_tokens
    wanted = sampling.max_tokens if asked else 1
    if room < wanted:
        raise ContextOverflow(prompt_tokens, wanted, context_length)
    return replace(sampling, max_tokens=min(sampling.max_tokens, room))


def drop_oldest_turns(
    dialog: Sequence[Message],
    whole: Prompt,
    render: Callable[[Sequence[Message]], Prompt],
    room: int,
) -> tuple[Prompt, Dropped]:
    """The dialog without as few of its oldest user-assistant pairs as makes it fit `room` tokens.

    The system message and the last user turn always stay.
    """
    first = 1 if dialog and dialog[0].role == "system" else 0
    pairs = (len(dialog) - first - 1) // 2
    if len(whole.ids) <= room or pairs == 0:
        return whole, NOTHING_DROPPED

    def without(count: int) -> Prompt:
        return render([*dialog[:first], *dialog[first + 2 * count :]])

    counts = range(1, pairs + 1)
    fewest = bisect.bisect_left(counts, True, key=lambda n: len(without(n).ids) <= room)
    count = counts[min(fewest, pairs - 1)]
    prompt = without(count)
    indexes = tuple(range(first, first + 2 * count))
    return prompt, Dropped(indexes, len(whole.ids) - len(prompt.ids))
