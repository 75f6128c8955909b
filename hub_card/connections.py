"""Connections that nobody can hold by doing nothing."""

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class ConnectionLimits:
    """
    Attributes:
        connections: how many are open at once; one more is closed as it comes.
        head_seconds: from a connection's start, or a request's first byte, to the end of its head.
        exchange_seconds: from there to the last byte that is handed to the operating system.
        flush_seconds: from there until the client has taken it.
        idle_seconds: between two requests.
    """

    connections: int = 512
    head_seconds: float = 10
    exchange_seconds: float = 90
    flush_seconds: float = 30
    idle_seconds: float = 5


class BoundedConnection(H11Protocol):
    """uvicorn bounds the time between two requests; this bounds every other wait for a client, and how many there are."""

    limits = ConnectionLimits()
    _timer: asyncio.TimerHandle | None = None
    _in_head = False

    @classmethod
    def within(cls, limits: ConnectionLimits) -> "type[BoundedConnection]":
        """The protocol with other limits, for uvicorn's `http`."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        if not self._in_head and (cycle is None or cycle.response_complete):
            self._await_head()
        super().data_received(data)
        self._follow(cycle)

    def on_response_complete(self) -> None:
        cycle = self.cycle
        self._bound(self.limits.flush_seconds, self._close_unless_taken)
        super().on_response_complete()
        self._follow(cycle)  # where requests are pipelined the next has begun

    def connection_lost(self, exc: Exception | None) -> None:
        self._unbound()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._bound(self.limits.head_seconds, self.transport.abort)
        self._in_head = True

    def _follow(self, former: Any) -> None:
        """A new cycle is a request whose head is complete."""
        if self.cycle is not former:
            self._bound(self.limits.exchange_seconds, self.transport.abort)

    def _close_unless_taken(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _bound(self, seconds: float, then: Any) -> None:
        self._unbound()
        self._timer = self.loop.call_later(seconds, then)

    def _unbound(self) -> None:
        self._in_head = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
