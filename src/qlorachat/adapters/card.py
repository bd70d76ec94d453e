"""qlorachat.json, the card beside an adapter: how it was trained and is to be asked."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from qlorachat.adapters.config import AdapterConfig, read_config
from qlorachat.adapters.folder import CARD, CONFIG, WEIGHTS, find_file, plain, read_object
from qlorachat.config import explain
from qlorachat.durable import file_sha256
from qlorachat.errors import AdapterError

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class AdapterCard(BaseModel):
    """What qlorachat.json may say; all of it is optional, an unknown key is an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    template: str | None = None  # prompt format that the adapter was trained with
    system: str | None = None  # system prompt that the adapter was trained with
    base_model: str | None = None
    revision: str | None = None  # of the base model
    quantization: str | None = None  # of the base model in training
    data_sha256: Sha256 | None = None  # of the training data
    versions: dict[str, str] = Field(default_factory=dict)  # library -> version in training
    sha256: dict[FileName, Sha256] = Field(default_factory=dict)  # file -> hash of its bytes


def write_card(folder: Path, card: AdapterCard) -> None:
    """Write `card` into an adapter's folder, for the bytes of its files as they are now."""
    sums = {name: file_sha256(folder / name) for name in (CONFIG, WEIGHTS)}
    whole = card.model_copy(update={"sha256": sums})
    text = whole.model_dump_json(indent=2, exclude_none=True)
    (folder / CARD).write_text(text + "\n", "utf-8")


def read_card(folder: Path) -> AdapterCard | None:
    """The card in `folder`, None where there is none; AdapterError if it is wrong."""
    path = find_file(folder, CARD)
    if path is None:
        return None
    try:
        return AdapterCard.model_validate(read_object(path))
    except ValidationError as error:
        raise AdapterError(f"{path}: {plain(explain(error, AdapterCard))}") from None


def base_model_of(folder: Path) -> tuple[str | None, str | None]:
    """The base model that an adapter is for, and its revision: by its card, else by its config.

    Reads two small files and imports no torch; AdapterError if one of them is wrong.
    """
    return base_of(read_card(folder), read_config(folder))


def base_of(
    card: AdapterCard | None, config: AdapterConfig | None
) -> tuple[str | None, str | None]:
    """The base model's name and its revision, from one file and never half from each."""
    if card is not None and card.base_model:
        return card.base_model, card.revision
    if config is not None and config.base_model_name_or_path:
        return config.base_model_name_or_path, config.revision or None
    return None, None
