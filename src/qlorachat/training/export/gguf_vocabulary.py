"""A checkpoint's tokenizer as GGUF stores it: only kinds that llama.cpp splits as the model's own.

Those are SentencePiece's BPE, as Llama-2 has it, and byte-level BPE with a known pre-tokenizer.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]  # made at import
    ModelProto,
    TrainerSpec,
)

from qlorachat.checkpoints import read_tokenizer
from qlorachat.checkpoints.files import read_json
from qlorachat.errors import ConfigError

_ADDED_SCORE = -1000.0  # as llama.cpp's converter: of a piece that no merge makes

# a pre-tokenizer's steps with the settings that change its splits -> llama.cpp's name for it
_PRE_TOKENIZERS = {
    '[["Digits", true], ["ByteLevel", false, true]]': "smollm",
    '[["ByteLevel", false, true]]': "gpt-2",
}
_SETTINGS = {"Digits": ("individual_digits",), "ByteLevel": ("add_prefix_space", "use_regex")}


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its text, its rank among SentencePiece's merges, and what it is."""

    text: bytes
    score: float
    kind: TokenType


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Every token by id, and what is said beside them."""

    folder: Path
    pieces: tuple[Piece, ...]
    model: str  # GGUF's: "gpt2" is byte-level BPE, "llama" SentencePiece
    pre_tokenizer: str
    space_prefix: bool  # SentencePiece's dummy prefix
    special: Mapping[str, int] = field(default_factory=dict)  # where no other file says

    def add_to(self, writer: GGUFWriter) -> None:
        """Tokens, merges, special tokens and the chat template."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list([piece.text for piece in self.pieces])
        writer.add_token_types([piece.kind for piece in self.pieces])
        writer.add_add_space_prefix(self.space_prefix)
        if self.model == "llama":
            writer.add_token_scores([piece.score for piece in self.pieces])
        found = SpecialVocab(
            self.folder, load_merges=self.model == "gpt2", n_vocab=len(self.pieces)
        )
        found.special_token_ids = {**self.special, **found.special_token_ids}
        found.add_special_token["bos"] = read_tokenizer(self.folder).adds_bos
        found.add_to_gguf(writer, quiet=True)


def read_vocabulary(folder: Path, *, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint folder, filled up to the `size` of the model's embedding.

    ConfigError for a tokenizer whose ids llama.cpp would not be sure to give.
    """
    fast = read_json(folder / "tokenizer.json")
    if (fast.get("decoder") or {}).get("type") == "ByteLevel":
        return _byte_level(folder, fast, size)
    if (folder / "tokenizer.model").exists():
        return _sentencepiece(folder, size)
    raise _refusal(folder, "it has no tokenizer.model, which alone ranks its merges")


def _byte_level(folder: Path, fast: Mapping[str, Any], size: int) -> Vocabulary:
    model = fast["model"]
    steps = json.dumps(list(_steps(fast.get("pre_tokenizer"))))
    changed = fast.get("normalizer") or model.get("ignore_merges") or model.get("byte_fallback")
    if model["type"] != "BPE" or steps not in _PRE_TOKENIZERS or changed:
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise _refusal(folder, f"its way to split text is none of those known here ({known})")
    pieces = {i: Piece(text.encode(), 0.0, TokenType.NORMAL) for text, i in model["vocab"].items()}
    return Vocabulary(
        folder,
        _filled(folder, pieces, size),
        model="gpt2",
        pre_tokenizer=_PRE_TOKENIZERS[steps],
        space_prefix=False,
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[list[Any]]:
    """Each step's type and the settings that change a split."""
    if pre_tokenizer is None:
        return
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        yield [step["type"], *(step.get(name) for name in _SETTINGS.get(step["type"], ()))]


def _sentencepiece(folder: Path, size: int) -> Vocabulary:
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != TrainerSpec.BPE:
        raise _refusal(folder, "its tokenizer.model is no BPE, which llama.cpp takes it for")
    if normalizer.name != "identity" or normalizer.remove_extra_whitespaces:
        raise _refusal(folder, "its tokenizer.model changes the text, which llama.cpp does not")
    # GGUF numbers the kinds as SentencePiece does
    pieces = {
        i: Piece(piece.piece.encode(), piece.score, TokenType(piece.type))
        for i, piece in enumerate(model.pieces)
    }
    special = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    return Vocabulary(
        folder,
        _filled(folder, pieces, size),
        model="llama",
        pre_tokenizer="default",
        space_prefix=normalizer.add_dummy_prefix,
        special={name: i for name, i in special.items() if i >= 0},
    )


def _filled(folder: Path, pieces: Mapping[int, Piece], size: int) -> tuple[Piece, ...]:
    """The vocabulary's pieces, those added to it, and unused ones up to the model's size."""
    whole = {**pieces, **{i: _added(entry, pieces.get(i)) for i, entry in _added_tokens(folder)}}
    if (last := max(whole)) >= size:
        raise _refusal(folder, f"it has a token {last}, but the model no more than {size}")
    unused = (Piece(b"[PAD%d]" % i, _ADDED_SCORE, TokenType.UNUSED) for i in range(size))
    return tuple(whole.get(i, spare) for i, spare in enumerate(unused))


def _added(entry: Mapping[str, Any], known: Piece | None) -> Piece:
    """A token that is found in text before it is split; the vocabulary may hold it already."""
    if known is not None and known.kind is not TokenType.NORMAL:
        return known
    kind = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    return Piece(entry["content"].encode(), known.score if known else _ADDED_SCORE, kind)


def _added_tokens(folder: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Ids and tokens of every file that adds some; the last to name an id knows it best."""
    for text, i in read_json(folder / "added_tokens.json").items():
        yield i, {"content": text, "special": False}
    config = read_json(folder / "tokenizer_config.json")
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        yield int(key), {"special": False, **entry}
    for entry in read_json(folder / "tokenizer.json").get("added_tokens") or []:
        yield entry["id"], entry


def _refusal(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"The tokenizer in {folder} cannot be written as GGUF: {reason}. Leave --gguf out and use "
        "llama.cpp's own converter on the merged folder.",
        param="gguf",
    )
