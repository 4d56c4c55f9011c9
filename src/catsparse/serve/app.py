"""The HTTP side: routes, limits and errors around :class:`Service`."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing, suppress
from importlib import resources
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from . import fields, metrics
from .errors import ApiError, stopping
from .protocol import Asked, Chat, Completions, Endpoint, check_model, no_such_model, usage_of
from .service import Service
from .settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PLAIN = ("/health", "/metrics", "/v1/models")
_JSON = "application/json"
# A client that is still sending would not see an answer before a closed connection: what it sends
# is thrown away, for so long.
_DRAIN_SECONDS = 2.0
_GONE = 499  # as nginx has it: the client left before its answer was complete
_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class ClientGone(Exception):
    """The client left, or does not read what it is sent."""


class App:
    """The ASGI application."""

    service: Service

    def __init__(self, model: Any, settings: Settings, log: Callable[[str], None]) -> None:
        self.settings, self._log = settings, log
        vocabulary = model.config.get_text_config().vocab_size
        self.writer = Completions(settings.name, vocabulary)
        self.posts: dict[str, Endpoint] = {
            "/v1/chat/completions": Chat(settings.name, vocabulary),
            "/v1/completions": self.writer,
        }
        self.created = int(time.time())
        self.is_stopping = False
        self._in_flight = 0
        self._key = None if settings.api_key is None else settings.api_key.encode()
        folder = resources.files(__package__) / "assets"
        self._assets = {
            path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _ASSETS.items()
        }

    def use(self, service: Service) -> None:
        """Answer by ``service`` from now on."""
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan is the server's own
            return
        start = time.perf_counter()
        path = scope["path"]
        out = _Sender(send, self.settings.write_seconds)
        try:
            await self._route(scope, path, receive, out)
        except ApiError as error:
            await self._show(error, out)
        except ClientGone:
            out.status = _GONE
        except asyncio.CancelledError:  # the shutdown did not wait any longer
            out.status = _GONE
            raise
        except Exception as error:
            self._log(f"a request failed: {type(error).__name__}: {error}")
            await self._show(ApiError(500, "the server failed", "internal_error"), out)
        finally:
            known = path in self.posts or path in self._assets or path in _PLAIN
            endpoint = path if known else "other"
            self.service.metrics.requests.labels(endpoint, str(out.status)).inc()
            if path in self.posts:
                seconds = time.perf_counter() - start
                self.service.metrics.seconds.labels(endpoint).observe(seconds)

    async def _show(self, error: ApiError, out: _Sender) -> None:
        if out.started:  # in a stream: its status is sent already
            with suppress(ClientGone):
                await out.body(f"data: {error.json()}\n\n".encode(), more=False)
            return
        with suppress(ClientGone):
            await out.whole(error.status, error.json().encode(), _JSON, error.headers)

    async def _route(self, scope: Scope, path: str, receive: Receive, out: _Sender) -> None:
        method, headers = scope["method"], Headers(scope=scope)
        self._check_host(headers)
        if path in self._assets:
            _allow(method, "GET", "HEAD")
            content, kind = self._assets[path]
            policy = {"content-security-policy": _POLICY}
            await out.whole(200, b"" if method == "HEAD" else content, kind, policy)
        elif path == "/health":
            _allow(method, "GET", "HEAD")
            await self._health(out)
        elif path == "/metrics":
            _allow(method, "GET")
            self._check_key(headers)
            await out.whole(200, self.service.metrics.text(), metrics.CONTENT_TYPE)
        elif path == "/v1/models":
            _allow(method, "GET")
            self._check_key(headers)
            await out.json({"object": "list", "data": [self._model()]})
        elif path.startswith("/v1/models/"):
            _allow(method, "GET")
            self._check_key(headers)
            asked = path.removeprefix("/v1/models/")
            if asked != self.settings.name:
                raise no_such_model(asked)
            await out.json(self._model())
        elif (endpoint := self.posts.get(path)) is not None:
            _allow(method, "POST")
            self._check_key(headers)
            await self._limited(endpoint, headers, receive, out)
        else:
            raise ApiError(404, f"there is nothing at {path[:200]}", "not_found")

    def _check_host(self, headers: Headers) -> None:
        """A page of another site, whose name was made to point here, names that site."""
        if not self.settings.is_local:
            return
        host = headers.get("host", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name not in {"localhost", "127.0.0.1", "::1", self.settings.host.lower()}:
            raise ApiError(
                403, "the Host header names another machine than this one", "host_not_allowed"
            )

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                "invalid_api_key",
                None,
                {"WWW-Authenticate": "Bearer"},
            )

    async def _health(self, out: _Sender) -> None:
        if self.is_stopping:
            raise stopping()
        if (reason := self.service.engine.why_dead()) is not None:
            raise ApiError(503, f"the generation worker is not running: {reason}", "worker_died")
        self._check_stall()
        await out.json({"status": "ok"})

    def _check_stall(self) -> None:
        if (error := self.service.why_refused()) is not None:
            raise error

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.created,
            "owned_by": "catsparse",
            "sparse": self.service.is_sparse,
            "context": self.service.context,
            "max_tokens": self.settings.max_tokens,
        }

    async def _limited(
        self, endpoint: Endpoint, headers: Headers, receive: Receive, out: _Sender
    ) -> None:
        if self.is_stopping:
            raise stopping()
        self._check_stall()
        if self._in_flight >= self.settings.max_requests:
            raise ApiError(
                429,
                f"{self._in_flight} requests are being answered, which is all that are allowed",
                "too_many_requests",
                None,
                {"Retry-After": "1"},
            )
        self._in_flight += 1
        self.service.metrics.in_flight.set(self._in_flight)
        try:
            body = fields.parse_body(await self._read(headers, receive))
            check_model(body, self.settings.name)
            asked = endpoint.parse(body)
            await self._until_gone(self._answer(endpoint, asked, out), receive)
        finally:
            self._in_flight -= 1
            self.service.metrics.in_flight.set(self._in_flight)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body, no more of it than is allowed."""
        # Any other type could come from a form of another site's page, without a preflight.
        if headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
            raise ApiError(415, "the Content-Type must be application/json", "unsupported_type")
        most = self.settings.max_body
        length = headers.get("content-length", "")
        too_large = length.isdigit() and int(length) > most
        parts, size, more = [], 0, True
        deadline = time.monotonic() + self.settings.read_seconds
        while not too_large:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise ApiError(
                    408, "the body did not come in time", "timeout", None, {"Connection": "close"}
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            too_large = size > most
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
            if not too_large and not more:
                return b"".join(parts)
        parts.clear()
        if more:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_drain(receive), _DRAIN_SECONDS)
        raise ApiError(
            413,
            f"the body has more than {most} bytes",
            "body_too_large",
            None,
            {"Connection": "close"},
        )

    async def _until_gone(self, work: Awaitable[None], receive: Receive) -> None:
        """Do ``work``, and stop it once the client is gone."""
        working = asyncio.ensure_future(work)
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientGone
            working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _answer(self, endpoint: Endpoint, asked: Asked, out: _Sender) -> None:
        job = await self.service.prepare(endpoint, asked)
        ident = endpoint.prefix + uuid.uuid4().hex
        async with (
            self.service.write(ident, job) as generation,
            aclosing(generation.pieces()) as pieces,
        ):
            if asked.stream:
                await out.start(200, "text/event-stream; charset=utf-8")
                await out.body(endpoint.opening(ident).encode())
                async for piece in pieces:
                    await out.body(endpoint.chunk(ident, piece).encode())
            else:
                parts = [piece async for piece in pieces]
        finish = generation.finish or "stop"
        usage = usage_of(len(job.ids), len(generation.tokens))
        if asked.stream:
            last = endpoint.chunk(ident, None, finish)
            if asked.include_usage:
                last += endpoint.usage_chunk(ident, usage)
            await out.body(f"{last}data: [DONE]\n\n".encode(), more=False)
        else:
            await out.json(endpoint.answer(ident, "".join(parts), finish, usage))


class _Sender:
    """Sends a response, and gives up on clients that do not read it."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.status, self.started = 0, False

    async def _put(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self._send(message), self._seconds)
        except (asyncio.TimeoutError, OSError):
            raise ClientGone from None

    async def start(
        self, status: int, kind: str, headers: dict[str, str] | None = None, length: int = -1
    ) -> None:
        response = Response(status_code=status, headers=headers, media_type=kind)
        sent = [(k, v) for k, v in response.raw_headers if k != b"content-length"]
        if length >= 0:
            sent.append((b"content-length", str(length).encode()))
        self.status, self.started = status, True
        await self._put(
            {"type": "http.response.start", "status": status, "headers": [*sent, *_SAFE]}
        )

    async def body(self, content: bytes, more: bool = True) -> None:
        await self._put({"type": "http.response.body", "body": content, "more_body": more})

    async def whole(
        self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        await self.start(status, kind, headers, len(content))
        await self.body(content, more=False)

    async def json(self, content: dict[str, Any]) -> None:
        await self.whole(200, json.dumps(content).encode(), _JSON)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass


def _allow(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise ApiError(
            405, f"use {' or '.join(allowed)} here", "method_not_allowed", None,
            {"Allow": ", ".join(allowed)},
        )  # fmt: skip
