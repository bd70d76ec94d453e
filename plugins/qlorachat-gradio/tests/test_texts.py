"""The page's words: both languages say the same things."""

import re
from string import Formatter

import pytest

from qlorachat.errors import ContextOverflow, DialogError, QueueFull, UnknownName
from qlorachat_gradio.texts import TEXTS, explain, language


def test_both_languages_have_the_same_keys() -> None:
    assert set(TEXTS["en"]) == set(TEXTS["ja"])


@pytest.mark.parametrize("key", sorted(TEXTS["en"]))
def test_both_languages_take_the_same_values(key: str) -> None:
    def fields(text: str) -> set[str | None]:
        return {field for _, field, _, _ in Formatter().parse(text)}

    assert fields(TEXTS["en"][key]) == fields(TEXTS["ja"][key])


def test_japanese_is_japanese() -> None:
    english = {
        key for key, text in TEXTS["ja"].items() if not re.search(r"[ぁ-んァ-ヶ一-龠]", text)
    }
    assert english == {"top_p", "top_k", "min_p"}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("ja", "ja"),
        ("ja-JP,ja;q=0.9,en;q=0.8", "ja"),
        ("JA;q=0.5", "ja"),
        ("en-US,en;q=0.9,ja;q=0.8", "en"),
        ("jam", "en"),
        ("", "en"),
        (None, "en"),
    ],
)
def test_the_first_accepted_language_counts(header: str | None, expected: str) -> None:
    assert language(header) == expected


def test_errors_are_explained_in_both_languages() -> None:
    overflow = ContextOverflow(400, 512, 500)
    assert "400" in explain(overflow, "en")
    assert "500トークン" in explain(overflow, "ja")
    assert "順番待ち" in explain(QueueFull("full"), "ja")
    assert "「old」" in explain(UnknownName("adapter", "old", []), "ja")


def test_an_error_without_words_here_speaks_for_itself() -> None:
    assert explain(DialogError("The message holds [INST]."), "ja") == "The message holds [INST]."
