"""The page's events: each turns a visitor's dialog and settings into what the page then shows."""

import asyncio
import html
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import gradio as gr

from qlorachat import AsyncChatStream, ChatEngine, FinishReason, QlorachatError, Reply
from qlorachat_gradio.dialog import Dialog, Turn, before_last_question, shown, with_turn
from qlorachat_gradio.settings import chat_options
from qlorachat_gradio.texts import explain, language, say

REDRAW = 0.05  # seconds: faster than people read, and each redraw costs the server milliseconds

View = tuple[Any, ...]  # message box, chat, dialog, status line, send button, stop button


@dataclass(eq=False)
class Run:
    """A visitor's answer under way."""

    stream: AsyncChatStream
    stopped: bool = False
    forgotten: bool = False  # its end is not to be shown
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def stop(self) -> None:
        self.stopped = True
        await self.stream.aclose()


class Answering:
    """Answers the visitors of one engine; of each it knows the answer under way, and no more."""

    def __init__(self, engine: ChatEngine) -> None:
        self._engine = engine
        self._running: dict[str | None, Run] = {}  # by the visitor's session

    async def stop(self, request: gr.Request) -> None:
        """End the visitor's answer; its own event then shows what was said so far.

        Gradio's way to cancel an event can leave an error drawn over what the event has shown.
        """
        if run := self._running.get(request.session_hash):
            await run.stop()

    async def clear(self, request: gr.Request) -> View:
        """An empty page, once the visitor's answer has ended unseen."""
        if run := self._running.get(request.session_hash):
            run.forgotten = True
            await run.stop()
            await run.over.wait()
        return still([])

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
            with self._answering(request, asked, settings) as run:
                async with run.stream as stream:
                    if run.stopped:  # before the model had the question
                        await stream.aclose()
                    async for delta in stream:
                        text += delta.text
                        if perf_counter() - drawn > REDRAW:
                            drawn = perf_counter()
                            said = with_turn(asked, "assistant", text)
                            yield busy(said, say(tongue, "answering"))
            if not run.forgotten:
                said = with_turn(asked, "assistant", text) if text else asked
                yield still(said, self._summary(stream.reply, tongue))
        except QlorachatError as error:
            gr.Warning(html.escape(explain(error, tongue)))  # Gradio shows it as HTML
            yield still(with_turn(asked, "assistant", text)) if text else refused

    @contextmanager
    def _answering(
        self, request: gr.Request, dialog: Dialog, settings: Mapping[str, Any]
    ) -> Iterator[Run]:
        run = Run(self._stream(dialog, settings))
        self._running[request.session_hash] = run
        try:
            yield run
        finally:
            if self._running.get(request.session_hash) is run:
                del self._running[request.session_hash]
            run.over.set()

    def _stream(self, dialog: Dialog, settings: Mapping[str, Any]) -> AsyncChatStream:
        system = settings["system"].strip()
        messages = [Turn(role="system", content=system), *dialog] if system else dialog
        return self._engine.astream(messages, **chat_options(settings, self._engine.info.sampling))

    def _summary(self, reply: Reply, tongue: str) -> str:
        """The speed, and all that the visitor should know of how the answer ended."""
        if reply.finish_reason is FinishReason.ABORTED:
            return say(tongue, "stopped")
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
