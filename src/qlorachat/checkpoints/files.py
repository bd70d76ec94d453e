"""Reading a checkpoint's small files; a pointer or a broken file is one clear error."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlorachat.errors import ModelError

_LFS_POINTER = b"version https://git-lfs"


@contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turns what the system says of a file that can't be read into a ModelError."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read ({error.strerror or error}): correct that and try again."
        ) from error


def refuse_pointer(file: Path) -> None:
    """ModelError for a Git LFS pointer in the place of a file, and for one that can't be read."""
    with explained(file), file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the file: run `git lfs pull` in its folder."
            )


def read_text(file: Path) -> str | None:
    """The text of a small file, None for an absent one."""
    with explained(file):
        if not file.exists():
            return None
        refuse_pointer(file)
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{file} is no UTF-8 ({error}): bring it again.") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if (text := read_text(file)) is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{file} is no JSON ({error}): bring it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no JSON object: bring it again.")
    return value


def token_text(value: object) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_template_source(folder: Path, tokenizer: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json, of several the default."""
    if (text := read_text(folder / "chat_template.jinja")) is not None:
        return text
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) for entry in template):
            raise _wrong_tokenizer_config(folder, "a chat_template without names")
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def added_tokens_decoder(folder: Path, tokenizer: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens by id as tokenizer_config.json has them: each a JSON object with its content."""
    decoder = tokenizer.get("added_tokens_decoder") or {}
    try:
        tokens = {int(i): entry for i, entry in decoder.items()}
        whole = all(isinstance(entry["content"], str) for entry in tokens.values())
    except (AttributeError, TypeError, ValueError, KeyError):
        whole = False
    if not whole:
        raise _wrong_tokenizer_config(folder, "an added_tokens_decoder without contents")
    return tokens


def _wrong_tokenizer_config(folder: Path, what: str) -> ModelError:
    return ModelError(f"{folder / 'tokenizer_config.json'} has {what}: bring it again.")
