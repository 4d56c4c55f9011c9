"""One answer under way: the tokens that a worker delivers, and the text they make."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from ..text_stream import TextStream
from .errors import ApiError
from .sampling import Sampler


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        ids: the prompt's tokens.
        config: the complete generation config.
        max_tokens: new tokens, at most.
        stops: texts before which the answer ends.
        dense: by the dense model.
    """

    ids: list[int]
    config: Any
    max_tokens: int
    stops: tuple[str, ...]
    seed: int | None
    dense: bool


class Generation:
    """Lives on the event loop; a worker's thread reads ``job``, ``sampler`` and ``cancelled``.

    Attributes:
        tokens: the new ones so far.
        attempt: which worker it is at, counted from 0; what an older one delivers is ignored.
        failure: why the worker gave it up, until someone decides what that means;
            ``was_given_up`` once that was seen.
        finish: ``stop`` or ``length`` once the text is complete.
        first: seconds to the first token; ``latest`` to the latest one.
        on_tokens: told of each delivery; ``on_written`` of the last one.
        is_written: the worker is done with it; ``has_failed``: its client gets an error instead.
        cancelled: nobody waits for it any more.
    """

    def __init__(self, ident: str, job: Job, sampler: Sampler, tokenizer: Any) -> None:
        self.ident, self.job, self.sampler = ident, job, sampler
        self.tokens: list[int] = []
        self.attempt = 0
        self.failure: str | None = None
        self.was_given_up = False
        self.finish: str | None = None
        self.is_written = self.has_failed = self.cancelled = False
        self.started = time.perf_counter()
        self.first: float | None = None
        self.latest = 0.0
        self.on_tokens: Callable[[Generation, int], None] | None = None
        self.on_written: Callable[[], None] | None = None
        self._text = TextStream(tokenizer)
        self._queue: asyncio.Queue[list[int] | ApiError | None] = asyncio.Queue()

    def deliver(self, attempt: int, tokens: list[int], finished: bool) -> None:
        """New tokens, and whether they were the last."""
        if attempt != self.attempt or self.cancelled:
            return
        if tokens:
            self.latest = time.perf_counter() - self.started
            self.first = self.latest if self.first is None else self.first
            self.tokens += tokens
            self._queue.put_nowait(tokens)
            if self.on_tokens is not None:
                self.on_tokens(self, len(tokens))
        if finished:
            self.is_written = True
            self._queue.put_nowait(None)
            if self.on_written is not None:
                self.on_written()

    def give_up(self, attempt: int, reason: str) -> None:
        """The worker could not go on."""
        if attempt == self.attempt:
            self.failure = reason

    def fail(self, error: ApiError) -> None:
        self.attempt += 1
        self.has_failed = True
        self._queue.put_nowait(error)

    @property
    def is_over(self) -> bool:
        """Nothing more is expected of a worker, though the client may have to read."""
        return self.is_written or self.has_failed

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None below three."""
        if self.first is None or len(self.tokens) < 3:
            return None
        return (len(self.tokens) - 1) / (self.latest - self.first)

    @property
    def is_complete(self) -> bool:
        return self.finish is not None

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes, up to a stop; none of them is empty.

        Raises:
            ApiError: it cannot be completed.
        """
        cut = _Cut(self.job.stops)
        while (item := await self._queue.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            piece = cut.add(self._text.add(item))
            if piece:
                yield piece
            if cut.found:
                self.finish = "stop"
                return
        piece = cut.add(self._text.rest()) + cut.rest()
        if piece:
            yield piece
        self.finish = "stop" if cut.found or self._ended_itself() else "length"

    def _ended_itself(self) -> bool:
        ends = self.job.config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return bool(self.tokens) and self.tokens[-1] in ends


class _Cut:
    """Text up to the first stop; what may be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops, self.held, self.found = stops, "", False

    def add(self, piece: str) -> str:
        if not self.stops or self.found:
            return "" if self.found else piece
        text = self.held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        longest = max(map(len, self.stops)) - 1
        for keep in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-keep:]) for stop in self.stops):
                self.held = text[-keep:]
                return text[:-keep]
        self.held = ""
        return text

    def rest(self) -> str:
        held, self.held = self.held, ""
        return held
