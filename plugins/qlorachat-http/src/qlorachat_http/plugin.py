"""What the host sees: the frontend `http` and its options; importing this imports no fastapi."""

import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from qlorachat import hookimpl
from qlorachat.errors import ConfigError
from qlorachat.listed import Listed
from qlorachat.listening import listen

if TYPE_CHECKING:
    from qlorachat import ChatEngine, Frontend


class HttpOptions(BaseModel):
    """Where the API is served, to whom, and how long a peer may take."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on; beyond loopback set a key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    api_key: SecretStr | None = Field(None, min_length=1, description="key that callers must show")
    admin_key: SecretStr | None = Field(
        None, min_length=1, description="key for loading and unloading adapters"
    )
    adapter_root: Path | None = Field(
        None, description="folder below which adapters may be loaded over HTTP"
    )
    default_adapter: str | None = Field(
        None, description="adapter behind the base's name; the base is then `__base__`"
    )
    cors_origins: Listed = Field(
        default_factory=list,
        description="web pages' origins that may call, such as http://localhost:3000",
    )
    max_body: int = Field(2**20, ge=1024, description="largest request body, in bytes")
    head_seconds: float = Field(
        10.0, gt=0, description="for a request's headers, and for an idle connection"
    )
    body_seconds: float = Field(30.0, gt=0, description="for a request's body")
    stall_seconds: float = Field(30.0, gt=0, description="for a reader that takes nothing more")
    ping_seconds: float = Field(15.0, gt=0, description="between comments that keep a stream open")
    drain_seconds: float = Field(30.0, ge=0, description="for answers under way at the end")


class HttpFrontend:
    """The API of OpenAI's clients over one engine."""

    name = "http"
    summary = "an OpenAI-compatible HTTP API"
    options = HttpOptions

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that `prepare` bound."""
        assert self._listener is not None, "prepare() comes first"
        host, port = self._listener.getsockname()[:2]
        return host, port

    def prepare(self, options: HttpOptions) -> None:
        """Refuse options that can't work together, and take the port before the model loads."""
        _check(options)
        protected = options.api_key is not None
        self._listener = listen(options.host, options.port, protected=protected, frontend=self.name)

    def serve(self, engine: "ChatEngine", options: HttpOptions, stop: Event) -> None:
        """Serve the API on the prepared socket until `stop` is set, then let answers end."""
        from qlorachat_http.server import serve  # deferred: fastapi takes a second to import

        assert self._listener is not None, "prepare() comes first"
        serve(engine, options, self._listener, stop)


def _check(options: HttpOptions) -> None:
    if (options.admin_key is None) != (options.adapter_root is None):
        raise ConfigError("Set admin_key and adapter_root together: each needs the other.")
    if options.adapter_root is not None and not options.adapter_root.is_dir():
        raise ConfigError(
            f"The folder {options.adapter_root} does not exist.", param="adapter_root"
        )
    if "*" in options.cors_origins:
        raise ConfigError("Name each origin: `*` would let any web page in.", param="cors_origins")


@hookimpl
def register_frontends(register: "Callable[[Frontend[Any]], None]") -> None:
    """Offer the frontend."""
    register(HttpFrontend())
