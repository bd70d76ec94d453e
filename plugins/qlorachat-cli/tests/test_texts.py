"""The two languages say the same things, and fit the screen."""

import re
import string
from dataclasses import replace

import pytest
from rich.cells import cell_len

from qlorachat import FinishReason
from qlorachat.testing import fake_engine
from qlorachat_cli.commands import COMMANDS
from qlorachat_cli.tally import speed_lines
from qlorachat_cli.texts import ENGLISH, JAPANESE, Texts, choose_texts

COLUMNS = 80


def fields(text: str) -> set[str | None]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_have_the_same_keys_and_fields() -> None:
    assert {key: fields(text) for key, text in ENGLISH.items()} == {
        key: fields(text) for key, text in JAPANESE.items()
    }


@pytest.mark.parametrize("reason", FinishReason)
def test_the_japanese_speed_has_no_english_word(reason: FinishReason) -> None:
    with fake_engine() as engine:
        reply = replace(engine.chat("Hi"), finish_reason=reason)
        line = speed_lines(reply, engine.info, JAPANESE).splitlines()[0]
    assert not re.search("[a-z]", line)


@pytest.mark.parametrize("texts", [ENGLISH, JAPANESE])
def test_help_fits_the_screen(texts: Texts) -> None:
    column = max(len(f"{command.word} {command.usage}") for command in COMMANDS.values()) + 2
    for command in COMMANDS.values():
        assert column + cell_len(command.summary(texts)) <= COLUMNS, command.name
    assert all(cell_len(texts[key]) <= COLUMNS for key in texts if key.startswith("help."))


@pytest.mark.parametrize(
    ("environment", "texts"),
    [
        ({"LANG": "ja_JP.UTF-8"}, JAPANESE),
        ({"LANG": "ja"}, JAPANESE),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "ja_JP.UTF-8"}, ENGLISH),
        ({"LC_ALL": "", "LC_MESSAGES": "ja_JP.UTF-8", "LANG": "C"}, JAPANESE),
        ({"LANG": "C"}, ENGLISH),
    ],
)
def test_the_locale_decides(environment: dict[str, str], texts: Texts) -> None:
    assert choose_texts(environment) is texts
