"""Reading a checkpoint's small files; a pointer or a broken file is one clear error."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlorachat.errors import ModelError

_LFS_POINTER = b"version https://git-lfs"


def refuse_pointer(file: Path) -> None:
    """ModelError for a Git LFS pointer in the place of a file."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"{file} is a Git LFS pointer, not the file: run `git lfs pull` in its folder."
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    if not file.exists():
        return {}
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text("utf-8"))
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
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    template = tokenizer.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
