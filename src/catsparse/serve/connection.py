"""A client's connection: uvicorn's, which waits for ever for two kinds of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Ends connections on which no head of a request comes, and such whose client does not read the
    end of an answer, or the rest of one that was given up: closing them waits until it does."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._settings = config.app.settings
        self._answer, self.app = self.app, self._then_end
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._end_in(self._settings.read_seconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle:
            self._stop_timer()
        elif self._timer is None:  # a part of the next request's head
            self._end_in(self._settings.read_seconds)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._end_in(self._settings.write_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    async def _then_end(
        self,
        scope: Any,
        receive: Callable[[], Awaitable[Any]],
        send: Callable[..., Awaitable[None]],
    ) -> None:
        cycle = self.cycle  # the connection may go on with another before this one returns
        try:
            await self._answer(scope, receive, send)
        finally:
            if not cycle.response_complete:
                self.transport.abort()
            elif self.transport.is_closing():
                self._end_in(self._settings.write_seconds)

    def _end_in(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
