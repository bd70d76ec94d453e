"""The frontend `cli` and its options; light to import, for `qlorachat --help` reads it."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from qlorachat import Frontend, hookimpl

if TYPE_CHECKING:
    from qlorachat import ChatEngine
    from qlorachat_cli.terminal import Terminal


class CliOptions(BaseModel):
    """What the terminal chat can be told at its start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    history: bool = Field(True, description="keep what is typed in a file for the next start")
    markdown: bool = Field(True, description="show answers as formatted Markdown")
    folder: Path | None = Field(
        None,
        description="folder of the history and the saved chats; default: the user's data folder",
    )


class CliFrontend:
    """A dialog in the terminal; `terminal` replaces the real one, as in tests."""

    name = "cli"
    summary = "an interactive chat in the terminal"
    options = CliOptions

    def __init__(self, terminal: "Terminal | None" = None) -> None:
        self._terminal = terminal

    def prepare(self, options: CliOptions) -> None:
        """Make the folder and the files that the chat will write; ConfigError when that fails."""
        from qlorachat_cli.storage import Storage  # deferred: --help must not import prompt_toolkit

        Storage.of(options).prepare()

    def serve(self, engine: "ChatEngine", options: CliOptions, stop: Event) -> None:
        """Talk until the person leaves or `stop` is set."""
        from qlorachat_cli.shell import open_shell  # deferred, as above

        open_shell(engine, options, stop, self._terminal).run()


@hookimpl
def register_frontends(register: Callable[[Frontend[Any]], None]) -> None:
    register(CliFrontend())
