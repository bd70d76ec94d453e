"""The routes that everyone may call: models, chat, completions, health."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from qlorachat import AsyncChatStream, ChatEngine
from qlorachat.errors import ContextOverflow
from qlorachat_http.errors import ApiError, no_model
from qlorachat_http.formats import ChatFormat, CompletionFormat, ReplyFormat
from qlorachat_http.generations import Generations, unless_gone
from qlorachat_http.schemas import ChatBody, CompletionBody, GenerationBody
from qlorachat_http.service import Service
from qlorachat_http.sse import HEADERS, MEDIA_TYPE, sse


async def _closing() -> AsyncIterator[AsyncExitStack]:
    """What is entered here is left when the response is sent, or its client gone."""
    async with AsyncExitStack() as stack:
        yield stack


Closing = Annotated[AsyncExitStack, Depends(_closing)]


def public_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        service.check_available()
        return {"status": "ok"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(service.models.cards().values())}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        cards = service.models.cards()
        if name not in cards:
            raise no_model(name)
        return cards[name]

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request, closing: Closing) -> Response:
        options = _options(service, body)
        dialog = [{"role": turn.role, "content": turn.content} for turn in body.messages]
        streams = _streams(service.engine, [dialog], body.choices, options)
        reply_format = ChatFormat(
            body.model,
            choices=body.choices,
            logprobs=bool(body.logprobs),
            include_usage=body.include_usage,
        )
        return await _answer(service, request, closing, body, streams, reply_format)

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request, closing: Closing) -> Response:
        options = _options(service, body)
        prompts = [await asyncio.to_thread(service.engine.raw, text) for text in body.prompt]
        streams = _streams(service.engine, prompts, body.choices, options)
        reply_format = CompletionFormat(
            body.model,
            choices=body.choices,
            logprobs=body.logprobs is not None,
            include_usage=body.include_usage,
        )
        try:
            return await _answer(service, request, closing, body, streams, reply_format)
        except ContextOverflow as error:
            error.param = "prompt"
            raise

    return router


def _options(service: Service, body: GenerationBody) -> dict[str, Any]:
    """What the engine is asked for, checked as far as can be without the prompt."""
    adapter = _adapter(service, body)
    return body.options() | {"adapter": adapter}


def _adapter(service: Service, body: GenerationBody) -> str | None:
    """The adapter that the model id or `lora` names; they may not name two."""
    adapter = service.models.adapter(body.model)
    if not body.lora:
        return adapter
    name = body.lora[0].name or body.lora[0].id or ""
    if name not in service.engine.adapters:
        raise no_model(name, "lora")
    if adapter not in (None, name):
        message = "`model` and `lora` name two adapters; a request has one."
        raise ApiError(400, message, code="invalid_value", param="lora")
    return name


def _streams(
    engine: ChatEngine, dialogs: list[Any], choices: int, options: dict[str, Any]
) -> list[AsyncChatStream]:
    """`choices` streams for each dialog; the i-th of a dialog has the seed plus i."""
    seed = options.get("seed")
    seeds = [{} if seed is None else {"seed": seed + index} for index in range(choices)]
    return [
        engine.astream(dialog, **(options | changed)) for dialog in dialogs for changed in seeds
    ]


async def _answer(
    service: Service,
    request: Request,
    closing: AsyncExitStack,
    body: GenerationBody,
    streams: list[AsyncChatStream],
    reply_format: ReplyFormat,
) -> Response:
    generations = Generations(service, streams)
    closing.push_async_callback(generations.aclose)
    await generations.open()
    if body.stream:
        return StreamingResponse(
            sse(generations, reply_format), media_type=MEDIA_TYPE, headers=HEADERS
        )
    replies = await unless_gone(request, generations.finish())
    return JSONResponse(reply_format.whole(replies))
