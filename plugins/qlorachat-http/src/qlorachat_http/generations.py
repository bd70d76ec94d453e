"""The answers of one request: opened together, read as they come, closed together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from qlorachat import AsyncChatStream, Delta, FinishReason, Reply
from qlorachat.errors import EngineError
from qlorachat_http.errors import ApiError, unavailable
from qlorachat_http.service import Service

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of the answer `index`: text, or its end."""

    index: int
    delta: Delta | None = None
    end: FinishReason | None = None


class Generations:
    """Several streams as one; the request counts as active between `open` and `aclose`."""

    def __init__(self, service: Service, streams: Iterable[AsyncChatStream]) -> None:
        self._service = service
        self._streams = list(streams)
        self._next: dict[asyncio.Future[Delta], int] = {}  # the delta to come -> its stream
        self._ending: asyncio.Future[Any] | None = None

    async def open(self) -> None:
        """Check and submit every request; raises before anything is answered."""
        self._service.check_available()
        self._service.active += 1
        self._ending = asyncio.ensure_future(self._service.ending.wait())
        for stream in self._streams:
            await stream.open()

    @property
    def count(self) -> int:
        """How many answers there are."""
        return len(self._streams)

    @property
    def alive(self) -> bool:
        """Whether the engine is."""
        return self._service.engine.alive

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """Every piece of every answer in the order of arrival; None is a while of silence.

        Raises what ends a generation before its time, and unavailable when the server ends.
        """
        assert self._ending is not None, "open() comes first"
        for index in range(self.count):
            self._expect(index)
        while self._next:
            futures: set[asyncio.Future[Any]] = {*self._next, self._ending}
            done, _ = await asyncio.wait(
                futures,
                timeout=self._service.options.ping_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._ending in done:
                raise unavailable("The server is shutting down.", "draining")
            if not done:
                yield None
            for task in done & self._next.keys():
                yield self._piece(task)

    async def finish(self) -> list[Reply]:
        """The whole answers."""
        async for _ in self.pieces():
            pass
        return self.replies

    @property
    def replies(self) -> list[Reply]:
        """The answers, once all have ended."""
        return [stream.reply for stream in self._streams]

    async def aclose(self) -> None:
        """Stop whatever still runs, within a token."""
        if self._ending is None:
            return
        for stream in self._streams:
            await stream.aclose()
        tasks: list[asyncio.Future[Any]] = [*self._next, self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._ending = None
        self._service.active -= 1

    def _expect(self, index: int) -> None:
        self._next[asyncio.ensure_future(anext(self._streams[index]))] = index

    def _piece(self, task: "asyncio.Future[Delta]") -> Piece:
        index = self._next.pop(task)
        try:
            delta = task.result()
        except StopAsyncIteration:
            return Piece(index, end=_end(self._streams[index].reply))
        self._expect(index)
        return Piece(index, delta)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "The client left.", code="client_closed_request")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _end(reply: Reply) -> FinishReason:
    if reply.finish_reason is FinishReason.ABORTED:  # not by us: we would not be reading
        raise EngineError("The engine ended the generation before its time.")
    return reply.finish_reason
