"""Deadlines on what a peer sends and takes: uvicorn waits for both without limit."""

import asyncio
import socket
from dataclasses import dataclass
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlorachat_http.errors import ApiError

SEND_BUFFER = 2**17  # bytes that the system holds for a slow reader, beside asyncio's 64 KiB


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds."""

    head: float  # for headers, counted from the connection's or the last response's moment
    body: float
    stall: float  # for a reader that leaves the buffers full


class PatientProtocol(H11Protocol):
    """h11's protocol with an end to its patience."""

    deadlines: ClassVar[Deadlines]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start with the headers' deadline."""
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER
        )
        self._phase: object = None  # h11's state of the peer that the deadline is for
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._follow_phase()

    def data_received(self, data: bytes) -> None:
        """Take bytes; only a finished phase, not each byte, gives new time."""
        super().data_received(data)
        self._follow_phase()

    def on_response_complete(self) -> None:
        """The next request's headers may come."""
        super().on_response_complete()
        self._follow_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        """No deadline outlives its connection."""
        _cancel(self._deadline)
        _cancel(self._stalled)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer takes less than we write."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.deadlines.stall, self.transport.abort)

    def resume_writing(self) -> None:
        """The peer has caught up."""
        _cancel(self._stalled)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the API's error shape."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        response = ApiError(400, msg, code="invalid_http").response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _follow_phase(self) -> None:
        phase = self.conn.their_state
        if phase is self._phase:
            return
        _cancel(self._deadline)
        self._phase = phase
        seconds = {h11.IDLE: self.deadlines.head, h11.SEND_BODY: self.deadlines.body}.get(phase)
        if seconds is not None:
            self._deadline = self.loop.call_later(seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
