"""uvicorn on a socket of ours, ended by an event: first the answers under way, then the server."""

import asyncio
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

import uvicorn

from qlorachat import ChatEngine
from qlorachat.errors import UnknownName
from qlorachat_http.app import create_app
from qlorachat_http.deadlines import Deadlines, PatientProtocol
from qlorachat_http.plugin import HttpOptions
from qlorachat_http.service import Service

log = logging.getLogger("qlorachat.http")

POLL_SECONDS = 0.1


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the host has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def serve(engine: ChatEngine, options: HttpOptions, listener: socket.socket, stop: Event) -> None:
    """Serve until `stop` is set and the answers under way have ended; blocks."""
    with listener:
        default = options.default_adapter
        if default is not None and default not in engine.adapters:
            raise UnknownName("adapter", default, engine.adapters)
        asyncio.run(_serve(Service(engine, options), listener, stop))


async def _serve(service: Service, listener: socket.socket, stop: Event) -> None:
    server = Server(_config(service))
    host, port = listener.getsockname()[:2]
    log.info("http serves %s at http://%s:%d/v1", service.models.base, _in_url(host), port)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (stop.is_set() or running.done()):  # noqa: ASYNC110  `stop` is no asyncio event
        await asyncio.sleep(POLL_SECONDS)
    await service.drain(service.options.drain_seconds)
    server.should_exit = True
    await running


def _config(service: Service) -> uvicorn.Config:
    options = service.options
    deadlines = Deadlines(options.head_seconds, options.body_seconds, options.stall_seconds)
    return uvicorn.Config(
        create_app(service),
        http=type("Protocol", (PatientProtocol,), {"deadlines": deadlines}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # any caller on this machine could write them
        timeout_keep_alive=math.ceil(options.head_seconds),
        timeout_graceful_shutdown=1,  # after the drain: only what never became a request
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
