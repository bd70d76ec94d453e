"""The commands as functions: what each makes of a conversation, without a terminal."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlorachat import Message, ModelInfo
from qlorachat.errors import UsageError
from qlorachat_cli.commands import (
    COMMANDS,
    Desk,
    Outcome,
    is_command,
    line_of,
    question_of,
    run_command,
)
from qlorachat_cli.conversation import Conversation, Draft
from qlorachat_cli.storage import Chats
from qlorachat_cli.tally import Tally
from qlorachat_cli.texts import ENGLISH

EMPTY = Conversation()
FIRST = EMPTY.asked("one").answered("1")
BOTH = FIRST.asked("two").answered("2")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    info = ModelInfo(name="fake", context_length=4096, vocab_size=258, stop_ids=frozenset({257}))
    return Desk(("zundamon", "metan"), info, Chats(tmp_path), Tally(), ENGLISH)


CHANGES: list[tuple[Conversation, str, dict[str, Any]]] = [
    (EMPTY, "/system Be brief.", {"system": "Be brief."}),
    (EMPTY, "/system two\nlines", {"system": "two\nlines"}),
    (replace(EMPTY, system="x"), "/system", {"system": None}),
    (EMPTY, "/adapter metan", {"adapter": "metan"}),
    (replace(EMPTY, adapter="metan"), "/adapter", {"adapter": None}),
    (EMPTY, "/set temperature=0.2 seed=1", {"settings": {"temperature": 0.2, "seed": 1}}),
    (BOTH, "/undo", {"messages": FIRST.messages}),
    (BOTH.asked("three"), "/undo", {"messages": BOTH.messages}),
    (FIRST, "/undo", {"messages": ()}),
    (BOTH, "/stats", {}),
    (BOTH, "/help", {}),
    (BOTH, "/set", {}),
]


@pytest.mark.parametrize(("before", "line", "changed"), CHANGES)
def test_what_a_command_changes(
    desk: Desk, before: Conversation, line: str, changed: dict[str, Any]
) -> None:
    outcome = run_command(line, before, desk)
    assert outcome.conversation == replace(before, **changed)
    assert outcome.notice
    assert outcome.ask is None
    assert outcome.draft is None


@pytest.mark.parametrize(
    ("before", "line", "outcome"),
    [
        (BOTH, "/retry", Outcome(BOTH, ask=FIRST.asked("two"))),
        (FIRST.asked("two"), "/retry", Outcome(FIRST.asked("two"), ask=FIRST.asked("two"))),
        (BOTH, "/edit", Outcome(BOTH, ENGLISH["editing"], draft=Draft("two", FIRST))),
        (
            EMPTY.asked("/x"),
            "/edit",
            Outcome(EMPTY.asked("/x"), ENGLISH["editing"], draft=Draft("//x", EMPTY)),
        ),
        (BOTH, "/multi", Outcome(BOTH, switches_entry=True)),
        (BOTH, "/exit", Outcome(BOTH, leaves=True)),
        (BOTH, "/exit  ", Outcome(BOTH, leaves=True)),
    ],
)
def test_what_a_command_asks_of_the_shell(
    desk: Desk, before: Conversation, line: str, outcome: Outcome
) -> None:
    assert run_command(line, before, desk) == outcome


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/svae x", "The command `/svae` does not exist; did you mean `/save`?"),
        ("/", "known: /adapter, /edit, /exit"),
        ("/adapter zundamom", "did you mean `zundamon`?"),
        ("/save", "Something is missing: /save NAME"),
        ("/load", "Something is missing: /load NAME"),
        ("/load nothing", "The chat `nothing` does not exist"),
        ("/undo now", "/undo takes nothing after it."),
        ("/undo", "There is no message yet."),
        ("/retry", "There is no message yet."),
        ("/edit", "There is no message yet."),
        ("/set temperature=9", "temperature is a number from 0.0 to 2.0"),
    ],
)
def test_what_is_wrong_is_one_line(desk: Desk, line: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        run_command(line, EMPTY, desk)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_save_and_load_go_round(desk: Desk) -> None:
    chat = replace(BOTH, adapter="metan", system="s", settings={"seed": 1})
    saved = run_command("/save 会話", chat, desk).conversation
    loaded = run_command("/load 会話", EMPTY, desk)
    assert loaded.conversation == saved == replace(chat, name="会話")
    assert "4 messages" in loaded.notice
    assert "two" in loaded.notice


def test_a_chat_whose_adapter_is_absent_goes_on_with_the_present_one_and_says_so(
    desk: Desk,
) -> None:
    run_command("/save a", replace(BOTH, adapter="metan"), desk)
    elsewhere = replace(desk, adapters=("zundamon",))
    outcome = run_command("/load a", replace(EMPTY, adapter="zundamon"), elsewhere)
    assert outcome.conversation.adapter == "zundamon"
    assert "metan is not loaded here: answers come from zundamon" in outcome.notice


def test_the_table_is_the_help(desk: Desk) -> None:
    shown = run_command("/help", EMPTY, desk).notice
    for name, command in COMMANDS.items():
        assert name == command.name
        assert f"/{name} {command.usage}".strip() in shown
        assert command.summary(ENGLISH) in shown


def test_set_alone_shows_every_setting_and_marks_the_changed(desk: Desk) -> None:
    lines = run_command("/set", replace(EMPTY, settings={"top_k": 7}), desk).notice.splitlines()
    assert "top_k = 7  (changed)" in lines
    assert "temperature = 0.7" in lines


@pytest.mark.parametrize("question", ["hello", "/path", "//x", "", "a/b"])
def test_a_leading_slash_is_escaped_and_back(question: str) -> None:
    line = line_of(question)
    assert not is_command(line)
    assert question_of(line) == question


def test_the_system_prompt_leads_the_dialog() -> None:
    assert replace(FIRST, system="s").dialog == (Message("system", "s"), *FIRST.messages)
    assert FIRST.dialog == FIRST.messages
