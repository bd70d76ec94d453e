"""The door of the page: who may come in, from where, and which of Gradio's routes are open."""

import base64
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")

# What the page and Gradio's client call. Gradio has more routes, which read, take, fetch or convert
# files; this page needs none of them.
API = "/gradio_api/"
OPEN = tuple(
    API + route
    for route in (
        "app_id",
        "cancel",
        "heartbeat/",
        "info",
        "queue/",
        "reset",
        "run/",
        "startup-events",
    )
)


class Guard:
    """ASGI middleware around the page.

    `hosts` are the names that a request's Host header may have (None: any); on loopback they stop
    a web site whose name was rebound to 127.0.0.1. A request that another site's page sends is
    refused. With a `password` every route asks for it (HTTP Basic, RFC 7617).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str] | None = None,
        user: str = "",
        password: str | None = None,
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else set(hosts)
        self._credentials = None if password is None else f"{user}:{password}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return PlainTextResponse("This page is not served under that name.", 403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return PlainTextResponse("This page answers no other site.", 403)
        if not self._admitted(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="qlorachat", charset="UTF-8"'}
            return PlainTextResponse("This page asks for a password.", 401, challenge)
        if scope["path"].startswith(API) and not scope["path"].startswith(OPEN):
            return PlainTextResponse("This page has no such route.", 404)
        return None

    def _admitted(self, authorization: str) -> bool:
        if self._credentials is None:
            return True
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, self._credentials)


def _name(host: str) -> str:
    """The host name of a Host header, without its port; "" for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
