"""The door: host, key, content type and size are checked before the app reads a body."""

import hmac

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlorachat.listening import is_loopback
from qlorachat_http.errors import ApiError
from qlorachat_http.plugin import HttpOptions

OPEN_PATHS = {"/health"}  # no key needed
CLOSE = {"connection": "close"}  # a refused request's body is not read


class Gate:
    """ASGI middleware; everything but OPEN_PATHS needs a key where one is set."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app = app
        self._loopback = is_loopback(options.host)
        self._needs_key = options.api_key is not None
        self._keys = [key for key in (options.api_key, options.admin_key) if key is not None]
        self._max_body = options.max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if self._loopback:
            _check_host(headers.get("host", ""))
        if self._needs_key and path not in OPEN_PATHS:
            check_key(headers, self._keys)
        if method == "POST":
            _check_content_type(headers.get("content-type", ""))
            if int(headers.get("content-length", 0)) > self._max_body:
                raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops reading a body at the limit, whatever length it was said to have."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"The body has more than {self._max_body} bytes."
        return ApiError(413, message, code="request_too_large", headers=CLOSE)


def check_key(headers: Headers, keys: list[SecretStr]) -> None:
    """401 unless the Authorization header bears one of the keys; takes the same time for each."""
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    token = sent.strip().encode("latin-1")
    fits = [hmac.compare_digest(token, key.get_secret_value().encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(fits):
        raise ApiError(
            401,
            "Send the right key: `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer", **CLOSE},
        )


def _check_host(host: str) -> None:
    """403 for a foreign name: a web page whose name was made to point here (DNS rebinding)."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if not is_loopback(name.strip("[]").lower()):
        raise ApiError(
            403,
            "This server listens on this machine only: call it as localhost or 127.0.0.1.",
            code="host_not_allowed",
            headers=CLOSE,
        )


def _check_content_type(content_type: str) -> None:
    """415 for what a web page may send without asking first (CSRF)."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415,
            "Send the body as `Content-Type: application/json`.",
            code="unsupported_media_type",
            headers=CLOSE,
        )
