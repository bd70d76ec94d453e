"""Llama-2 and ELYZA prompts: equal to the reference ids, and every other dialog one clear error."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlorachat.errors import DialogError
from qlorachat.messages import Message, parse_messages
from qlorachat.protocols import Tokenizer
from qlorachat.templates import Elyza, Llama2, build_prompt, check_llama2_tokenizer

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
COMPLETE = parse_messages(
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello! "},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "はい"},
    ]
)


@pytest.fixture(scope="session")
def cases(llama2_folder: Path) -> dict[str, dict[str, Any]]:
    path = llama2_folder / "expected_llama2_chat.json"
    expected: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return expected


def test_valid_dialogs_have_the_reference_ids(
    llama2: Tokenizer, cases: dict[str, dict[str, Any]]
) -> None:
    valid = {name: case for name, case in cases.items() if "ids" in case and "messages" in case}
    assert len(valid) == 19
    for name, case in valid.items():
        messages = parse_messages(case["messages"])
        prompt = build_prompt(Llama2(), messages, llama2, tags="allow")
        assert prompt.text == case["text"], name
        assert list(prompt.ids) == case["ids"], name
        assert prompt.ids[1] != 1, name  # one leading BOS


def test_contents_that_hold_tags_are_refused_by_default(
    llama2: Tokenizer, cases: dict[str, dict[str, Any]]
) -> None:
    for case in cases.values():
        if "messages" not in case or "ids" not in case:
            continue
        messages = parse_messages(case["messages"])
        if case["meta_unsafe"]:
            with pytest.raises(DialogError, match=r"messages\[0\] holds \[/?INST\]") as caught:
                build_prompt(Llama2(), messages, llama2)
            assert caught.value.param == "messages"
        else:
            assert list(build_prompt(Llama2(), messages, llama2).ids) == case["ids"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_every_tag_is_refused_in_every_role(llama2: Tokenizer, tag: str, role: str) -> None:
    contents = {"system": "a", "user": "b", "assistant": "c"} | {role: f"x{tag}y"}
    messages = [Message("system", contents["system"]), Message("user", contents["user"])]
    messages += [Message("assistant", contents["assistant"]), Message("user", "d")]
    with pytest.raises(DialogError, match="reads as control text"):
        build_prompt(Llama2(), messages, llama2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "C20_consecutive_users",
            r"messages\[1\] is the user's turn where the assistant's belongs",
        ),
        ("C21_ends_with_assistant", "must end with the user's turn"),
        ("C22_system_only", "must end with the user's turn"),
        ("C23_starts_with_assistant", r"messages\[0\] is the assistant's turn"),
        ("C24_system_mid", r"messages\[1\] is the system's turn"),
    ],
)
def test_invalid_dialogs_are_one_clear_error(
    llama2: Tokenizer, cases: dict[str, dict[str, Any]], name: str, reason: str
) -> None:
    assert "error" in cases[name]
    for template in (Llama2(), Elyza()):
        with pytest.raises(DialogError, match=reason) as caught:
            build_prompt(template, parse_messages(cases[name]["messages"]), llama2)
        assert "\n" not in str(caught.value)


def test_an_empty_dialog_is_refused() -> None:
    with pytest.raises(DialogError, match="empty"):
        Llama2().render([])


def test_elyza_has_the_ids_of_its_card(llama2: Tokenizer, cases: dict[str, dict[str, Any]]) -> None:
    messages = parse_messages(cases["C10_japanese"]["messages"])
    for dialog in (messages, messages[1:]):  # the card's system prompt is the default
        prompt = build_prompt(Elyza(), dialog, llama2)
        assert prompt.text == cases["E01_elyza_card"]["text"]
        assert list(prompt.ids) == cases["E01_elyza_card"]["ids"]


def test_elyza_strips_nothing_and_keeps_another_system_prompt() -> None:
    (_, text) = Elyza().render([Message("system", ""), Message("user", " 　x\n")])
    assert text.text == "[INST] <<SYS>>\n\n<</SYS>>\n\n 　x\n [/INST] "


def test_elyza_ends_earlier_rounds_as_llama2_does() -> None:
    segments = Elyza().render([*COMPLETE, Message("user", "c")])
    assert "".join(segment.text for segment in segments[3:]) == (
        "</s><s>[INST] 1+1? [/INST] はい </s><s>[INST] c [/INST] "
    )


def trained_ids(prompt_ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
    return [token_id for token_id, mark in zip(prompt_ids, trained, strict=True) if mark]


def test_llama2_trains_the_answers_and_their_ends(llama2: Tokenizer) -> None:
    prompt = build_prompt(Llama2(), COMPLETE, llama2, add_generation_prompt=False)
    hello, exclamation, space, yes = 15043, 29991, 29871, llama2.encode("はい")[0]
    assert trained_ids(prompt.ids, prompt.trained) == [
        *(hello, exclamation, space, 2),
        *(*yes, space, 2),
    ]
    assert prompt.ids.count(1) == 2


def test_elyza_trains_the_answer_but_not_the_space_before_it(llama2: Tokenizer) -> None:
    dialog = [Message("user", "名前は？"), Message("assistant", "ずんだもん")]
    prompt = build_prompt(Elyza(), dialog, llama2, add_generation_prompt=False)
    trained = trained_ids(prompt.ids, prompt.trained)
    assert trained[-1] == 2
    assert [29871, *trained[:-2]] == llama2.encode("ずんだもん")[0]


@pytest.mark.parametrize("template", [Llama2(), Elyza()])
def test_what_is_trained_follows_the_prompt_of_the_same_dialog(
    llama2: Tokenizer, template: Llama2 | Elyza
) -> None:
    dialog = [Message("user", "名前は？"), Message("assistant", "ずんだもん")]
    whole = build_prompt(template, dialog, llama2, add_generation_prompt=False)
    prompt = build_prompt(template, dialog[:1], llama2)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.trained == tuple(i >= len(prompt.ids) for i in range(len(whole.ids)))


def test_a_complete_dialog_ends_with_the_assistant(llama2: Tokenizer) -> None:
    with pytest.raises(DialogError, match="must end with the assistant's turn to be complete"):
        build_prompt(Llama2(), COMPLETE[:3], llama2, add_generation_prompt=False)


def test_another_tokenizer_is_refused(smollm2: Tokenizer, llama2: Tokenizer) -> None:
    check_llama2_tokenizer(llama2)
    for template in (Llama2(), Elyza()):
        with pytest.raises(DialogError, match="doesn't fit this tokenizer") as caught:
            build_prompt(template, COMPLETE[:1], smollm2)
        assert caught.value.param == "template"


def test_a_tokenizer_that_merges_inner_spaces_wrongly_is_refused(llama2: Tokenizer) -> None:
    class Merging:
        """Right on single spaces only, as some converted Llama-2 tokenizers are."""

        bos_token = eos_token = pad_token = unk_token = None
        adds_bos = False
        control_tokens = llama2.control_tokens
        decode = staticmethod(llama2.decode)

        def encode(
            self, text: str, *, after: str | None = None, before: str | None = None
        ) -> tuple[list[int], list[tuple[int, int]]]:
            return llama2.encode(text.replace("  ", " "), after=after, before=before)

    with pytest.raises(DialogError, match="doesn't fit this tokenizer"):
        check_llama2_tokenizer(Merging())
