"""Workers that die, and the command as a process of its own."""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import openai

import command
import serving
from serving import NAME, PROMPT, Running, expected
from test_serve_limits import wait_for

ENGINES = pytest.mark.parametrize("batching", [True, False], ids=["batching", "one by one"])


def kill(running: Running) -> None:
    """End the worker's thread in the middle of what it does, past every ``except Exception``."""
    (worker,) = (t for t in threading.enumerate() if t.name == "catsparse-worker")
    raised = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(worker.ident or 0), ctypes.py_object(SystemExit)
    )
    assert raised == 1
    wait_for(lambda: not worker.is_alive())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@ENGINES
def test_a_killed_worker_costs_nobody_an_answer(batching: bool) -> None:
    with serving.serving(batching=batching) as running, ThreadPoolExecutor(4) as pool:
        prompts = [PROMPT, "Then he said", "She", "It was"]
        answers = pool.map(lambda prompt: running.complete(prompt, 50), prompts)
        wait_for(lambda: len(running.service._active) == 4)
        wait_for(lambda: any(len(g.tokens) > 10 for g in running.service._active.values()))
        kill(running)
        assert list(answers) == [expected(prompt, 50) for prompt in prompts]
        assert running.metric("worker_restarts_total") == 1
        assert running.http().get("/health").status_code == 200
        assert any("died" in note for note in running.notes)
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)


def poison(model: Any, token: int, times: float = float("inf")) -> None:
    """The model fails as often at a text that begins with ``token``."""
    forward, left = model.forward, [times]

    def failing(*args: Any, **options: Any) -> Any:
        ids = options["input_ids"]
        if int(ids[0, 0]) == token and ids.shape[1] > 1 and left[0] > 0:
            left[0] -= 1
            raise RuntimeError("poisoned")
        return forward(*args, **options)

    model.forward = failing


@ENGINES
def test_a_request_that_kills_its_workers(batching: bool) -> None:
    """It fails in OpenAI's form, in a stream too; the server goes on."""
    model = serving.sparse_model()
    with serving.serving(model=model, batching=batching) as running:
        poison(model, 99)
        code = "worker_died" if batching else "generation_failed"
        completions = running.client().completions
        with pytest.raises(openai.InternalServerError) as failed:
            completions.create(model=NAME, prompt=[99, 5, 6], max_tokens=4)
        assert failed.value.code == code
        with pytest.raises(openai.APIError) as failed_:
            list(completions.create(model=NAME, prompt=[99, 5, 6], max_tokens=4, stream=True))
        assert failed_.value.code == code
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)
        gone = {"endpoint": "/v1/completions", "status": "500"}
        assert running.metric("requests_total", **gone) == 1


def test_one_failure_is_made_good() -> None:
    model = serving.sparse_model()
    with serving.serving(model=model) as running:
        ids = serving.tokenizer()(PROMPT)["input_ids"]
        poison(model, ids[0], times=1)
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)
        assert running.metric("worker_restarts_total") == 1


def broken(*args: Any, **options: Any) -> Any:
    raise RuntimeError("broken")


@ENGINES
def test_a_model_that_breaks_ends_the_server(batching: bool) -> None:
    """It says so, and the answers under way fail in OpenAI's form."""
    model = serving.sparse_model()
    with serving.serving(model=model, batching=batching) as running:
        model.forward = broken
        with pytest.raises(openai.InternalServerError) as failed:
            running.complete(PROMPT, 8)
        assert failed.value.code == ("worker_died" if batching else "generation_failed")
        if batching:
            running.thread.join(20)
            assert not running.thread.is_alive()
            assert "workers died one after the other" in running.server.failure


def test_a_model_that_writes_nothing_is_no_server() -> None:
    model = serving.sparse_model()

    model.forward = broken
    made = serving.Settings(NAME, port=0)
    bound = serving.listen(made)
    server = serving.Server(model, serving.tokenizer(), made)
    with pytest.raises(serving.ServerFailed, match="wrote no answer"):
        serving.run(server, bound)


def test_a_model_that_cannot_be_batched_is_served_one_by_one() -> None:
    """Unless batching was asked for."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise ValueError("Not this one. It is odd.")

    model = serving.sparse_model()
    model.init_continuous_batching = refuse
    with serving.serving(model=model) as running:
        assert running.complete(PROMPT, 8) == expected(PROMPT, 8)
        assert not running.service.engine.together
        assert any("Not this one" in note for note in running.notes)
    made = serving.Settings(NAME, port=0, batching=True)
    server = serving.Server(model, serving.tokenizer(), made)
    with pytest.raises(serving.ServerFailed, match="Not this one"):
        serving.run(server, serving.listen(made))


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Any:
    made: list[subprocess.Popen[str]] = []

    def start(*args: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        run = [sys.executable, "-m", "catsparse.cli", "serve", *args, "--port", "0", "--json"]
        pipe = subprocess.PIPE
        made.append(subprocess.Popen(run, stdout=pipe, stderr=pipe, text=True))
        assert made[-1].stdout is not None
        return made[-1], json.loads(made[-1].stdout.readline())

    yield start
    for one in made:
        one.kill()
        one.communicate()


def test_the_command_answers_soon_and_ends_orderly(process: Any) -> None:
    """Streaming within 20 s of the start; SIGTERM lets the answer be completed, exit code 0."""
    start = time.monotonic()
    running, facts = process("default")
    assert (facts["model"], facts["sparse"], facts["pid"]) == ("default", False, running.pid)
    with openai.OpenAI(base_url=facts["url"] + "/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=150,
            temperature=0,
            stream=True,
        )
        next(iter(stream))
        assert time.monotonic() - start < 20
        running.send_signal(signal.SIGTERM)
        chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[-1].finish_reason is not None
    assert len(chunks) > 50
    assert running.wait(20) == 0
    out, err = running.communicate()
    assert out == ""
    assert "Traceback" not in err


def test_the_command_serves_a_folder(process: Any, tmp_path: Path) -> None:
    """By the folder's name; Ctrl-C ends it with exit code 0."""
    model = serving.sparse_model()
    serving.catsparse.save(model, tmp_path / "half")
    running, facts = process(str(tmp_path / "half"), "--dtype", "float32", "--max-tokens", "4")
    assert (facts["model"], facts["sparse"]) == ("half", True)
    with openai.OpenAI(base_url=facts["url"] + "/v1", api_key="none") as client:
        made = client.completions.create(model="half", prompt=PROMPT, temperature=0)
        assert made.choices[0].text == expected(PROMPT, 4)
    running.send_signal(signal.SIGINT)
    assert running.wait(20) == 0


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One sentence and exit code 2, before a model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for args, says in (
            (("--port", port), "give another --host or --port"),
            (("--host", "256.1.1.1"), "give another --host or --port"),
            (("--api-key", " "), "API key is empty"),
            (("--max-body", "many"), "--max-body must be"),
            (("--max-body", "0"), "--max-body must be"),
            (("--name", ""), "name is empty"),
            ((tmp_path / "none", "--port", 0), "there is no folder"),
            ((tmp_path, "--port", 0), "holds neither"),
        ):
            code, out, err = command.run(capsys, "serve", *args)
            assert (code, out) == (2, ""), args
            assert says in err
            assert len(err.strip().splitlines()) == 1


def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("catsparse.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = command.run(capsys, "serve")
    assert code == 2
    assert "pip install 'catsparse[serve]'" in err


def test_an_open_server_without_a_key_is_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ("serve", tmp_path / "none", "--host", "0.0.0.0", "--port", 0)
    _, _, err = command.run(capsys, *args)
    assert "no --api-key" in err
    _, _, err = command.run(capsys, *args, "--api-key", "secret")
    assert "no --api-key" not in err
