"""The page's events: each turns a visitor's dialog and settings into what the page then shows."""

import html
from collections.abc import AsyncIterator, Mapping
from time import perf_counter
from typing import Any

import gradio as gr

from qlorachat import AsyncChatStream, ChatEngine, FinishReason, QlorachatError, Reply
from qlorachat_gradio.dialog import Dialog, Turn, before_last_question, shown, with_turn
from qlorachat_gradio.settings import chat_options
from qlorachat_gradio.texts import explain, language, say

REDRAW = 0.05  # seconds: faster than people read, and each redraw costs the server milliseconds

View = tuple[Any, ...]  # message box, chat, dialog, status line, send button, stop button


class Answering:
    """Answers the visitors of one engine; holds nothing of any of them."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine

    async def submit(
        self, message: str, dialog: Dialog, request: gr.Request, **settings: Any
    ) -> AsyncIterator[View]:
        """Answer what stands in the message box; a refused message goes back there."""
        if not message.strip():
            yield still(dialog)
            return
        yield busy(with_turn(dialog, "user", message), message="")
        refused = still(dialog, message=message)
        async for view in self._answer(message, dialog, refused, request, settings):
            yield view

    async def retry(
        self, dialog: Dialog, request: gr.Request, **settings: Any
    ) -> AsyncIterator[View]:
        """Answer the last question once more."""
        kept, message = before_last_question(dialog)
        async for view in self._answer(message, kept, still(dialog), request, settings):
            yield view

    async def edit(
        self, dialog: Dialog, edited: gr.EditData, request: gr.Request, **settings: Any
    ) -> AsyncIterator[View]:
        """Answer a question that was changed in place; what came after it is gone."""
        message, kept = str(edited.value), dialog[: edited.index]
        refused = still(dialog, message=message)
        async for view in self._answer(message, kept, refused, request, settings):
            yield view

    async def _answer(
        self,
        message: str,
        kept: Dialog,
        refused: View,
        request: gr.Request,
        settings: Mapping[str, Any],
    ) -> AsyncIterator[View]:
        tongue = language(request.headers.get("accept-language"))
        asked, text, drawn = with_turn(kept, "user", message), "", 0.0
        yield busy(asked, say(tongue, "answering"))
        try:
            async with self._stream(asked, settings) as stream:
                async for delta in stream:
                    text += delta.text
                    if perf_counter() - drawn > REDRAW:
                        drawn = perf_counter()
                        yield busy(with_turn(asked, "assistant", text), say(tongue, "answering"))
                summary = self._summary(stream.reply, tongue)
            yield still(with_turn(asked, "assistant", text), summary)
        except QlorachatError as error:
            gr.Warning(html.escape(explain(error, tongue)))  # Gradio shows it as HTML
            yield still(with_turn(asked, "assistant", text)) if text else refused

    def _stream(self, dialog: Dialog, settings: Mapping[str, Any]) -> AsyncChatStream:
        system = settings["system"].strip()
        messages = [Turn(role="system", content=system), *dialog] if system else dialog
        return self._engine.astream(messages, **chat_options(settings, self._engine.info.sampling))

    def _summary(self, reply: Reply, tongue: str) -> str:
        """The speed, and all that the visitor should know of how the answer ended."""
        usage, timings = reply.usage, reply.timings
        seconds = timings.first_token + timings.decode
        tokens, context = usage.completion_tokens, self._engine.info.context_length
        notes = [
            say(tongue, "done", tokens=tokens, seconds=seconds, speed=timings.tokens_per_second)
        ]
        if reply.finish_reason is FinishReason.LENGTH:
            full = usage.prompt_tokens + tokens >= context
            notes.append(say(tongue, "full" if full else "cut", tokens=tokens, context=context))
        if usage.dropped_messages:
            notes.append(say(tongue, "dropped", count=len(usage.dropped_messages)))
        return "  \n".join(notes)


def busy(dialog: Dialog, status: str = "", *, message: str | None = None) -> View:
    """The page while an answer is made."""
    return _view(dialog, status, message, answering=True)


def still(dialog: Dialog, status: str = "", *, message: str | None = None) -> View:
    """The page at rest; `message` replaces what stands in the message box."""
    return _view(dialog, status, message, answering=False)


def _view(dialog: Dialog, status: str, message: str | None, *, answering: bool) -> View:
    return (
        gr.skip() if message is None else message,
        shown(dialog),
        dialog,
        status,
        gr.Button(visible=not answering),
        gr.Button(visible=answering),
    )
