"""Streamed text: exact for any ids, never a broken character or a part of a stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlorachat.detokenize import TextStream
from qlorachat.errors import UsageError
from qlorachat.protocols import Tokenizer
from qlorachat.testing import ByteTokenizer

ANY_IDS = st.integers(0, 49_300)  # beyond both vocabularies too
BYTES_AND_CONTROLS = st.integers(0, 300)  # both vocabularies begin with these
LLAMA2_SPACE = st.just(29871)
IDS = st.lists(st.one_of(ANY_IDS, BYTES_AND_CONTROLS, LLAMA2_SPACE), max_size=60)
BROKEN = "\N{REPLACEMENT CHARACTER}"

properties = settings(deadline=None, max_examples=300)


@pytest.fixture(scope="session", params=["llama2", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    real: Tokenizer = request.getfixturevalue(request.param)
    return real


def stream(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    text = TextStream(tokenizer, stop)
    return [*(text.push(token_id) for token_id in ids), text.flush()]


def cut_at_first_stop(text: str, stop: Sequence[str]) -> str:
    """Character by character, as one would look for a stop string by hand."""
    for end in range(len(text) + 1):
        if endings := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, endings))]
    return text


@given(ids=IDS)
@properties
def test_pieces_join_to_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, whole = stream(tokenizer, ids), tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert BROKEN in whole or not any(BROKEN in piece for piece in pieces)


# Llama-2's offsets count the space that SentencePiece puts before a first space
@given(text=st.text(alphabet="ぁあゞをヴー誠実鬱、。🦙é a\n").map(lambda text: text.lstrip(" ")))
@properties
def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer, text: str) -> None:
    ids, spans = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    last_tokens = {end: index for index, (_, end) in enumerate(spans)}
    for characters, token in last_tokens.items():
        assert "".join(pieces[: token + 1])[:characters] == text[:characters]


@given(
    ids=st.lists(st.integers(0, 259), max_size=40),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    text=st.text(alphabet="ab\n", max_size=40),
)
@properties
def test_the_text_ends_before_the_first_stop_string(
    ids: list[int], stop: list[str], text: str
) -> None:
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode(text)[0], *ids]
    assert "".join(stream(tokenizer, ids, stop)) == cut_at_first_stop(tokenizer.decode(ids), stop)


@given(text=st.text(max_size=30), data=st.data())
@properties
def test_stop_strings_never_leak_from_real_tokens(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(text)))
    stop = [text[start : start + data.draw(st.integers(1, 5))] or "z"]
    ids, _ = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, stop)
    assert "".join(pieces) == cut_at_first_stop(tokenizer.decode(ids), stop)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    text = TextStream(ByteTokenizer(), ["\nUser:", "END"])
    assert [text.push(byte) for byte in b"a\nUb\nUser: c"] == [
        *("a", "", "", "\nUb", "", "", "", "", "", "", "", "")
    ]
    assert text.stopped
    assert text.flush() == ""


def test_flush_shows_what_only_looked_like_a_stop_string() -> None:
    text = TextStream(ByteTokenizer(), ["END"])
    assert "".join(text.push(byte) for byte in b"THE EN") == "THE "
    assert text.flush() == "EN"
    assert not text.stopped


def test_what_follows_a_stop_string_in_its_token_is_not_shown(smollm2: Tokenizer) -> None:
    first, *_ = smollm2.encode(" ¿")[0]
    assert smollm2.decode([first]) == f" {BROKEN}"  # and the first byte of a character
    text = TextStream(smollm2, [" "])
    assert text.push(first) == ""
    assert text.stopped
    assert text.flush() == ""


def test_an_unfinished_character_is_held_back_until_the_end() -> None:
    text = TextStream(ByteTokenizer())
    assert [text.push(byte) for byte in "誠".encode()[:2]] == ["", ""]
    assert text.flush() == BROKEN
    assert text.flush() == ""


def test_a_stop_string_may_be_found_at_the_very_end() -> None:
    text = TextStream(ByteTokenizer(), [BROKEN])
    assert [text.push(byte) for byte in b"a\xe8"] == ["a", ""]
    assert text.flush() == ""
    assert text.stopped


def test_the_space_after_many_control_tokens_is_kept(llama2: Tokenizer) -> None:
    hello = 15043
    pieces = stream(llama2, [hello, *[2] * 40, hello])
    assert "".join(pieces) == "Hello Hello"


def test_a_step_decodes_a_few_ids_however_long_the_answer() -> None:
    lengths: list[int] = []

    class Watched(ByteTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            lengths.append(len(ids))
            return super().decode(ids)

    stream(Watched(), [97] * 1000 + [0x80] * 1000)
    assert max(lengths) <= 16
    assert len(lengths) < 2 * 2000 + 2


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one character"):
        TextStream(ByteTokenizer(), ["a", ""])
