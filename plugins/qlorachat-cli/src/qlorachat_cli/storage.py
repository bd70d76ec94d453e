"""The chat's files: in one folder, for their owner only, each written whole or not at all."""

import contextlib
import os
import re
import tempfile
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, ValidationError

from qlorachat import Message
from qlorachat.errors import ConfigError, UnknownName, UsageError
from qlorachat_cli.conversation import Conversation
from qlorachat_cli.plugin import CliOptions
from qlorachat_cli.settings import checked

CHAT_NAME = re.compile(r"\w[\w.-]{0,59}")  # no separator, no leading dot; 60 x 4 bytes fit a name
_WINDOWS_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?")
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the history and the saved chats are."""

    folder: Path
    keeps_history: bool

    @classmethod
    def of(cls, options: CliOptions) -> "Storage":
        """The folder that the options name, else the user's own."""
        folder = options.folder or user_data_path("qlorachat", appauthor=False)
        return cls(folder.expanduser(), options.history)

    @property
    def history(self) -> Path | None:
        """The history file; None when it is off."""
        return self.folder / "history" if self.keeps_history else None

    @property
    def chats(self) -> "Chats":
        """The saved chats."""
        return Chats(self.folder / "chats")

    def prepare(self) -> None:
        """Make the folders and the history file, readable by their owner only."""
        try:
            for folder in (self.folder, self.chats.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.history:
                self.history.touch(mode=0o600)
                self.history.chmod(0o600)
        except OSError as error:
            raise ConfigError(
                f"The chat can't write to {self.folder} ({error.strerror}): choose another folder "
                "(option folder of the frontend cli).",
                param="folder",
            ) from None


class SavedChat(BaseModel):
    """A chat as it lies on disk."""

    model_config = ConfigDict(extra="forbid")

    messages: list[dict[str, str]]
    system: str | None = None
    adapter: str | None = None
    settings: dict[str, Any] = {}

    @classmethod
    def of(cls, conversation: Conversation) -> "SavedChat":
        return cls(
            messages=[{"role": m.role, "content": m.content} for m in conversation.messages],
            system=conversation.system,
            adapter=conversation.adapter,
            settings=dict(conversation.settings),
        )

    def conversation(self, name: str) -> Conversation:
        """The chat as a value; a UsageError when it holds what no chat can."""
        return Conversation(
            messages=tuple(Message.parse(message) for message in self.messages),
            system=self.system,
            adapter=self.adapter,
            settings={key: checked(key, value) for key, value in self.settings.items()},
            name=name,
        )


@dataclass(frozen=True, slots=True)
class Chats:
    """Saved chats by name: one JSON file each, never outside `folder`."""

    folder: Path

    def names(self) -> list[str]:
        """The names that `load` takes, sorted."""
        stems = (path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))
        return sorted(stem for stem in stems if CHAT_NAME.fullmatch(stem))

    def save(self, name: str, conversation: Conversation) -> Conversation:
        """Write the chat, and return it under its name; another chat's name is refused."""
        name = checked_name(name)
        path = self._path(name)
        if path.exists() and conversation.name != name:
            raise UsageError(f"There is another chat named `{name}`: choose another name.")
        try:
            _write_whole(path, SavedChat.of(conversation).model_dump_json(indent=1))
        except OSError as error:
            raise UsageError(f"{path} can't be written ({error.strerror}).") from None
        return replace(conversation, name=name)

    def load(self, name: str) -> Conversation:
        """Read a chat back; UnknownName or UsageError in one line."""
        name = checked_name(name)
        path = self._path(name)
        if not path.exists():
            raise UnknownName("chat", name, self.names())
        try:
            saved = SavedChat.model_validate_json(path.read_text(encoding="utf-8"))
            return saved.conversation(name)
        except OSError as error:
            raise UsageError(f"{path} can't be read ({error.strerror}).") from None
        except ValidationError as error:
            raise UsageError(f"{path} holds no chat: {error.errors()[0]['msg']}.") from None
        except ValueError:
            raise UsageError(f"{path} holds no chat: it is not UTF-8 text.") from None

    def _path(self, name: str) -> Path:
        path = self.folder / f"{name}{_SUFFIX}"
        if path.resolve().parent != self.folder.resolve():
            raise UsageError(f"The chat `{name}` is a link out of {self.folder}.")
        return path


def checked_name(name: str) -> str:
    """The name in one Unicode form; UsageError for one that can't be a file of every system."""
    name = unicodedata.normalize("NFC", name)
    if not CHAT_NAME.fullmatch(name) or _WINDOWS_DEVICES.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} can't name a chat: use up to 60 letters, digits, `_`, `-` and `.`, "
            "with a letter, digit or `_` first, and no device name of Windows."
        )
    return name


def _write_whole(path: Path, text: str) -> None:
    """Replace `path` by a file of its owner's; a crash leaves the old one or the new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
