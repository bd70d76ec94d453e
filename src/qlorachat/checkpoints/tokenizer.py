"""A checkpoint's tokenizer files become a tokenizer with exact ids, whatever form they have.

Loading by the class that tokenizer_config.json names changes Llama-2's ids (transformers 5.24), so
the vocabulary files themselves decide, and a Llama-2 vocabulary is checked against known ids.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from qlorachat.checkpoints.fast_tokenizer import FastTokenizer
from qlorachat.checkpoints.files import (
    added_tokens_decoder,
    read_json,
    refuse_pointer,
    token_text,
)
from qlorachat.errors import ModelError
from qlorachat.protocols import Tokenizer

# pieces that together mark the Llama-2 vocabulary, and what it must make of two turns
_LLAMA2_PIECES = {"▁[": 518, "INST": 25580, "]": 29962}
_LLAMA2_TURNS = {
    "[INST] Hi [/INST]": [518, 25580, 29962, 6324, 518, 29914, 25580, 29962],
    "[INST]  [/INST]": [518, 25580, 29962, 29871, 518, 29914, 25580, 29962],
}


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its files alone; nothing of theirs is run.

    tokenizer.json comes first, then tokenizer.model (SentencePiece), then vocab.json and
    merges.txt. Raises ModelError when there is none, or none that gives the right ids.
    """
    backend = _read_backend(folder)
    _check_size(folder, backend)
    config = {
        **_ends_by_id(folder),
        **read_json(folder / "special_tokens_map.json"),
        **read_json(folder / "tokenizer_config.json"),
    }
    return FastTokenizer(
        backend,
        bos_token=_known(backend, config.get("bos_token")),
        eos_token=_known(backend, config.get("eos_token")),
        pad_token=_known(backend, config.get("pad_token")),
        unk_token=_known(backend, config.get("unk_token")),
        adds_bos=_adds_bos(folder, backend, config),
    )


def _read_backend(folder: Path) -> Backend:
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.exists():
        backend = _from_json(json_file)
        if _is_exact(backend):
            return backend
        if not model_file.exists():
            raise ModelError(
                f"{json_file} splits Llama-2 text otherwise than the model was trained (a known "
                "fault of some converters): put the model's original tokenizer.model beside it."
            )
    if model_file.exists():
        return _with_added_tokens(folder, _from_sentencepiece(model_file))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _from_transformers(folder)
    raise ModelError(
        f"{folder} has no tokenizer: put the model's tokenizer.json or tokenizer.model there."
    )


def _from_json(file: Path) -> Backend:
    refuse_pointer(file)
    try:
        return Backend.from_file(str(file))
    except Exception as error:
        raise ModelError(f"{file} cannot be read ({error}): bring it again.") from error


def _from_sentencepiece(file: Path) -> Backend:
    """Converted by transformers from the file alone, which a config beside it would misguide."""
    refuse_pointer(file)
    with TemporaryDirectory() as alone:
        shutil.copy(file, Path(alone) / "tokenizer.model")
        backend = _from_transformers(Path(alone), shown=file)
    if not _is_exact(backend):
        raise ModelError(
            f"{file} gives wrong ids for Llama-2 turns with this version of transformers: put the "
            "model's tokenizer.json beside it."
        )
    return backend


def _from_transformers(folder: Path, shown: Path | None = None) -> Backend:
    # transformers takes seconds to import, and a tokenizer.json does without it
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        backend = loaded.backend_tokenizer
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{shown or folder} cannot be read as a tokenizer ({reason}): put the model's "
            "tokenizer.json there."
        ) from error
    assert isinstance(backend, Backend)
    return backend


def _with_added_tokens(folder: Path, backend: Backend) -> Backend:
    """The tokens that a fine-tune put behind a SentencePiece vocabulary, under their own ids."""
    named = read_json(folder / "added_tokens.json")
    if not all(isinstance(i, int) for i in named.values()):
        raise ModelError(f"{folder / 'added_tokens.json'} has tokens without ids: bring it again.")
    tokens = {i: AddedToken(text) for text, i in named.items()}
    config = read_json(folder / "tokenizer_config.json")
    for i, entry in added_tokens_decoder(folder, config).items():
        names = ("special", "normalized", "lstrip", "rstrip")
        flags = {flag: bool(entry.get(flag)) for flag in names}
        tokens[i] = AddedToken(entry["content"], **flags)
    for i, token in sorted(tokens.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ModelError(
                f"{folder} gives the added token `{token.content}` id {i}, which does not follow "
                "its vocabulary: put the model's tokenizer.json there."
            )
    return backend


def _is_exact(backend: Backend) -> bool:
    """False for a Llama-2 vocabulary that does not give Llama-2's ids; true for all others."""
    return not _is_llama2(backend) or all(
        backend.encode(turn, add_special_tokens=False).ids == ids
        for turn, ids in _LLAMA2_TURNS.items()
    )


def _is_llama2(backend: Backend) -> bool:
    return all(backend.token_to_id(piece) == i for piece, i in _LLAMA2_PIECES.items())


def _check_size(folder: Path, backend: Backend) -> None:
    tokens, wanted = backend.get_vocab_size(), read_json(folder / "config.json").get("vocab_size")
    if isinstance(wanted, int) and tokens < wanted // 2:
        raise ModelError(
            f"The tokenizer in {folder} knows {tokens} tokens but the model {wanted}: bring the "
            "model's own tokenizer files."
        )


def _ends_by_id(folder: Path) -> dict[str, object]:
    """bos_token and eos_token as ids, for folders that do not name them."""
    model_file, config = folder / "tokenizer.model", read_json(folder / "config.json")
    if (folder / "tokenizer.json").exists() or not model_file.exists():
        return {"bos_token": config.get("bos_token_id"), "eos_token": config.get("eos_token_id")}
    pieces = SentencePieceProcessor(model_file=str(model_file))
    return {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}


def _known(backend: Backend, token: object) -> str | None:
    """A token by name or id, None where the vocabulary does not hold it."""
    if isinstance(token, int):
        return backend.id_to_token(token) if token >= 0 else None
    text = token_text(token)
    return text if text and backend.token_to_id(text) is not None else None


def _adds_bos(folder: Path, backend: Backend, config: Mapping[str, Any]) -> bool:
    """As tokenizer_config.json says, else as Llama's vocabularies want, else as tokenizer.json."""
    if isinstance(said := config.get("add_bos_token"), bool):
        return said
    if _is_llama2(backend) or not (folder / "tokenizer.json").exists():
        return True
    bos = _known(backend, config.get("bos_token"))
    return bos is not None and bos in backend.encode("", add_special_tokens=True).tokens[:1]
