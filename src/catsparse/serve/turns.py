"""Whose turn it is: answers by the sparse and by the dense model never share a step."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """Answers of one kind run together; the other kind waits until they are done.

    First come, first served: once an answer of the other kind waits, later ones wait behind it, so
    neither kind can keep the other out.

    Args:
        switch: called with the new kind while no answer runs.
    """

    def __init__(self, switch: Callable[[bool], None]) -> None:
        self.dense, self._switch = False, switch
        self._running = 0
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, dense: bool) -> AsyncIterator[Callable[[], None]]:
        """What it gives ends the turn before the block's end does."""
        await self._enter(dense)
        has_left = False

        def leave() -> None:
            nonlocal has_left
            if not has_left:
                has_left = True
                self._running -= 1
                self._admit()

        try:
            yield leave
        finally:
            leave()

    @property
    def someone_waits(self) -> bool:
        return bool(self._waiting)

    def refuse(self, error: Callable[[], Exception]) -> None:
        """All that wait get an error instead of their turn."""
        waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            if not future.done():
                future.set_exception(error())

    async def _enter(self, dense: bool) -> None:
        if not self._waiting and self._fits(dense):
            self._start(dense)
            return
        waiting = dense, asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await waiting[1]
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            future = waiting[1]
            if not future.cancelled() and future.exception() is None:  # admitted just now
                self._running -= 1
            self._admit()
            raise

    def _fits(self, dense: bool) -> bool:
        return self._running == 0 or self.dense == dense

    def _start(self, dense: bool) -> None:
        if dense != self.dense:
            self._switch(dense)
            self.dense = dense
        self._running += 1

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            dense, future = self._waiting.popleft()
            if not future.done():
                self._start(dense)
                future.set_result(None)
