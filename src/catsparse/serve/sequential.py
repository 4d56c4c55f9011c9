"""One answer at a time, by ``catsparse.generate``."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .. import decoding
from ..surgery import run_dense
from .engine import context_of
from .generation import Generation


class Sequential:
    """A thread that takes answers in the order in which they were asked for.

    On a GPU a single answer is much faster so than in a batch, and where transformers cannot batch
    a model there is no other way.
    """

    together = False
    steps = 0  # its tokens are all that is seen of it

    def __init__(self, model: Any) -> None:
        self.model, self.context = model, context_of(model)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._work,), name="catsparse-worker", daemon=True
        )
        self._thread.start()

    def why_dead(self) -> str | None:
        alive = self._thread is not None and self._thread.is_alive()
        return None if alive else "its thread ended"

    def submit(self, generation: Generation) -> None:
        loop = asyncio.get_running_loop()
        attempt, known = generation.attempt, list(generation.tokens)

        def work() -> None:
            if generation.cancelled or attempt != generation.attempt:
                return
            stream = _Stream(loop, generation, attempt)
            try:
                _write(self.model, generation, known, stream)
            except _Cancelled:
                return
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                loop.call_soon_threadsafe(generation.give_up, attempt, reason)
            else:
                loop.call_soon_threadsafe(generation.deliver, attempt, [], True)

        self._work.put(work)

    def cancel(self, generation: Generation) -> None:
        pass  # the stream looks at the generation with each token

    def exclusive(self, call: Callable[[], Any]) -> Any:
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(call())
            except Exception as error:
                result.set_exception(error)

        worker = self._thread
        self._work.put(work)
        while not wait([result], timeout=1).done:
            if worker is None or not worker.is_alive():
                raise RuntimeError("the worker died")
        return result.result()

    def stop(self, seconds: float) -> bool:
        if self._thread is None:
            return True
        self._work.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _serve(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := work.get()) is not None:
        call()
        del call  # or it keeps the last answer while there is nothing to do


def _write(model: Any, generation: Generation, known: list[int], stream: BaseStreamer) -> None:
    job = generation.job
    ids = torch.tensor([job.ids + known], device=model.device)
    job.config.max_new_tokens = job.max_tokens - len(known)
    seed = generation.sampler.generator.initial_seed()
    torch.manual_seed(seed)
    with run_dense(model) if job.dense else nullcontext():
        decoding.generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=job.config,
            streamer=stream,
        )


class _Cancelled(Exception):
    """Leaves ``generate``."""


class _Stream(BaseStreamer):  # type: ignore[misc]
    def __init__(
        self, loop: asyncio.AbstractEventLoop, generation: Generation, attempt: int
    ) -> None:
        self._loop, self._generation, self._attempt = loop, generation, attempt
        self._prompt_comes = True

    def put(self, value: Tensor) -> None:
        if self._generation.cancelled or self._attempt != self._generation.attempt:
            raise _Cancelled
        if self._prompt_comes:
            self._prompt_comes = False
            return
        new = value.flatten().tolist()
        self._loop.call_soon_threadsafe(self._generation.deliver, self._attempt, new, False)

    def end(self) -> None:
        pass
