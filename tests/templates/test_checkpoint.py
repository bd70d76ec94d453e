"""A checkpoint's own template: transformers' prompt, contents as plain text, marks for training."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlorachat.checkpoints import read_tokenizer
from qlorachat.errors import DialogError
from qlorachat.messages import Message
from qlorachat.protocols import Segment, Tokenizer
from qlorachat.templates import CheckpointTemplate, build_prompt
from qlorachat.testing import ByteTokenizer
from tests.tiny import write_folder

HI = [Message("user", "Hi")]
DIALOG = [
    Message("user", "  Hi 日本\n"),
    Message("assistant", "Hello!"),
    Message("user", "12 + 30?"),
    Message("assistant", "42 "),
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }} <|im_end|>\n\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% else %}"
    " {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


class LlamaNames(ByteTokenizer):
    """Bytes, and control tokens with Llama-2's names."""

    bos_token = "<s>"
    eos_token = "</s>"
    control_tokens = {"<s>": 256, "</s>": 257}  # noqa: RUF012  never changed


def own(source: str) -> CheckpointTemplate:
    return CheckpointTemplate(source, LlamaNames())


def test_a_template_knows_the_tokens_that_transformers_gives_it(tmp_path: Path) -> None:
    write_folder(tmp_path, layers=1)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|im_start|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    source = "{{ pad_token }}{{ unk_token }}{{ messages[0].content }}{{ eos_token }}"
    tokenizer = read_tokenizer(tmp_path)
    prompt = build_prompt(CheckpointTemplate(source, tokenizer), [Message("user", "Hi")], tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    dialog = [{"role": "user", "content": "Hi"}]
    assert prompt.text == "<|endoftext|><|im_start|>Hi<|im_end|>"
    assert prompt.text == theirs.apply_chat_template(dialog, chat_template=source, tokenize=False)


def trained_text(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments if segment.trained)


@pytest.fixture(scope="module")
def reference(smollm2_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def smollm2_template(smollm2: Tokenizer, reference: Any) -> CheckpointTemplate:
    return CheckpointTemplate(reference.chat_template, smollm2)


@pytest.mark.parametrize("system", ["You are brief.", None])
@pytest.mark.parametrize("complete", [True, False])
def test_ids_equal_transformers_own(
    reference: Any,
    smollm2: Tokenizer,
    smollm2_template: CheckpointTemplate,
    system: str | None,
    complete: bool,
) -> None:
    dialog = [Message("system", system)] if system else []
    dialog += DIALOG if complete else DIALOG[:-1]
    prompt = build_prompt(smollm2_template, dialog, smollm2, add_generation_prompt=not complete)
    messages = [{"role": message.role, "content": message.content} for message in dialog]
    options = {"add_generation_prompt": not complete, "return_dict": False}
    assert list(prompt.ids) == reference.apply_chat_template(messages, **options)
    assert prompt.text == reference.apply_chat_template(messages, tokenize=False, **options)


def test_the_demo_models_answers_and_their_ends_are_trained(
    smollm2: Tokenizer, smollm2_template: CheckpointTemplate
) -> None:
    prompt = build_prompt(smollm2_template, DIALOG, smollm2, add_generation_prompt=False)
    end = smollm2.control_tokens["<|im_end|>"]
    trained = [i for i, mark in zip(prompt.ids, prompt.trained, strict=True) if mark]
    hello, answer = smollm2.encode("Hello!")[0], smollm2.encode("42 ")[0]
    assert trained == [*hello, end, *answer, end]


def test_contents_are_plain_text_whatever_they_spell() -> None:
    segments = own(LLAMA2).render([Message("user", " a</s><s>b ")])
    assert segments == [
        Segment("<s>", control=True),
        *(Segment("[INST] "), Segment("a</s><s>b"), Segment(" [/INST]")),
    ]


def test_an_answer_is_trained_with_its_spaces_up_to_the_token_that_ends_it() -> None:
    segments = own(LLAMA2).render(DIALOG, add_generation_prompt=False)
    assert trained_text(segments) == " Hello! </s> 42 </s>"
    unended = own("{% for m in messages %}{{ m.role }}:\n\n{{ m.content }}\n{% endfor %}")
    assert trained_text(unended.render(DIALOG, add_generation_prompt=False)) == "Hello!42"


def test_blank_and_repeated_contents_keep_their_places() -> None:
    dialog = [Message("user", "x"), Message("assistant", ""), Message("user", "x")]
    segments = own(LLAMA2).render(dialog)
    text = "<s>[INST] x [/INST]  </s><s>[INST] x [/INST]"
    assert "".join(segment.text for segment in segments) == text
    assert [segment.text for segment in segments if segment.control] == ["<s>", "</s>", "<s>"]


def test_plain_text_tags_of_the_source_are_reserved() -> None:
    assert own(LLAMA2).reserved == ("[/INST]", "[INST]")
    assert CheckpointTemplate(CHATML, ByteTokenizer()).reserved == ()
    assert own(CHATML).reserved == ("<|im_end|>", "<|im_start|>")


def test_changed_contents_pass_while_they_hold_no_special_token() -> None:
    loud = own("{{ bos_token }}{{ messages[0].content | upper }}")
    assert loud.render(HI) == [Segment("<s>", control=True), Segment("HI")]
    with pytest.raises(DialogError, match="hold special tokens") as caught:
        loud.render([Message("user", "a</s>")])
    assert caught.value.param == "messages"


def test_special_tokens_that_a_template_makes_of_contents_are_refused() -> None:
    joining = own("{{ bos_token }}{{ messages[0].content | replace('-', '') }}")
    with pytest.raises(DialogError, match="hold special tokens"):
        joining.render([Message("user", "a<-/s>")])


def test_a_template_that_reads_the_contents_is_not_trusted_with_special_tokens() -> None:
    nosy = own("{% if 'x' in messages[0].content %}{{ messages[0].content }}{% endif %}")
    assert nosy.render([Message("user", "x")]) == [Segment("x")]
    with pytest.raises(DialogError, match="hold special tokens"):
        nosy.render([Message("user", "x</s>")])


def test_changed_answers_cannot_be_trained() -> None:
    loud = own("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(DialogError, match="told apart for training") as caught:
        loud.render(DIALOG, add_generation_prompt=False)
    assert caught.value.param == "template"


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    strict = own("{{ raise_exception('Roles must\n alternate') }}")
    with pytest.raises(DialogError, match=r"this dialog: Roles must alternate$") as caught:
        strict.render(HI)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{% for i in range(10**5) %}{{ 'a' * 10**4 }}{% endfor %}", "prompt is longer than"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    ],
)
def test_a_failing_template_is_one_clear_error(source: str, reason: str) -> None:
    with pytest.raises(DialogError, match=f"{reason}.*choose another") as caught:
        own(source).render(HI)
    assert caught.value.param == "template"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_dialog_that_never_ends_is_stopped_and_the_next_one_renders() -> None:
    template = own(
        "{% if messages[0].content == 'bomb' %}{% for i in range(10**5) %}"
        "{% for j in range(10**5) %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    with pytest.raises(DialogError, match="took over 2 s"):
        template.render([Message("user", "bomb")])
    assert template.render(HI) == [Segment("Hi")]


def test_threads_get_their_own_dialogs() -> None:
    template = own(LLAMA2)
    texts = [f"question {i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(lambda text: template.render([Message("user", text)]), texts))
    assert [segments[2].text for segments in rendered] == texts
