"""What is shown joins up, marks the trained part with and without colour, and steers nothing."""

import io

import numpy as np
import pytest
from rich.console import Console, RenderableType

from qlorachat.messages import Message
from qlorachat.protocols import Tokenizer
from qlorachat.templates import ChatML, Elyza, Llama2
from qlorachat.testing import ByteTokenizer
from qlorachat.training.data.preview import preview, show_bad, show_sample, split_pieces
from qlorachat.training.data.rows import BadRow, Row, Rows
from qlorachat.training.data.samples import Sample, Samples, build_samples


def shown(renderable: RenderableType, *, colour: bool = False) -> str:
    """As a terminal of 100 columns shows it, or a file."""
    file = io.StringIO()
    console = Console(
        file=file,
        width=100,
        force_terminal=colour,
        color_system="standard" if colour else None,
        _environ={},
    )
    console.print(renderable)
    return file.getvalue()


def make_row(line: int, question: str = "Hi", answer: str = "Hello!") -> Row:
    return Row(line, (Message("user", question), Message("assistant", answer)))


def build(*rows: Row, max_length: int = 5000) -> Samples:
    return build_samples(rows, ChatML(), ByteTokenizer(), max_length=max_length)


def build_one(row: Row) -> Sample:
    return build(row).samples[0]


def test_pieces_join_to_the_whole_text(llama2: Tokenizer) -> None:
    row = Row(
        1,
        (
            Message("user", "  two  spaces, 😀 and 誠"),
            Message("assistant", "誠実\n  です😀"),
            Message("user", "</s>"),
            Message("assistant", "なぜ"),
        ),
    )
    for template in (Elyza(), Llama2()):
        (sample,) = build_samples([row], template, llama2, max_length=500).samples
        segments = template.render(row.messages, add_generation_prompt=False)
        pieces = list(split_pieces(sample, llama2))
        assert "".join(piece.text for piece in pieces) == "".join(each.text for each in segments)
        controls = [piece.text for piece in pieces if piece.control]
        assert controls == ["<s>", "</s>", "<s>", "</s>"]
        trained = "".join(piece.text for piece in pieces if piece.trained)
        assert "".join(trained.split()) == "誠実です😀</s>なぜ</s>"


def test_the_trained_part_is_marked_without_colour() -> None:
    text = shown(show_sample(build_one(make_row(12)), ByteTokenizer()))
    assert "line 12: 29 tokens, «7 trained»" in text
    assert "<|im_start|>assistant" in text
    assert "«Hello!<|im_end|>»" in text
    assert "\x1b" not in text


def test_the_trained_part_is_green() -> None:
    text = shown(show_sample(build_one(make_row(12)), ByteTokenizer()), colour=True)
    assert "\x1b[32mHello!\x1b[0m" in text
    assert "\x1b[35m<|im_end|>\x1b[0m" in text
    assert "\x1b[32mHi" not in text


def test_markup_and_control_codes_in_data_are_plain_text() -> None:
    harmful = "[/] [red]x[/red] [bold :smile: \x1b[2J\x07\r\x9b"
    row = make_row(1, harmful, harmful)
    text = shown(show_sample(build_one(row), ByteTokenizer()))
    assert text.count("[/] [red]x[/red] [bold :smile: \ufffd[2J\ufffd\ufffd\ufffd") == 2
    bad = shown(show_bad([BadRow(3, f"[/] {harmful} \ud800")]))
    assert "line 3: [/] [/] [red]x[/red]" in bad
    assert not {"\x1b", "\x07", "\x9b", "\ud800"} & set(text + bad)


def test_long_pieces_lose_their_middle() -> None:
    row = make_row(1, "Q" * 1000, "first" + "長" * 1000 + "last")
    text = shown(show_sample(build_one(row), ByteTokenizer()))
    assert "…(709 characters)…" in text
    assert "«first" in text
    assert "last<|im_end|>»" in text
    assert len(text) < 2000


def test_a_cut_in_the_middle_of_a_character_is_shown() -> None:
    (sample,) = build(make_row(1, "Hi", "長い"), max_length=25).samples
    text = shown(show_sample(sample, ByteTokenizer()))
    assert "«長\ufffd»" in text
    assert "25 tokens, cut, «4 trained»" in text


def test_counts_and_bad_rows() -> None:
    answers = ["a" * length for length in range(1, 21)]
    learned = build(*(make_row(i, answer=a) for i, a in enumerate(answers)), max_length=35)
    held_out = build(make_row(30), make_row(31, "H" * 50), max_length=35)
    rows = Rows("d.jsonl", "", (make_row(0),) * 22, (BadRow(40, "odd"), BadRow(25, "even")))
    text = shown(preview(rows, learned, ByteTokenizer(), max_length=35, held_out=held_out))
    assert text.count("─ line ") == 3
    assert "24 rows of d.jsonl: 20 samples to learn, 1 held out, 3 bad (12.5 %)" in text
    assert (
        "8 cut at 35 tokens (38.1 %); a max_length of 77 would fit all, 43 would fit 95 %" in text
    )
    tokens, trained = learned.tokens, learned.trained_tokens
    assert (
        f"{tokens} tokens to learn from, «{trained} trained» ({trained / tokens:.1%}"[:-1] in text
    )
    listed = text.split("Bad rows, left out:\n")[1].splitlines()
    assert [line.split(":")[0].strip() for line in listed] == ["line 25", "line 31", "line 40"]
    assert "its prompt alone has 69 tokens, max_length is 35" in listed[1]


def test_without_bad_rows_none_are_listed() -> None:
    rows = Rows("d.jsonl", "", (make_row(1),), ())
    text = shown(preview(rows, build(make_row(1)), ByteTokenizer(), max_length=1000))
    assert "0 bad (0.0 %)" in text
    assert "0 cut at 1000 tokens (0.0 %)" in text
    assert "Bad rows" not in text


@pytest.mark.parametrize(
    ("count", "more"), [(20, ""), (21, "and 1 more"), (2020, "and 2,000 more")]
)
def test_twenty_bad_rows_are_listed(count: int, more: str) -> None:
    lines = shown(show_bad([BadRow(i, "r" * 999) for i in range(count)])).split("Bad rows")[1]
    assert lines.count("line ") == 20
    assert lines.rstrip().endswith(more or "…")


def test_a_control_token_from_plain_text_is_shown_by_name(llama2: Tokenizer) -> None:
    unknown = llama2.control_tokens["<unk>"]
    ids = np.array([*llama2.encode("Hi")[0], unknown, *llama2.encode("Ho")[0]], np.int32)
    sample = Sample(1, ids, np.zeros(len(ids), np.bool_), truncated=False)
    assert [piece.text for piece in split_pieces(sample, llama2)] == ["Hi", "<unk>", "Ho"]
