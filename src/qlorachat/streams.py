"""An answer as it comes, for sync and for async callers; either can be closed at any token."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from qlorachat.generation import Generation
from qlorachat.messages import Delta, Reply
from qlorachat.tokens import TokenEvent

Sink = Callable[[TokenEvent], None]
Start = Callable[[Sink], Generation]  # prepares, submits, and says what it started


class ChatStream(Iterator[Delta]):
    """Iterate for the deltas; `reply` is the whole so far ended answer.

    Leaving it (`close`, a with block, or dropping it) stops the model within one token.
    """

    def __init__(self, start: Start) -> None:
        self._events: SimpleQueue[TokenEvent] = SimpleQueue()
        self._generation = start(self._events.put)

    def __next__(self) -> Delta:
        while not self._generation.done:
            if delta := self._generation.feed(self._events.get()):
                return delta
        raise StopIteration

    @property
    def reply(self) -> Reply:
        """The answer; raises EngineError while it goes on or when it failed."""
        return self._generation.reply()

    def close(self) -> None:
        """Stop the model within one token; `reply` holds the text until here."""
        self._generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.close()


class CompareStream(Iterator[tuple[str | None, Delta]]):
    """Several adapters' answers to one dialog: (adapter, delta) in the order in which they come."""

    def __init__(self, starts: Mapping[str | None, Start]) -> None:
        self._events: SimpleQueue[tuple[str | None, TokenEvent]] = SimpleQueue()
        self._generations: dict[str | None, Generation] = {}
        try:
            for name, start in starts.items():
                # not of self: a backend that holds it would keep a dropped stream going
                self._generations[name] = start(partial(_put, self._events, name))
        except BaseException:
            self.close()
            raise

    def __next__(self) -> tuple[str | None, Delta]:
        while not all(generation.done for generation in self._generations.values()):
            name, event = self._events.get()
            generation = self._generations[name]
            if delta := generation.feed(event):
                return name, delta
        raise StopIteration

    @property
    def replies(self) -> dict[str | None, Reply]:
        """The answers by adapter; raises EngineError while one goes on or when one failed."""
        return {name: generation.reply() for name, generation in self._generations.items()}

    def close(self) -> None:
        """Stop the model within one token."""
        for generation in self._generations.values():
            generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_generations"):
            self.close()


class AsyncChatStream(AsyncIterator[Delta]):
    """As ChatStream, for async callers; the work before the first token is done off the loop."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._starting: asyncio.Future[Generation] | None = None
        self._generation: Generation | None = None

    async def open(self) -> None:
        """Check and submit the request: what is wrong with it is raised here, before any delta."""
        if self._generation is not None:
            return
        loop, put = asyncio.get_running_loop(), self._events.put_nowait

        def sink(event: TokenEvent) -> None:  # without self, as above
            loop.call_soon_threadsafe(put, event)

        if self._starting is None:  # else another task has begun it
            self._starting = asyncio.ensure_future(asyncio.to_thread(self._start, sink))
        try:
            self._generation = await asyncio.shield(self._starting)
        except asyncio.CancelledError:  # the caller left; what the thread starts must end too
            self._starting.add_done_callback(_close_started)
            raise

    async def __anext__(self) -> Delta:
        await self.open()
        assert self._generation is not None
        while not self._generation.done:
            if not self._events.empty():
                await asyncio.sleep(0)  # who is behind would keep the loop, and not be cancelled
            if delta := self._generation.feed(await self._events.get()):
                return delta
        raise StopAsyncIteration

    @property
    def reply(self) -> Reply:
        """The answer; raises EngineError while it goes on or when it failed."""
        assert self._generation is not None, "the stream was never opened"
        return self._generation.reply()

    async def aclose(self) -> None:
        """Stop the model within one token; `reply` holds the text until here."""
        if self._generation is not None:
            self._generation.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._generation is not None:
            self._generation.close()


def _put(
    events: SimpleQueue[tuple[str | None, TokenEvent]], name: str | None, event: TokenEvent
) -> None:
    events.put((name, event))


def _close_started(starting: "asyncio.Future[Generation]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
