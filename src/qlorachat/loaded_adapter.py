"""An adapter under the name that people call it by, and what its card says beside how it serves."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qlorachat.adapters import Adapter, AdapterCard
from qlorachat.config import EngineConfig
from qlorachat.errors import AdapterError
from qlorachat.protocols import ModelInfo

ADAPTER_NAME = re.compile(r"\w[\w.-]{0,63}")  # no slash, colon or leading dot: safe in URLs, paths


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A name and its adapter."""

    name: str
    adapter: Adapter

    @property
    def template(self) -> str | None:
        return self.adapter.card.template if self.adapter.card else None

    @property
    def system(self) -> str | None:
        return self.adapter.card.system if self.adapter.card else None


def check_adapter_name(name: str) -> None:
    """AdapterError for a name that is not safe in URLs and paths."""
    if not ADAPTER_NAME.fullmatch(name):
        raise AdapterError(
            f"`{name}` can't name an adapter: use up to 64 letters, digits, `_`, `-` and `.`, "
            "with a letter, digit or `_` first."
        )


def differences(adapter: Adapter, info: ModelInfo, config: EngineConfig) -> Iterator[str]:
    """What is served otherwise than the adapter was trained, a line each."""
    card = adapter.card or AdapterCard()
    compared = (
        ("the quantization", card.quantization, info.quantization or None),
        ("the template", card.template, config.template),
        ("the system prompt", card.system, config.system),
        ("the base's revision", card.revision, config.revision),
    )
    for what, trained, served in compared:
        if trained is not None and served is not None and trained != served:
            yield f"{what} was {trained!r} in training and is {served!r} here."
