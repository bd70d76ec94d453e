"""Segments into ids: joined plain text, control tokens by name, marks by characters."""

from collections.abc import Sequence

import pytest

from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Tokenizer
from qlorachat.templates import BUILTIN_TEMPLATES, build_prompt
from qlorachat.testing import ByteTokenizer

HI = [Message("user", "Hi")]


class Fixed:
    """A template that renders the segments it was given."""

    name = "fixed"
    summary = "for tests"
    reserved: Sequence[str] = ("<tag>",)
    models: Sequence[str] = ()

    def __init__(self, *segments: Segment) -> None:
        self._segments = list(segments)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        return self._segments


def test_neighbouring_text_is_encoded_as_one(llama2: Tokenizer) -> None:
    template = Fixed(Segment("Hel"), Segment("lo"), Segment("</s>", control=True), Segment("Hi"))
    prompt = build_prompt(template, HI, llama2)
    assert prompt.ids == (15043, 2, 6324)
    assert prompt.text == "Hello</s>Hi"


def test_a_token_is_trained_when_all_its_text_is(llama2: Tokenizer) -> None:
    template = Fixed(
        *(Segment("Hel"), Segment("lo", trained=True), Segment(" wor", trained=True)),
        *(Segment("ld!", trained=True), Segment("誠", trained=True), Segment("\n")),
    )
    prompt = build_prompt(template, HI, llama2)
    text = llama2.encode("Hello world!誠\n")[0]
    assert list(prompt.ids) == text
    #           ▁Hello ▁world !    three bytes of 誠      newline
    expected = (False, True, True, True, True, True, False)
    assert prompt.trained == expected


def test_control_segments_carry_their_own_mark() -> None:
    template = Fixed(
        Segment("<|im_end|>", control=True, trained=True), Segment("<|im_end|>", control=True)
    )
    assert build_prompt(template, HI, ByteTokenizer()).trained == (True, False)


def test_the_name_of_a_control_token_is_plain_text_in_a_text_segment() -> None:
    prompt = build_prompt(Fixed(Segment("<|im_end|>")), HI, ByteTokenizer())
    assert prompt.ids == tuple(b"<|im_end|>")


def test_reserved_text_is_refused_unless_allowed() -> None:
    dialog = [*HI, Message("assistant", "a<tag>b")]
    with pytest.raises(DialogError, match=r"messages\[1\] holds <tag>") as caught:
        build_prompt(Fixed(Segment("x")), dialog, ByteTokenizer())
    assert caught.value.param == "messages"
    assert build_prompt(Fixed(Segment("x")), dialog, ByteTokenizer(), tags="allow").ids == (120,)


@pytest.mark.parametrize("tags", ["refuse", "allow"])
def test_half_a_surrogate_pair_is_refused(tags: str) -> None:
    with pytest.raises(DialogError, match="surrogate"):
        build_prompt(
            Fixed(Segment("x")),
            [Message("user", "a\ud800")],
            ByteTokenizer(),
            tags="allow" if tags == "allow" else "refuse",
        )


def test_a_missing_control_token_says_that_the_template_does_not_fit() -> None:
    with pytest.raises(DialogError, match=r"fixed doesn't fit this tokenizer.*<\|end\|>"):
        build_prompt(Fixed(Segment("<|end|>", control=True)), HI, ByteTokenizer())


def test_built_in_templates_have_distinct_names_and_summaries() -> None:
    assert [template.name for template in BUILTIN_TEMPLATES] == ["llama2", "elyza", "chatml"]
    assert all(template.summary for template in BUILTIN_TEMPLATES)
