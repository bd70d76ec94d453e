"""What people see of the data before training: samples as the model will, counts, and bad rows."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from qlorachat.protocols import Tokenizer
from qlorachat.training.data.rows import BadRow, Rows
from qlorachat.training.data.samples import Sample, Samples
from qlorachat.training.wording import printable

_SHOWN_SAMPLES, _SHOWN_BAD = 3, 20
_LONGEST_PIECE = _LONGEST_REASON = 300  # characters
_TRAINED, _CONTROL, _ASIDE, _WARNING = "green", "magenta", "dim", "yellow"
_NOTHING = Samples()


class Piece(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    control: bool
    trained: bool


def preview(
    rows: Rows,
    samples: Samples,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    held_out: Samples = _NOTHING,
) -> Group:
    """Three samples with the trained part between «» and in colour, the counts, the bad rows.

    `samples`, at least one, and `held_out` were built from `rows` with this `max_length`.
    """
    bad = sorted((*rows.bad, *samples.bad, *held_out.bad), key=attrgetter("line"))
    return Group(
        *(show_sample(sample, tokenizer) for sample in samples.samples[:_SHOWN_SAMPLES]),
        show_counts(rows, samples, held_out, max_length),
        *([show_bad(bad)] if bad else []),
    )


def show_sample(sample: Sample, tokenizer: Tokenizer) -> RenderableType:
    """A sample's text with control tokens by name; long pieces lose their middle."""
    text = Text()
    for trained, run in groupby(split_pieces(sample, tokenizer), key=attrgetter("trained")):
        text.append("«" if trained else "", _TRAINED)
        for piece in run:
            style = _CONTROL if piece.control else _TRAINED if trained else ""
            text.append(_shortened(printable(piece.text)), style)
        text.append("»" if trained else "", _TRAINED)
    cut = ", cut" if sample.truncated else ""
    title = f"line {sample.line}: {len(sample.ids)} tokens{cut}, «{sample.trained.sum()} trained»"
    return Panel(text, title=Text(title), title_align="left", border_style=_ASIDE)


def show_counts(rows: Rows, samples: Samples, held_out: Samples, max_length: int) -> Text:
    """How many rows, tokens and cut samples, and which max_length would cut none or one in 20."""
    total = len(rows.rows) + len(rows.bad)
    learned, judged = len(samples.samples), len(held_out.samples)
    bad = sum(len(part.bad) for part in (rows, samples, held_out))
    cut = samples.truncated + held_out.truncated
    lengths = samples.lengths + held_out.lengths
    most = int(np.quantile(lengths, 0.95, method="inverted_cdf"))
    return Text.assemble(
        f"{total:,} rows of {printable(rows.name)}: {learned:,} samples to learn, {judged:,} held "
        "out, ",
        (f"{bad:,} bad ({_share(bad, total)})", _WARNING if bad else ""),
        f"\n{samples.tokens:,} tokens to learn from, ",
        (f"«{samples.trained_tokens:,} trained»", _TRAINED),
        f" ({_share(samples.trained_tokens, samples.tokens)})\n",
        (f"{cut:,} cut at {max_length} tokens", _WARNING if cut else ""),
        f" ({_share(cut, learned + judged)}); a max_length of {max(lengths)} would fit all, ",
        f"{most} would fit 95 %",
    )


def show_bad(bad: Sequence[BadRow]) -> Text:
    """The first of the bad rows with their lines, and how many more there are."""
    lines = [f"  line {row.line}: {_reason(row)}" for row in bad[:_SHOWN_BAD]]
    if len(bad) > _SHOWN_BAD:
        lines.append(f"  and {len(bad) - _SHOWN_BAD:,} more")
    return Text.assemble(("Bad rows, left out:", _WARNING), "\n", "\n".join(lines))


def split_pieces(sample: Sample, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A sample in pieces whose texts join to the whole; each control token is one by name."""
    names = {token: name for name, token in tokenizer.control_tokens.items()}
    tokens = zip(sample.ids.tolist(), sample.trained.tolist(), strict=True)
    for control, run in groupby(tokens, key=lambda token: token[0] in names):
        if control:
            yield from (Piece(names[token], True, trained) for token, trained in run)
        else:
            yield from _text_pieces(list(run), tokenizer)


def _text_pieces(run: Sequence[tuple[int, bool]], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Cut from the text of the whole run: a piece decoded alone would lose spaces and bytes."""
    ids = [token for token, _ in run]
    text, start, count = tokenizer.decode(ids), 0, 0
    for trained, part in groupby(run, key=itemgetter(1)):
        count += len(list(part))
        end = len(tokenizer.decode(ids[:count]))
        yield Piece(text[start:end], False, trained)
        start = end


def _shortened(text: str) -> str:
    """At most 300 characters and a note, in place of the middle, of how many are not shown."""
    hidden = len(text) - _LONGEST_PIECE
    half = _LONGEST_PIECE // 2
    return f"{text[:half]} …({hidden:,} characters)… {text[-half:]}" if hidden > 0 else text


def _reason(row: BadRow) -> str:
    reason = " ".join(printable(row.reason).split())
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]}…"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}".replace("%", " %")
