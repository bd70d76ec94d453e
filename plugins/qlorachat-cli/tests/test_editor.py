"""The entry line: what completes, what sends, and where the history goes."""

import asyncio
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput

from qlorachat import ModelInfo
from qlorachat_cli.commands import COMMANDS, Desk
from qlorachat_cli.conversation import Conversation
from qlorachat_cli.editor import CommandCompleter, Editor
from qlorachat_cli.plugin import CliOptions
from qlorachat_cli.settings import NAMES
from qlorachat_cli.storage import Storage
from qlorachat_cli.tally import Tally
from qlorachat_cli.terminal import Terminal
from qlorachat_cli.texts import ENGLISH


@pytest.fixture
def storage(options: CliOptions) -> Storage:
    storage = Storage.of(options)
    storage.prepare()
    return storage


@pytest.fixture
def desk(storage: Storage) -> Desk:
    storage.chats.save("seals", Conversation())
    info = ModelInfo(name="fake", context_length=4096, vocab_size=258, stop_ids=frozenset({257}))
    return Desk(("zundamon", "metan"), info, storage.chats, Tally(), ENGLISH)


@pytest.fixture
def editor(terminal: Terminal, storage: Storage, desk: Desk) -> Editor:
    return Editor(terminal, storage, lambda: desk)


def read(editor: Editor, text: str = "") -> str:
    return asyncio.run(editor.read("> ", text))


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("/", [f"/{name}" for name in COMMANDS]),
        ("/s", ["/system", "/set", "/save", "/stats"]),
        ("/adapter ", ["/adapter zundamon", "/adapter metan"]),
        ("/adapter z", ["/adapter zundamon"]),
        ("/load s", ["/load seals"]),
        ("/set temp", ["/set temperature="]),
        ("/set seed=1 top_", ["/set seed=1 top_p=", "/set seed=1 top_k="]),
        ("/set overflow=d", ["/set overflow=drop_oldest_turns"]),
        ("/undo ", []),
        ("/nothing ", []),
        ("//", []),
        ("hello /", []),
        ("", []),
    ],
)
def test_completion(desk: Desk, line: str, completed: list[str]) -> None:
    found = CommandCompleter(lambda: desk).get_completions(Document(line), CompleteEvent())
    results = [line[: len(line) + one.start_position] + one.text for one in found]
    assert results == completed


def test_every_setting_completes(desk: Desk) -> None:
    found = CommandCompleter(lambda: desk).get_completions(Document("/set "), CompleteEvent())
    assert {one.text.partition("=")[0] for one in found} == set(NAMES)


@pytest.mark.parametrize(
    ("keys", "many_lines", "line"),
    [
        ("クマとアザラシ\r", False, "クマとアザラシ"),
        ("one\x1b\rtwo\r", False, "one\ntwo"),
        ("one\rtwo\x1b\r", True, "one\ntwo"),
        ("\x1b[200~pasted\nlines\x1b[201~\r", False, "pasted\nlines"),
        ("typed\x03", False, ""),
        ("\x1b[200~\r\n\x1b[201~x\r", False, "\nx"),
    ],
)
def test_keys(editor: Editor, keyboard: PipeInput, keys: str, many_lines: bool, line: str) -> None:
    editor.many_lines = many_lines
    keyboard.send_text(keys)
    assert read(editor) == line


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_an_empty_line_is_left(editor: Editor, keyboard: PipeInput, key: str) -> None:
    keyboard.send_text(key)
    with pytest.raises(EOFError):
        read(editor)


def test_a_given_text_is_edited(editor: Editor, keyboard: PipeInput) -> None:
    keyboard.send_text(" two\r")
    assert read(editor, "one") == "one two"


def test_bytes_that_are_no_text_become_question_marks(editor: Editor, keyboard: PipeInput) -> None:
    keyboard.send_bytes(b"a\xffb\r")
    assert read(editor) == "a?b"


def test_history_is_kept_for_the_next_start(
    terminal: Terminal, storage: Storage, desk: Desk, keyboard: PipeInput
) -> None:
    for keys, line in (("first\r", "first"), ("\x1b[A\r", "first")):
        keyboard.send_text(keys)
        assert read(Editor(terminal, storage, lambda: desk)) == line


def test_without_history_no_file_is_written(
    terminal: Terminal, desk: Desk, keyboard: PipeInput, tmp_path: Path
) -> None:
    storage = Storage(tmp_path / "none", keeps_history=False)
    keyboard.send_text("secret\r")
    assert read(Editor(terminal, storage, lambda: desk)) == "secret"
    assert not (tmp_path / "none").exists()
