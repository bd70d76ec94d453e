"""What the host sees: the frontend `gradio` and its options; importing this imports no gradio."""

import socket
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from qlorachat import hookimpl
from qlorachat.listening import listen

if TYPE_CHECKING:
    from qlorachat import ChatEngine, Frontend


class GradioOptions(BaseModel):
    """Where the page is served, and to whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="address to listen on; all but loopback needs a password"
    )
    port: int = Field(7860, ge=0, le=65535, description="port to listen on; 0: any free one")
    password: SecretStr | None = Field(None, min_length=1, description="asked of every visitor")
    user: str = Field("user", description="the name that goes with the password")
    title: str = Field("qlorachat", description="heading of the page")
    open_browser: bool = Field(False, description="show the page in this machine's browser")
    concurrency: int = Field(8, ge=1, description="visitors served at a time; the others queue")
    queue_size: int = Field(64, ge=1, description="visitors who may queue; one more is refused")


class GradioFrontend:
    """A chat page in the browser."""

    name = "gradio"
    summary = "a chat page in the browser, in English and Japanese"
    options = GradioOptions

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    def prepare(self, options: GradioOptions) -> None:
        """Take the port, so that a busy one is found before the model loads."""
        protected = options.password is not None
        self.socket = listen(options.host, options.port, protected=protected, frontend=self.name)

    def serve(self, engine: "ChatEngine", options: GradioOptions, stop: Event) -> None:
        """Serve the page on the prepared socket until `stop` is set."""
        from qlorachat_gradio.server import serve  # deferred: gradio takes seconds to import

        assert self.socket is not None, "prepare() comes first"
        serve(engine, options, self.socket, stop)


@hookimpl
def register_frontends(register: "Callable[[Frontend[Any]], None]") -> None:
    register(GradioFrontend())
