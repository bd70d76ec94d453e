"""ChatML: what the demo model's own template writes, without its default system prompt."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Tokenizer
from qlorachat.templates import ChatML, build_prompt
from qlorachat.testing import ByteTokenizer

DIALOG = [
    Message("system", "You are brief."),
    Message("user", "  Hi 日本\n"),
    Message("assistant", "Hello!"),
    Message("user", "12 + 30?"),
    Message("assistant", " 42"),
]


@pytest.mark.parametrize("complete", [True, False])
def test_ids_equal_the_checkpoints_own_template(
    smollm2_folder: Path, smollm2: Tokenizer, complete: bool
) -> None:
    dialog = DIALOG if complete else DIALOG[:-1]
    prompt = build_prompt(ChatML(), dialog, smollm2, add_generation_prompt=not complete)
    reference = AutoTokenizer.from_pretrained(smollm2_folder)
    messages = [{"role": message.role, "content": message.content} for message in dialog]
    options = {"add_generation_prompt": not complete, "return_dict": False}
    assert list(prompt.ids) == reference.apply_chat_template(messages, **options)
    assert prompt.text == reference.apply_chat_template(messages, tokenize=False, **options)


def test_no_system_prompt_is_added() -> None:
    segments = ChatML().render([Message("user", "Hi")])
    assert "".join(segment.text for segment in segments) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_answers_and_their_ends_are_trained() -> None:
    tokenizer = ByteTokenizer()
    prompt = build_prompt(ChatML(), DIALOG, tokenizer, add_generation_prompt=False)
    trained = [i for i, mark in zip(prompt.ids, prompt.trained, strict=True) if mark]
    assert trained == [*b"Hello!", 257, *b" 42", 257]


def test_the_dialog_must_end_as_asked() -> None:
    with pytest.raises(DialogError, match="must end with the user's turn to be answered"):
        ChatML().render(DIALOG)
    with pytest.raises(DialogError, match="must end with the assistant's turn to be complete"):
        ChatML().render(DIALOG[:-1], add_generation_prompt=False)


def test_a_tokenizer_without_its_control_tokens_is_refused(llama2: Tokenizer) -> None:
    with pytest.raises(DialogError, match=r"no control token <\|im_start\|>") as caught:
        build_prompt(ChatML(), [Message("user", "Hi")], llama2)
    assert caught.value.param == "template"
