"""Rows become token ids by the template that serves the model, each with its trained marks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlorachat.config import Tags
from qlorachat.errors import DialogError
from qlorachat.protocols import Template, Tokenizer
from qlorachat.templates import Prompt, build_prompt
from qlorachat.training.data.formats import clause
from qlorachat.training.data.rows import BadRow, Row


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A dialog's token ids and, for each, whether a model learns to say it; the first never is."""

    line: int
    ids: npt.NDArray[np.int32]  # (tokens)
    trained: npt.NDArray[np.bool_]  # (tokens)
    truncated: bool  # its end was cut off


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of some rows, in their order, and the rows that gave none."""

    samples: tuple[Sample, ...] = ()
    bad: tuple[BadRow, ...] = ()
    lengths: tuple[int, ...] = ()  # tokens of whole dialogs, also of those cut or too long

    @property
    def tokens(self) -> int:
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def trained_tokens(self) -> int:
        return sum(int(sample.trained.sum()) for sample in self.samples)

    @property
    def truncated(self) -> int:
        """How many samples were cut."""
        return sum(sample.truncated for sample in self.samples)


def build_samples(
    rows: Sequence[Row],
    template: Template,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    tags: Tags = "refuse",
) -> Samples:
    """A sample for each row, cut at its end to `max_length` tokens.

    Answers are trained with the tokens that end them; with `train_on_prompt` everything is but the
    first token, which nothing predicts. A row is bad when the template has no place for it, or
    when the cut leaves no trained token.
    """
    samples: list[Sample] = []
    bad: list[BadRow] = []
    lengths: list[int] = []
    for row in rows:
        try:
            prompt = build_prompt(
                template, row.messages, tokenizer, tags=tags, add_generation_prompt=False
            )
        except DialogError as error:
            bad.append(BadRow(row.line, clause(error)))
            continue
        lengths.append(len(prompt.ids))
        sample = _cut(row.line, prompt, max_length, train_on_prompt)
        if sample.trained.any():
            samples.append(sample)
        else:
            bad.append(BadRow(row.line, _why_untrained(prompt, max_length)))
    return Samples(tuple(samples), tuple(bad), tuple(lengths))


def _cut(line: int, prompt: Prompt, max_length: int, train_on_prompt: bool) -> Sample:
    ids = np.array(prompt.ids[:max_length], np.int32)
    trained = np.array(prompt.trained[:max_length], np.bool_) | train_on_prompt
    trained[:1] = False
    return Sample(line, ids, trained, truncated=len(prompt.ids) > max_length)


def _why_untrained(prompt: Prompt, max_length: int) -> str:
    if True not in prompt.trained[1:]:
        return "the template marks none of its tokens as an answer's"
    return (
        f"its prompt alone has {prompt.trained.index(True, 1)} tokens, max_length is {max_length}"
    )
