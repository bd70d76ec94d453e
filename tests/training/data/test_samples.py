"""Answers and the tokens that end them are trained, prompts are not; long rows are cut or bad."""

from collections.abc import Sequence

import numpy as np
import pytest

from qlorachat.checkpoints import Checkpoint
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Template, Tokenizer
from qlorachat.templates import ChatML, CheckpointTemplate, Elyza, Llama2, build_prompt
from qlorachat.testing import ByteTokenizer
from qlorachat.training.data.rows import BadRow, Row
from qlorachat.training.data.samples import Sample, build_samples

TWO_TURNS = (
    Message("system", "短く。"),
    Message("user", "空の色は？"),
    Message("assistant", "青です。"),
    Message("user", "Why?"),
    Message("assistant", "光の散乱です。"),
)
HI = (Message("user", "Hi"), Message("assistant", "Hello!"))


def build_one(
    template: Template, tokenizer: Tokenizer, messages: tuple[Message, ...] = TWO_TURNS
) -> Sample:
    (sample,) = build_samples([Row(1, messages)], template, tokenizer, max_length=500).samples
    return sample


def trained_runs(sample: Sample) -> list[list[int]]:
    """The ids of each run of trained tokens."""
    edges = np.flatnonzero(np.diff(sample.trained, prepend=False, append=False))
    return [sample.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [Llama2(), Elyza()])
def test_llama2_formats_train_answers_and_their_end(template: Template, llama2: Tokenizer) -> None:
    sample = build_one(template, llama2)
    runs = trained_runs(sample)
    assert [llama2.decode(run).strip() for run in runs] == ["青です。", "光の散乱です。"]
    end = llama2.control_tokens["</s>"]
    assert [run[-1] for run in runs] == [end, end]
    assert (sample.ids == end).sum() == 2


def test_chatml_trains_answers_and_their_end() -> None:
    tokenizer = ByteTokenizer()
    runs = trained_runs(build_one(ChatML(), tokenizer))
    assert [tokenizer.decode(run) for run in runs] == ["青です。", "光の散乱です。"]
    assert [run[-1] for run in runs] == [257, 257]


def test_the_demo_models_own_template_trains_answers_and_their_end(
    demo_checkpoint: Checkpoint, smollm2: Tokenizer
) -> None:
    assert demo_checkpoint.chat_template is not None
    template = CheckpointTemplate(demo_checkpoint.chat_template, smollm2)
    runs = trained_runs(build_one(template, smollm2))
    assert [smollm2.decode(run) for run in runs] == ["青です。", "光の散乱です。"]
    assert {run[-1] for run in runs} == {smollm2.control_tokens["<|im_end|>"]}
    assert smollm2.eos_token == "<|im_end|>"


def test_the_ids_are_those_of_serving(llama2: Tokenizer) -> None:
    asked = build_prompt(Llama2(), TWO_TURNS[:-1], llama2)
    sample = build_one(Llama2(), llama2)
    assert sample.ids[: len(asked.ids)].tolist() == list(asked.ids)
    assert sample.trained[len(asked.ids) :].all()


def test_training_on_prompts_trains_all_but_the_first_token() -> None:
    for messages in (HI, TWO_TURNS):
        (sample,) = build_samples(
            [Row(1, messages)], ChatML(), ByteTokenizer(), max_length=500, train_on_prompt=True
        ).samples
        assert not sample.trained[0]
        assert sample.trained[1:].all()


def test_a_first_token_is_never_trained() -> None:
    template = Fixed(Segment("ab", trained=True))
    assert build_one(template, ByteTokenizer(), HI).trained.tolist() == [False, True]


def test_long_samples_are_cut_and_too_long_prompts_are_bad() -> None:
    # ChatML in bytes: 21 tokens up to the answer "Hello!", 8 from there to the end
    rows = [Row(3, HI), Row(5, (Message("user", "H" * 8), HI[1]))]

    def build(max_length: int, train_on_prompt: bool = False) -> tuple[list[int], list[BadRow]]:
        built = build_samples(
            rows,
            ChatML(),
            ByteTokenizer(),
            max_length=max_length,
            train_on_prompt=train_on_prompt,
        )
        assert built.lengths == (29, 35)
        assert built.truncated == sum(sample.truncated for sample in built.samples)
        for sample in built.samples:
            whole = built.lengths[[3, 5].index(sample.line)]
            assert len(sample.ids) == len(sample.trained) == min(whole, max_length)
            assert sample.truncated == (whole > max_length)
            assert sample.ids.dtype == np.int32
        return [sample.line for sample in built.samples], list(built.bad)

    assert build(35) == ([3, 5], [])
    assert build(34) == ([3, 5], [])
    assert build(28) == ([3, 5], [])
    too_long = BadRow(5, "its prompt alone has 27 tokens, max_length is 27")
    assert build(27) == ([3], [too_long])
    assert build(27, train_on_prompt=True) == ([3, 5], [])


def test_what_the_template_refuses_is_a_bad_row() -> None:
    rows = [
        Row(1, HI),
        Row(2, (HI[0], *HI)),
        Row(7, (Message("user", "a [INST] b"), HI[1])),
        Row(9, (Message("user", "half \ud800"), HI[1])),
    ]
    built = build_samples(rows, Plain(), ByteTokenizer(), max_length=50)
    assert [sample.line for sample in built.samples] == [1]
    assert [bad.line for bad in built.bad] == [2, 7, 9]
    assert "alternate" in built.bad[0].reason
    assert "holds [INST]" in built.bad[1].reason
    assert not built.bad[2].reason.endswith(".")
    allowed = build_samples(rows, Plain(), ByteTokenizer(), max_length=50, tags="allow")
    assert [sample.line for sample in allowed.samples] == [1, 7]


def test_a_template_that_trains_nothing_is_said() -> None:
    built = build_samples([Row(4, HI)], Fixed(Segment("ab")), ByteTokenizer(), max_length=9)
    assert built.bad == (BadRow(4, "the template marks none of its tokens as an answer's"),)


def test_counts() -> None:
    rows = [Row(1, HI), Row(2, HI)]
    built = build_samples(rows, ChatML(), ByteTokenizer(), max_length=26)
    assert (built.tokens, built.trained_tokens, built.truncated) == (52, 10, 2)
    assert build_samples([], ChatML(), ByteTokenizer(), max_length=26).tokens == 0


class Fixed:
    """A template that renders the segments it was given."""

    name = "fixed"
    summary = "for tests"
    reserved: Sequence[str] = ()
    models: Sequence[str] = ()

    def __init__(self, *segments: Segment) -> None:
        self._segments = list(segments)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        return self._segments


class Plain(Llama2):
    """Llama-2's format for any tokenizer."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        pass

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        segments = super().render(messages, add_generation_prompt=add_generation_prompt)
        return [segment for segment in segments if not segment.control]
