"""Request ids, the access log and the last catch; neither holds keys, prompts or replies."""

import logging
import re
import traceback
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlorachat_http.errors import api_error

log = logging.getLogger("qlorachat.http")

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)  # what of a caller's id is safe in a log
CLIENT_CLOSED_REQUEST = 499  # in the log only: nobody is there to read a status


class AccessLog:
    """Outermost ASGI middleware: names, times and logs each request, and answers for our bugs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = _Exchange(scope, receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            log_failure(error, exchange.id)
            if exchange.status is None:
                await api_error(error, alive=True).response()(scope, receive, exchange.send)
        finally:
            exchange.log()


class _Exchange:
    """One request and its response as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = request_id(Headers(scope=scope).get("x-request-id", ""))
        self.status: int | None = None
        self._scope, self._receive, self._send = scope, receive, send
        self._started = perf_counter()
        self._complete = False
        self._gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._complete:
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        elif not message.get("more_body"):
            self._complete = True
        await self._send(message)

    def log(self) -> None:
        host, port = self._scope.get("client") or ("-", 0)
        path = self._scope.get("raw_path", b"").decode("ascii", "replace")  # still %-escaped
        gone = self._gone or self.status is None
        log.info(
            '%s:%d "%s %s" %d %.3f s %s',
            host,
            port,
            self._scope["method"],
            path,
            CLIENT_CLOSED_REQUEST if gone else self.status,
            perf_counter() - self._started,
            self.id,
        )


def request_id(sent: str) -> str:
    """The caller's own id where it is a plain word, else a new one."""
    return sent if REQUEST_ID.fullmatch(sent) else uuid4().hex


def log_failure(error: Exception, where: str) -> None:
    """Log an exception's type and place; its message may hold what a caller wrote."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed with %s\n%s", where, type(error).__name__, frames)
