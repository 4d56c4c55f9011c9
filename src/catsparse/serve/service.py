"""The one model that is served: from a checked request to pieces of text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..dropped import measure
from ..surgery import run_dense, sparse_layers
from .batching import Batching
from .engine import Engine
from .errors import ApiError, bad_request, failed, stalled, worker_died
from .generation import Generation, Job
from .metrics import Metrics
from .protocol import Asked, Endpoint
from .sampling import Sampler
from .sequential import Sequential
from .settings import Settings
from .stall import StallWatch
from .turns import Turns

_TICK = 0.1  # seconds between two looks at the worker
_ATTEMPTS = 2  # an answer that lost its worker is taken up by the next one, once
_STARTS = 4  # of workers in a row that write nothing, and the server ends
_PROBE_SECONDS = 60.0
_MEASURING = 50  # times as long as the last count took passes before the next
_COUNTED = 128  # tokens of a text, its last: the other answers wait so long


class Service:
    """Writes answers, watches over the worker that does, and counts what is dropped.

    Args:
        give_up: called with a sentence once no worker stays alive.
        log: gets sentences for whoever runs the server.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        give_up: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.is_sparse = bool(sparse_layers(model)) and not settings.dense
        self._always_dense = ExitStack()
        if settings.dense:
            self._always_dense.enter_context(run_dense(model))
        self.engine: Engine = self._choose_engine()
        self.metrics = self._fresh_metrics()
        self._give_up, self._log = give_up, log
        self._turns = Turns(self._switch)
        self._dense = ExitStack()
        self._active: dict[str, Generation] = {}
        self._probe: Job | None = None
        # One thread: a tokenizer must not be used by two at a time.
        self._encoder = ThreadPoolExecutor(1, "catsparse-encoder")
        # Not the loop's own threads, whose end a shutdown waits for: counting may stall, too.
        self._counter = ThreadPoolExecutor(1, "catsparse-counter")
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_count = float("inf")
        # A warm-up may take longer: whoever starts the server limits it.
        self._stall_watch = StallWatch(0)
        self._sign: Generation | None = None  # a stalled worker goes on once it has written this
        self._deliveries = 0

    def _fresh_metrics(self) -> Metrics:
        return Metrics(self.settings.name, self.is_sparse, self.engine.together)

    def _choose_engine(self) -> Engine:
        if self.settings.batching is False:
            return Sequential(self.model)
        return Batching(self.model, self.settings.max_batch)

    def start(self) -> None:
        """The worker, and what watches over it."""
        self.engine.start()
        self._watch(self._supervise())

    async def warm_up(self, endpoint: Endpoint) -> None:
        """A first, short answer of each kind: kernels are built, weights copied, and what cannot
        work is known now. None of it counts."""
        asked = endpoint.parse({"prompt": "A", "max_tokens": 2, "seed": 0})
        self._probe = job = await self.prepare(endpoint, asked)
        for dense in (True, False) if self.is_sparse else (False,):
            async with (
                self.write(f"warm-up-{dense}", replace(job, dense=dense)) as generation,
                aclosing(generation.pieces()) as pieces,
            ):
                async for _ in pieces:
                    pass
        self.metrics, self._next_count = self._fresh_metrics(), 0.0
        self._stall_watch = StallWatch(self.settings.stall_timeout)

    async def stop(self, seconds: float = 5.0) -> bool:
        """End the worker; False if it hangs."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for threads in (self._encoder, self._counter):
            threads.shutdown(wait=False, cancel_futures=True)
        ended = await asyncio.to_thread(self.engine.stop, seconds)
        self._dense.close()
        self._always_dense.close()
        return ended

    @property
    def context(self) -> int | None:
        return self.engine.context

    async def prepare(self, endpoint: Endpoint, asked: Asked) -> Job:
        """Tokens and limits of a request.

        Raises:
            ApiError: the prompt is empty or too long.
        """
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(self._encoder, endpoint.encode, asked, self.tokenizer)
        if not ids:
            raise bad_request("the prompt is empty", "prompt")
        most = self.settings.max_tokens
        if asked.max_tokens is not None:
            most = min(asked.max_tokens, most)
        if self.context is not None:
            if len(ids) >= self.context:
                raise bad_request(
                    f"the prompt has {len(ids)} tokens, and prompt and answer have room for "
                    f"{self.context} together",
                    "messages" if endpoint.prefix == "chatcmpl-" else "prompt",
                    "context_length_exceeded",
                )
            most = min(most, self.context - len(ids))
        config = endpoint.generation_config(asked, self.model)
        config.max_new_tokens = most
        # A server that is dense anyway, or has nothing to switch off, has one kind of answers.
        dense = asked.dense and self.is_sparse
        return Job(ids, config, most, asked.stops, asked.seed, dense)

    @asynccontextmanager
    async def write(self, ident: str, job: Job) -> AsyncIterator[Generation]:
        """An answer under way; leaving the block ends it."""
        alone = nullcontext(lambda: None)
        turn = alone if not self.engine.together else self._turns.take(job.dense)
        async with turn as leave:
            if (error := self.why_refused()) is not None:  # since the request came
                raise error
            sampler = Sampler(self.model, job.config, len(job.ids), job.max_tokens, job.seed)
            generation = Generation(ident, job, sampler, self.tokenizer)
            generation.on_tokens = self._count_tokens
            generation.on_written = leave  # how long its client reads is nobody's business
            self._active[ident] = generation
            self.metrics.prompt_tokens.inc(len(job.ids))
            try:
                self.engine.submit(generation)
                yield generation
            finally:
                del self._active[ident]
                generation.cancelled = not generation.is_written
                self.engine.cancel(generation)
        if generation.is_complete:
            self._note(generation)

    def _count_tokens(self, generation: Generation, tokens: int) -> None:
        self._deliveries += 1
        self.metrics.wrote(tokens, generation.job.dense or not self.is_sparse)

    def _note(self, generation: Generation) -> None:
        if generation.first is None:
            return
        self.metrics.first.observe(generation.first)
        dense = generation.job.dense or not self.is_sparse
        if (rate := generation.tokens_per_second) is not None:
            self.metrics.rate.labels("dense" if dense else "sparse").observe(rate)
        if not dense and time.monotonic() >= self._next_count:
            self._next_count = float("inf")  # one at a time
            ids = generation.job.ids + generation.tokens
            self._watch(self._count(ids[-_COUNTED:]))

    async def _count(self, ids: list[int]) -> None:
        """What the model drops on a finished text, from one pass over it."""

        def count() -> None:
            start = time.monotonic()
            found = measure(self.model, torch.tensor(ids))
            self._next_count = time.monotonic() + _MEASURING * (time.monotonic() - start)
            self.metrics.dropped(found, len(ids))

        async with nullcontext() if not self.engine.together else self._turns.take(False):
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._counter, self.engine.exclusive, count)
            except RuntimeError:  # the worker died; whoever watches it sees that
                self._next_count = time.monotonic() + 1
            except Exception as error:  # and no more of them
                self._log(f"what is dropped cannot be counted: {type(error).__name__}: {error}")

    def _switch(self, dense: bool) -> None:
        self._dense.close()
        if dense:
            self._dense.enter_context(run_dense(self.model))

    def _watch(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _supervise(self) -> None:
        try:
            while True:
                await asyncio.sleep(_TICK)
                reason = self.engine.why_dead()
                if reason is None:
                    self._fail_given_up()
                    self._look_for_stall()
                elif not await self._restart(reason):
                    return
        except Exception as error:
            self._end(f"the server's own watch failed ({type(error).__name__}: {error})")

    def _fail_given_up(self) -> None:
        """Answers that a living worker could not write. A dying one gives all up before it is seen
        to be dead, so they are left alone at first sight."""
        for generation in list(self._active.values()):
            if generation.has_failed:
                continue
            if generation.failure is not None and generation.was_given_up:
                self._log(f"an answer failed: {generation.failure}")
                generation.fail(failed())
            generation.was_given_up = generation.failure is not None

    def _look_for_stall(self) -> None:
        if self._sign is not None:
            if self._sign.is_written:
                self._log("the generation worker goes on; requests are answered again")
                self._end_stall()
            return
        waiting = [g for g in self._active.values() if not g.is_over and g.failure is None]
        waits = bool(waiting) or self._turns.someone_waits
        unread = [len(g.job.ids) for g in waiting if not g.tokens and not self.engine.steps]
        signs = self.engine.steps + self._deliveries
        if not self._stall_watch.look(waits, signs, max(unread, default=0)):
            return
        self._sign = self._submit_probe()
        self._log(f"{self._stalled().message}; until then requests are refused, /health is 503")
        self.metrics.stalls.inc()
        self.metrics.stalled.set(1)
        for generation in waiting:
            generation.fail(self._stalled())
        self._turns.refuse(self._stalled)

    def _stalled(self) -> ApiError:
        return stalled(self.settings.stall_timeout)

    def why_refused(self) -> ApiError | None:
        """What requests get while the worker does not go on."""
        return None if self._sign is None else self._stalled()

    def _end_stall(self) -> None:
        if self._sign is not None:
            self.engine.cancel(self._sign)
        self._sign = None
        self.metrics.stalled.set(0)
        self._stall_watch.reset()

    async def _restart(self, reason: str) -> bool:
        """A worker that has shown that it can write takes up what the last one left."""
        for _ in range(_STARTS):
            self._log(f"the generation worker died ({reason}); a new one is started")
            try:
                await asyncio.to_thread(self.engine.start)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            self.metrics.restarts.inc()
            if await self._writes():
                break
            reason = self.engine.why_dead() or "it writes nothing"
        else:
            self._end(f"{_STARTS} generation workers died one after the other ({reason})")
            return False
        self._end_stall()
        for generation in list(self._active.values()):
            if generation.is_over:  # its client has not read all of it
                continue
            self.engine.cancel(generation)  # it may have come to the new worker already
            generation.attempt += 1
            generation.failure, generation.was_given_up = None, False
            if generation.attempt < _ATTEMPTS:
                self.engine.submit(generation)
            else:
                generation.fail(worker_died())
        return True

    async def _writes(self) -> bool:
        if self._probe is None:
            return True
        probe = self._submit_probe()
        end = time.monotonic() + _PROBE_SECONDS
        while not probe.is_written and self.engine.why_dead() is None and time.monotonic() < end:
            await asyncio.sleep(_TICK / 5)
        self.engine.cancel(probe)
        return probe.is_written

    def _submit_probe(self) -> Generation:
        """The warm-up's answer once more, which no client waits for."""
        job = self._probe
        assert job is not None
        sampler = Sampler(self.model, job.config, len(job.ids), job.max_tokens, job.seed)
        probe = Generation(f"probe-{uuid.uuid4().hex}", job, sampler, self.tokenizer)
        self.engine.submit(probe)
        return probe

    def _end(self, sentence: str) -> None:
        for generation in list(self._active.values()):
            generation.fail(worker_died())
        self._give_up(sentence)
