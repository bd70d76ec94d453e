"""Answers as server-sent events: one line of JSON each, `[DONE]` last, also after an error."""

import json
from collections.abc import AsyncIterator

from qlorachat.errors import QlorachatError
from qlorachat_http.access import log_failure
from qlorachat_http.errors import ApiError, api_error
from qlorachat_http.formats import Json, ReplyFormat
from qlorachat_http.generations import Generations

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
MEDIA_TYPE = "text/event-stream"
PING = b": ping\n\n"  # a comment: keeps proxies and clients from giving up
DONE = b"data: [DONE]\n\n"


async def sse(generations: Generations, reply_format: ReplyFormat) -> AsyncIterator[bytes]:
    """The bytes of a stream; a failure under way becomes an event, never a cut connection."""
    try:
        async for event in _events(generations, reply_format):
            yield event
    except Exception as error:
        if not isinstance(error, ApiError | QlorachatError):
            log_failure(error, "a stream")
        yield _event(api_error(error, alive=generations.alive).body)
    yield DONE


async def _events(generations: Generations, reply_format: ReplyFormat) -> AsyncIterator[bytes]:
    for index in range(generations.count):
        if opening := reply_format.opening(index):
            yield _event(opening)
    async for piece in generations.pieces():
        yield PING if piece is None else _event(reply_format.chunk(piece))
    if reply_format.include_usage:
        yield _event(reply_format.usage_chunk(generations.replies))


def _event(data: Json) -> bytes:
    line = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {line}\n\n".encode()
