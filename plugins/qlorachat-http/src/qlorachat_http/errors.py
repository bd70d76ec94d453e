"""Every failure as the JSON error that OpenAI's clients read; no text of a caller is in one."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qlorachat.errors import (
    AdapterError,
    ConfigError,
    ContextOverflow,
    DialogError,
    EngineError,
    OutOfMemory,
    QueueFull,
    UnknownName,
    UsageError,
)

RETRY_SECONDS = 1  # in Retry-After: when a full queue is worth another try

_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed"}


class ApiError(HTTPException):
    """An error response: `{"error": {"message", "type", "param", "code", ...}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = "invalid_request_error",  # noqa: A002  the field's name in the API
        param: str | None = None,
        headers: dict[str, str] | None = None,
        **details: int,
    ) -> None:
        super().__init__(status, message, headers)
        error = {"message": message, "type": type, "param": param, "code": code, **details}
        self.body: dict[str, Any] = {"error": error}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def no_model(name: str, param: str = "model") -> ApiError:
    """404 for a model id that is neither the base nor an adapter."""
    message = f"The model `{name}` does not exist."
    return ApiError(404, message, code="model_not_found", param=param)


def unavailable(message: str, code: str) -> ApiError:
    """503: the request was right, but can't be served now."""
    return ApiError(503, message, code=code, type="unavailable_error")


def api_error(error: Exception, *, alive: bool) -> ApiError:
    """What an exception becomes; `alive` is whether the engine still is."""
    match error:
        case ApiError():
            return error
        case UsageError():
            return _usage_error(error)
        case QueueFull():
            return ApiError(
                429,
                str(error),
                code="overloaded",
                type="rate_limit_error",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        case OutOfMemory():
            return unavailable(str(error), "out_of_memory")
        case EngineError() if not alive:
            return unavailable(str(error), "engine_dead")
        case EngineError():
            return ApiError(500, str(error), code="generation_failed", type="server_error")
        case _:
            message = "The server failed at this request; its log says where."
            return ApiError(500, message, code="internal_error", type="server_error")


def _usage_error(error: UsageError) -> ApiError:
    match error:
        case ContextOverflow():
            return _context_overflow(error)
        case UnknownName(kind="adapter"):
            return no_model(error.name)
        case ConfigError():  # the operator's mistake, not the caller's
            return ApiError(500, str(error), code="misconfigured", type="server_error")
        case AdapterError():
            return ApiError(400, str(error), code="adapter_error", param=error.param)
        case DialogError():
            return ApiError(400, str(error), code="invalid_value", param=error.param or "messages")
        case _:
            return ApiError(400, str(error), code="invalid_value", param=error.param)


def _context_overflow(error: ContextOverflow) -> ApiError:
    return ApiError(
        400,
        f"The prompt has {error.prompt_tokens} tokens and {error.max_tokens} more were asked for, "
        f"but the context holds {error.context_length}: shorten the prompt, lower max_tokens, or "
        "set drop_oldest_turns.",
        code="context_length_exceeded",
        param=error.param,
        n_prompt_tokens=error.prompt_tokens,
        n_ctx=error.context_length,
    )


def http_error(error: HTTPException) -> ApiError:
    """An error of the framework (no such route, wrong method, unreadable body) in our shape."""
    if isinstance(error, ApiError):
        return error
    code = _CODES.get(error.status_code, "http_error")
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, f"{error.detail}.", code=code, headers=headers)


def validation_error(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; the value itself is not repeated."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"The body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}."
        return ApiError(400, message, code="invalid_json")
    path = [str(part) for part in first["loc"][1:]]
    if not path:
        return ApiError(400, "The body must be a JSON object.", code="invalid_json")
    field, *below = path
    where = ".".join([field, *(part for part in below if part.isascii() and part.isalnum())])
    return ApiError(400, f"`{where}` is wrong: {first['msg']}.", code="invalid_value", param=field)
