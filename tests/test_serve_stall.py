"""Workers that neither die nor go on: somebody notices, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import openai

import serving
from catsparse.serve import batching as batching_module
from catsparse.serve import service as service_module
from catsparse.serve.generation import Generation
from catsparse.serve.stall import StallWatch
from catsparse.serve.turns import Turns
from serving import NAME, PROMPT, Running, expected, wait_for
from test_serve_faults import kill

ENGINES = pytest.mark.parametrize("batching", [True, False], ids=["batching", "one by one"])
TIMEOUT = 1.5


class Gate:
    """A model whose steps wait while it is closed."""

    def __init__(self, model: Any) -> None:
        self.opened, self.waits = threading.Event(), threading.Event()
        self.opened.set()
        forward = model.forward

        def gated(*args: Any, **options: Any) -> Any:
            if not self.opened.is_set():
                self.waits.set()
                self.opened.wait()
            return forward(*args, **options)

        model.forward = gated


@contextmanager
def gated(**settings: Any) -> Iterator[tuple[Running, Gate]]:
    model = serving.sparse_model()
    with serving.serving(model=model, **({"stall_timeout": TIMEOUT} | settings)) as running:
        gate = Gate(model)
        try:
            yield running, gate
        finally:
            gate.opened.set()


def code_of(call: Any) -> str | None:
    """Of the error in OpenAI's form that ``call`` ends with."""
    with pytest.raises(openai.APIError) as failed:
        call()
    assert "restart the server" in failed.value.message
    return failed.value.code


@ENGINES
def test_answers_of_a_worker_that_hangs_fail(batching: bool) -> None:
    """Whole and streamed, in OpenAI's form; once it goes on, so does the server."""
    with gated(batching=batching) as (running, gate), ThreadPoolExecutor(2) as pool:
        completions = running.client().completions
        ask: Any = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 300}
        stream = completions.create(stream=True, **ask)
        next(iter(stream))
        gate.opened.clear()
        whole = pool.submit(code_of, lambda: completions.create(**ask))
        assert gate.waits.wait(10)
        start = time.monotonic()
        assert code_of(lambda: list(stream)) == "worker_stalled"
        assert whole.result(10) == "worker_stalled"
        assert TIMEOUT / 2 < time.monotonic() - start < 5 * TIMEOUT

        health = running.http().get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "worker_stalled")
        assert running.metric("worker_stalled") == 1
        start = time.monotonic()
        with pytest.raises(openai.InternalServerError) as refused:
            completions.create(**ask)
        assert time.monotonic() - start < TIMEOUT / 2
        assert refused.value.status_code == 503
        assert refused.value.code == "worker_stalled"
        assert "retry-after" in refused.value.response.headers
        assert running.http().get("/v1/models").status_code == 200

        gate.opened.set()
        wait_for(lambda: running.http().get("/health").status_code == 200)
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)
        assert running.metric("worker_stalled") == 0
        assert running.metric("worker_stalls_total") == 1
        assert running.metric("worker_restarts_total") == 0
        wait_for(lambda: running.metric("requests_in_flight") == 0)
        assert [n for n in running.notes if "has written nothing for 1.5 s" in n]
        assert [n for n in running.notes if "goes on" in n]


def test_clients_that_leave_before_the_timeout_do_not_hide_it() -> None:
    with gated() as (running, gate):
        gate.opened.clear()
        client = running.client().with_options(timeout=TIMEOUT / 2)
        for _ in range(3):
            with pytest.raises((openai.APITimeoutError, openai.InternalServerError)):
                client.completions.create(model=NAME, prompt=PROMPT)
        wait_for(lambda: running.http().get("/health").status_code == 503)


def test_those_who_wait_for_their_turn_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting what is dropped has the sparse model's turn, and a dense answer waits for it."""
    counting, opened = threading.Event(), threading.Event()

    def measure(*args: Any) -> Any:
        counting.set()
        opened.wait()
        raise ValueError("of no use")

    monkeypatch.setattr(service_module, "measure", measure)
    with serving.serving(stall_timeout=TIMEOUT) as running:
        try:
            running.complete(PROMPT, 4)
            assert counting.wait(10)
            assert code_of(lambda: running.complete(PROMPT, 4, extra_body={"dense": True}))
        finally:
            opened.set()
        wait_for(lambda: running.http().get("/health").status_code == 200)
        dense = running.complete(PROMPT, 8, extra_body={"dense": True})
        assert dense == expected(PROMPT, 8, dense=True)


@ENGINES
def test_a_slow_worker_does_not_stall(batching: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a large part of the timeout, and all of them twice as long: tokens of the
    one engine, parts of a prompt of the other."""
    prompt, tokens = (" the sea" * 30, 1) if batching else (PROMPT, 4)
    config = batching_module.ContinuousBatchingConfig
    monkeypatch.setattr(
        batching_module,
        "ContinuousBatchingConfig",
        lambda **options: config(**(options | {"max_batch_tokens": 16})),
    )
    model, steps = serving.sparse_model(), 0
    with serving.serving(model=model, batching=batching, stall_timeout=TIMEOUT) as running:
        forward = model.forward

        def slow(*args: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            time.sleep(TIMEOUT / 2)
            return forward(*args, **options)

        model.forward = slow
        assert running.complete(prompt, tokens) == expected(prompt, tokens)
        assert steps >= 4
        assert running.metric("worker_stalls_total") == 0
        model.forward = forward


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("batching", "counting"), [(True, False), (True, True), (False, False)])
def test_a_hanging_worker_does_not_keep_the_server_from_ending(
    batching: bool, counting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()
    if counting:
        monkeypatch.setattr(service_module, "measure", lambda *args: opened.wait())
    model, ready = serving.sparse_model(), threading.Event()
    made = serving.Settings(NAME, port=0, batching=batching, grace=1, stall_timeout=TIMEOUT)
    address: list[str] = []
    server = serving.Server(
        model, serving.tokenizer(), made, lambda url: (address.append(url), ready.set())[0]
    )
    thread = threading.Thread(target=server.run, args=([serving.listen(made)],), daemon=True)
    thread.start()
    assert ready.wait(60)
    running, gate = Running(server, address[0], thread), Gate(model)
    try:
        if counting:
            running.complete(PROMPT, 4)
        gate.opened.clear()
        assert code_of(lambda: running.complete(PROMPT, 4)) == "worker_stalled"
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()
        assert server.hangs  # and run() ends the process
    finally:
        opened.set()
        gate.opened.set()
        for worker in threading.enumerate():  # what it delivers now has no loop to go to
            if worker.name.startswith("catsparse-"):
                worker.join(10)


def test_a_worker_that_dies_of_its_stall_is_replaced() -> None:
    model = serving.sparse_model()
    with serving.serving(model=model, stall_timeout=TIMEOUT) as running:
        opened, forward = threading.Event(), model.forward

        def hang(*args: Any, **options: Any) -> Any:
            opened.wait()
            model.forward = forward
            raise RuntimeError("out of the deadlock")

        model.forward = hang
        try:
            assert code_of(lambda: running.complete(PROMPT, 8)) == "worker_stalled"
        finally:
            opened.set()
        wait_for(lambda: running.http().get("/health").status_code == 200)
        assert running.metric("worker_restarts_total") == 1
        assert running.metric("worker_stalled") == 0
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)


def test_who_reads_slowly_does_not_keep_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense answer is written while the client of a sparse one, which is complete, reads."""
    with serving.serving() as running:
        reading, go_on, real = threading.Event(), threading.Event(), Generation.pieces

        async def slowly(self: Generation) -> Any:
            async for piece in real(self):
                while not self.job.dense and not go_on.is_set():
                    if self.is_written:
                        reading.set()
                    await asyncio.sleep(0.02)
                yield piece

        monkeypatch.setattr(Generation, "pieces", slowly)
        with ThreadPoolExecutor(2) as pool:
            sparse = pool.submit(running.complete, PROMPT, 8)
            try:
                assert reading.wait(10)
                dense = pool.submit(running.complete, PROMPT, 8, extra_body={"dense": True})
                assert dense.result(10) == expected(PROMPT, 8, dense=True)
                assert not sparse.done()
            finally:
                go_on.set()
            assert sparse.result(10) == expected(PROMPT, 8)
        wait_for(lambda: running.service._turns._running == 0)  # counting has a turn, too


def test_an_answer_fails_once() -> None:
    """Though its client takes its time to read that."""
    nothing: Any = None
    generation = Generation("x", nothing, nothing, nothing)
    generation.failure = "broken"
    notes: list[str] = []
    service: Any = SimpleNamespace(_active={"x": generation}, _log=notes.append)
    for _ in range(4):
        service_module.Service._fail_given_up(service)
    assert notes == ["an answer failed: broken"]
    assert generation.is_over
    assert generation._queue.qsize() == 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(watch: StallWatch, clock: Clock, seconds: float, **said: Any) -> bool:
    """Whether it stalls after looks for so long, ten a second."""
    for _ in range(round(seconds * 10)):
        clock.now += 0.1
        if watch.look(**({"waits": True, "signs": 7, "prompt": 0} | said)):
            return True
    return False


def test_what_counts_as_a_stall() -> None:
    clock = Clock()
    watch = StallWatch(10, clock)
    assert not looks(watch, clock, 9.5)
    assert looks(watch, clock, 1)
    watch.reset()
    assert not looks(watch, clock, 9.5)
    assert not looks(watch, clock, 9.5, signs=8)
    assert looks(watch, clock, 1, signs=8)
    watch.reset()
    assert not looks(watch, clock, 9.5, signs=8)
    assert not looks(watch, clock, 100, waits=False, signs=8, prompt=513)
    assert looks(watch, clock, 1, signs=8)
    watch.reset()
    assert not looks(watch, clock, 9.5, signs=8)
    clock.now += 1000  # the process was stopped
    assert not watch.look(True, 8, 513)
    assert not looks(watch, clock, 9, signs=8, prompt=513)  # twice the time
    assert looks(watch, clock, 1, signs=8, prompt=512)
    never = StallWatch(0, clock)
    assert not looks(never, clock, 1000)


def test_a_refused_turn_is_not_given_back() -> None:
    """Also for who leaves at the same moment."""

    async def leave() -> int:
        turns = Turns(lambda dense: None)
        async with turns.take(False):
            waiting = asyncio.ensure_future(turns.take(True).__aenter__())
            await asyncio.sleep(0)
            assert turns.someone_waits
            turns.refuse(lambda: ValueError("no"))
            waiting.cancel()
            await asyncio.wait({waiting})
            assert not turns.someone_waits
            return turns._running

    assert asyncio.run(leave()) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_written_answer_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker dies while its client has still to read it."""
    with serving.serving() as running:
        reading, dead, successor = threading.Event(), threading.Event(), threading.Event()
        real, writes = Generation.pieces, running.service._writes

        async def has_written() -> bool:
            written: bool = await writes()
            successor.set()
            return written

        async def slowly(self: Generation) -> Any:
            async for piece in real(self):
                while self.ident.startswith("cmpl-") and not dead.is_set():
                    if self.is_written:
                        reading.set()
                    await asyncio.sleep(0.02)
                yield piece

        monkeypatch.setattr(Generation, "pieces", slowly)
        monkeypatch.setattr(running.service, "_writes", has_written)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(running.client().completions.create, model=NAME, prompt=PROMPT,
                                 max_tokens=8, temperature=0)  # fmt: skip
            assert reading.wait(10)
            kill(running)
            assert successor.wait(20)
            assert running.http().get("/health").status_code == 200
            (generation,) = running.service._active.values()
            assert generation.attempt == 0
            dead.set()
            made = answer.result(10)
        assert made.usage.completion_tokens == 8
        assert made.choices[0].text == expected(PROMPT, 8)
