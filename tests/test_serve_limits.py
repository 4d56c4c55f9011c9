"""What a server refuses, each time in OpenAI's form, and that it goes on afterwards."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import httpx
import openai

import serving
from serving import NAME, PROMPT, Running, expected, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
KEY = "correct horse"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving.serving(max_body=4096, max_tokens=64) as made:
        yield made


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving.serving(api_key=KEY, max_requests=2, read_seconds=0.5) as made:
        yield made


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = body["error"]
    assert found["message"]
    return found


def post(running: Running, path: str, **body: Any) -> httpx.Response:
    return running.http().post(path, json=body)


def is_idle(running: Running) -> bool:
    """No answer is under way, and nothing of one is left in the engine."""
    service = running.service
    manager = service.engine._manager
    processor = manager.batch_processor
    return (
        running.metric("requests_in_flight") in (0.0, None)
        and not service._active
        and not service.engine._sampling.samplers
        and not manager.output_router.result_handlers
        and not processor.scheduler.active_requests
        and not processor.scheduler.waiting_requests
        and manager.output_router.output_queue.empty()
    )


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "object"),
    (b"null", "object"),
    (b'"text"', "object"),
    (b'{"prompt": NaN}', "not JSON"),
    (b"\xff\xfe", "UTF-8"),
    (b"[" * 4000, "nested"),
    (b'{"prompt": ' + b"9" * 4000 + b"}", "must be a string"),
    (b'{"prompt": "x", "seed": 1e400}', "seed"),
]


@pytest.mark.parametrize(("raw", "says"), MALFORMED)
def test_malformed_bodies(running: Running, raw: bytes, says: str) -> None:
    response = running.http().post(COMPLETIONS, content=raw, headers=JSON)
    assert response.status_code == 400
    assert says in error_of(response)["message"]


MESSAGE = {"role": "user", "content": "x"}
WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "x"}, "messages"),
    (CHAT, {"messages": ["x"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0]"),
    (CHAT, {"messages": [MESSAGE], "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": [MESSAGE], "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": [MESSAGE], "n": 2}, "n"),
    (CHAT, {"messages": [MESSAGE], "logit_bias": {"4096": 1}}, "logit_bias"),
    (CHAT, {"messages": [MESSAGE], "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": [MESSAGE], "logit_bias": {"1": 1e9}}, "1"),
    (CHAT, {"messages": [MESSAGE], "generation_config": "{}"}, "generation_config"),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
    (COMPLETIONS, {"prompt": [4096]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 512}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "x", "frequency_penalty": -1}, "frequency_penalty"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 1}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": list("abcde")}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "x", "stream_options": 1}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**70}, "seed"),
    (COMPLETIONS, {"prompt": "x", "dense": 1}, "dense"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
    (COMPLETIONS, {"prompt": "x", "model": 7}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_fields(running: Running, path: str, body: dict[str, Any], param: str | None) -> None:
    response = running.http().post(path, content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param


def test_what_changes_nothing_is_taken(running: Running) -> None:
    made = running.client().chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=4,
        temperature=0,
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0,
        response_format={"type": "text"},
        user="someone",
        tools=[],
    )
    assert made.choices[0].message.content == expected(PROMPT, 4)


def test_a_long_prompt_is_refused_by_name(running: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        running.client().completions.create(model=NAME, prompt=[3] * 600)
    assert refused.value.code == "context_length_exceeded"
    assert "600 tokens" in refused.value.message


def test_answers_are_capped(running: Running) -> None:
    for asked in (1000, None):
        made = running.client().completions.create(
            model=NAME, prompt=PROMPT, max_tokens=asked, temperature=0
        )
        assert made.usage is not None
        assert made.usage.completion_tokens == 64


def test_only_the_served_model_answers(running: Running) -> None:
    for other in ("gpt-4", "default", "/etc/passwd", "../half", "x" * 3000):
        with pytest.raises(openai.NotFoundError) as refused:
            running.client().completions.create(model=other, prompt="x")
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    response = post(running, COMPLETIONS, prompt=PROMPT, max_tokens=1)  # none named
    assert response.status_code == 200


def test_routes(running: Running) -> None:
    http = running.http()
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/load_model", 404),
        ("POST", "/reset", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/docs", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/page.css/", 404),
    ):
        response = http.request(method, path)
        assert response.status_code == status, path
        error_of(response)
        assert "access-control-allow-origin" not in response.headers
    assert http.get("/health").json() == {"status": "ok"}
    assert running.metric("requests_total", endpoint="other", status="404") is not None


def test_only_json_is_read(running: Running) -> None:
    """A form of another site's page cannot have this type without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        response = running.http().post(
            COMPLETIONS, content=b'{"prompt": "x"}', headers={"Content-Type": kind}
        )
        assert response.status_code == 415
        error_of(response)


def test_other_hosts_are_refused(running: Running) -> None:
    port = running.url.rpartition(":")[2]
    for host, status in (
        ("evil.example", 403),
        (f"evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        (f"localhost:{port}", 200),
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        (f"[::1]:{port}", 200),
    ):
        response = running.http().get("/health", headers={"Host": host})
        assert response.status_code == status, host


def test_large_bodies(running: Running) -> None:
    just = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode().ljust(4096)
    http = running.http()
    assert http.post(COMPLETIONS, content=just, headers=JSON).status_code == 200
    for content in (just + b" ", b" " * 3_000_000):
        response = http.post(COMPLETIONS, content=content, headers=JSON)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        yield just
        yield b" "
        for _ in range(100):
            yield b" " * 1000

    response = http.post(COMPLETIONS, content=chunks(), headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert is_idle(running)


def test_a_failure_of_our_own(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason is for the server's log only."""

    def fail(body: Any) -> None:
        raise KeyError("of no concern to clients")

    monkeypatch.setattr(running.server.app.posts[COMPLETIONS], "parse", fail)
    response = post(running, COMPLETIONS, prompt="x")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "concern" not in response.text
    assert any("concern" in note for note in running.notes)


def test_large_heads(running: Running) -> None:
    with raw(running) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000)
        assert b" 400 " in connection.recv(1000).partition(b"\r\n")[0]


@pytest.mark.parametrize("given", ["", "wrong", KEY + "x", KEY[:-1], "corr\xe9ct horse"])
def test_a_key_is_needed(locked: Running, given: str) -> None:
    for method, path in (
        ("POST", CHAT),
        ("POST", COMPLETIONS),
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{NAME}"),
        ("GET", "/metrics"),
    ):
        header = {"Authorization": b"Bearer " + given.encode("latin-1")} if given else {}
        response = locked.http().request(method, path, headers=header)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        error = error_of(response)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert locked.http().get("/", headers=header).status_code == 200  # which asks for the key
    assert locked.http().get("/health", headers=header).status_code == 200


def test_the_key_opens(locked: Running) -> None:
    assert locked.client(KEY).models.list().data[0].id == NAME
    with pytest.raises(openai.AuthenticationError):
        locked.client("wrong").models.list()
    header = {"Authorization": f"bearer {KEY}"}
    assert locked.http().get("/metrics", headers=header).status_code == 200
    basic = {"Authorization": f"Basic {KEY}"}
    assert locked.http().get("/metrics", headers=basic).status_code == 401


def test_too_many_requests_at_a_time(locked: Running) -> None:
    client = locked.client(KEY)
    ask: Any = {"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 160}
    streams = [client.completions.create(stream=True, **ask) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**ask)
    assert refused.value.response.headers["retry-after"] == "1"
    error_of(refused.value.response)
    header = {"Authorization": f"Bearer {KEY}"}
    assert "in_flight 2.0" in locked.http().get("/metrics", headers=header).text
    for stream in streams:
        assert "".join(c.choices[0].text for c in stream) == expected(PROMPT, 160)
    wait_for(lambda: is_idle(locked))
    made = client.completions.create(**(ask | {"max_tokens": 4}))
    assert made.choices[0].text == expected(PROMPT, 4)


def raw(running: Running) -> socket.socket:
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(length: int, key: str = KEY) -> bytes:
    return (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_a_body_that_does_not_come(locked: Running) -> None:
    with raw(locked) as connection:
        connection.sendall(head(100) + b"{")
        answer = b"".join(iter(lambda: connection.recv(4000), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code": "timeout"' in answer
    wait_for(lambda: is_idle(locked))


def gone(running: Running) -> float:
    """Clients that left before their answer was complete."""
    return running.metric("requests_total", endpoint=COMPLETIONS, status="499") or 0.0


def test_a_client_that_leaves_before_its_body(locked: Running) -> None:
    before = gone(locked)
    with raw(locked) as connection:
        connection.sendall(head(100) + b"{")
    wait_for(lambda: gone(locked) == before + 1)
    assert is_idle(locked)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(locked: Running, stream: bool) -> None:
    before = gone(locked)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 500, "temperature": 0, "stream": stream})
    with raw(locked) as connection:
        connection.sendall(head(len(body)) + body.encode())
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: bool(locked.service._active))
        (generation,) = locked.service._active.values()
        wait_for(lambda: len(generation.tokens) > 2)
    wait_for(lambda: is_idle(locked))
    assert len(generation.tokens) < 400
    wait_for(lambda: gone(locked) == before + 1)


def test_a_client_that_does_not_read() -> None:
    """It is given up, and the others do not wait for it."""
    with serving.serving(write_seconds=0.3) as running:
        # Long enough to fill what the kernel takes, and uvicorn: 64 KB are enough for it.
        send = running.server.app._answer

        async def flood(endpoint: Any, asked: Any, out: Any) -> None:
            if asked.max_tokens == 77:
                await out.start(200, "text/plain")
                while True:
                    await out.body(b"x" * 65536)
            await send(endpoint, asked, out)

        running.server.app._answer = flood  # type: ignore[method-assign]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 77})
        with raw(running) as slow:
            slow.sendall(head(len(body)) + body.encode())
            with ThreadPoolExecutor(4) as pool:
                texts = list(pool.map(lambda _: running.complete(PROMPT, 16), range(4)))
            assert set(texts) == {expected(PROMPT, 16)}
            wait_for(lambda: is_idle(running))
            wait_for(lambda: gone(running) == 1)
            # Closed for good, though it still does not read what lies in the buffers.
            wait_for(lambda: not connections(running))


def connections(running: Running) -> int:
    """With a client at the other end, alive or not."""
    return len(running.server.server_state.connections)


@pytest.mark.parametrize("keep", [False, True], ids=["the first", "another"])
@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHo"])
def test_a_head_that_does_not_come(locked: Running, keep: bool, sent: bytes) -> None:
    """Its connection ends, however slowly the client goes on to send it."""
    with raw(locked) as connection:
        if keep:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while not connection.recv(4000).endswith(b"}"):
                pass
        connection.sendall(sent)
        start = time.monotonic()
        connection.settimeout(0.1)
        while time.monotonic() < start + 8:
            try:
                if sent:
                    connection.sendall(b"s")
                if not connection.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("the server waits for the head")
    wait_for(lambda: not connections(locked))


def test_the_next_request_may_be_there_already(running: Running) -> None:
    """Pipelined: what ends the first answer leaves the second alone."""
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with raw(running) as connection:
        connection.sendall(ask * 3)
        got = b""
        while got.count(b'{"status": "ok"}') < 3:
            part = connection.recv(4000)
            assert part, got
            got += part


def test_an_answer_that_cannot_be_begun(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it afterwards."""

    def full(generation: Any) -> None:
        raise RuntimeError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(running.service.engine, "submit", full)
        assert post(running, COMPLETIONS, prompt=PROMPT).status_code == 500
    assert not running.service._active
    assert is_idle(running)
    assert running.complete(PROMPT, 4) == expected(PROMPT, 4)


def test_a_request_while_it_shuts_down() -> None:
    with serving.serving() as running:
        running.server.app.is_stopping = True
        response = post(running, COMPLETIONS, prompt="x")
        assert response.status_code == 503
        assert error_of(response)["code"] == "shutting_down"
        assert "retry-after" in response.headers
        assert running.http().get("/health").status_code == 503


def test_the_answers_under_way_are_completed() -> None:
    """At shutdown; new connections are refused at once."""
    with serving.serving() as running:
        texts: list[str] = []
        threads = [
            threading.Thread(target=lambda: texts.append(running.complete(PROMPT, 80)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(running.service._active) == 4)
        running.server.should_exit = True
        wait_for(lambda: running.server.app.is_stopping)
        with pytest.raises(httpx.ConnectError):
            running.http().get("/health")
        for thread in threads:
            thread.join(30)
        assert texts == [expected(PROMPT, 80)] * 4


def test_a_shutdown_does_not_wait_for_ever() -> None:
    with serving.serving(grace=1.0) as running:
        client = running.client()
        stream = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=500, temperature=0, stream=True
        )
        next(iter(stream))
        with running.service.engine._manager.pause():  # the answer does not go on
            running.server.should_exit = True
            running.thread.join(0.5)
            assert running.thread.is_alive()
            time.sleep(1.5)
        running.thread.join(20)
        assert not running.thread.is_alive()
