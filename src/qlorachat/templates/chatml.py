"""ChatML: each message between `<|im_start|>` and `<|im_end|>`, which are control tokens."""

from collections.abc import Sequence

from qlorachat.messages import Message
from qlorachat.protocols import Segment
from qlorachat.templates.dialog import check_end

START = Segment("<|im_start|>", control=True)
END = "<|im_end|>"


class ChatML:
    """Messages in any order, contents untouched, no system prompt of its own and no BOS.

    Source: github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
    """

    name = "chatml"
    summary = "ChatML, with no system prompt of its own"
    reserved: Sequence[str] = ()
    models: Sequence[str] = ()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """The messages; an answer and the `<|im_end|>` after it are trained."""
        check_end(messages, add_generation_prompt=add_generation_prompt)
        segments = [segment for message in messages for segment in _turn(message)]
        return [*segments, START, Segment("assistant\n")] if add_generation_prompt else segments


def _turn(message: Message) -> list[Segment]:
    trained = message.role == "assistant"
    return [
        START,
        Segment(f"{message.role}\n"),
        Segment(message.content, trained=trained),
        Segment(END, control=True, trained=trained),
        Segment("\n"),
    ]
