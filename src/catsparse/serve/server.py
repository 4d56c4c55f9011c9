"""The process: a socket, uvicorn, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvicorn
from transformers.utils import logging as transformers_logging

from ..errors import CatsparseError
from ..strict_json import first_sentence
from .app import App
from .connection import Connection
from .service import Service
from .settings import Settings

# Beside the answers: connections for pages, metrics and refusals.
_BACKLOG = 512
_MAX_HEADERS = 1 << 16
_WARM_UP_SECONDS = 600  # a kernel may have to be built first


class ServerFailed(Exception):
    """The server had to end; the sentence says why."""


def listen(settings: Settings) -> socket.socket:
    """A socket bound to the address, before anything is loaded.

    Raises:
        CatsparseError: the address cannot be used.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CatsparseError(
            f"cannot listen on {settings.host}:{settings.port} ({reason}); give another --host or "
            "--port"
        ) from error
    return bound


class Server(uvicorn.Server):
    """uvicorn's server around one :class:`Service`.

    Args:
        ready: called once requests are answered, with the address.
        log: gets sentences for whoever runs the server.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Settings,
        ready: Callable[[str], None] = lambda url: None,
        log: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.settings, self.failure = settings, ""
        self.hangs = False
        self._ready, self._log = ready, log
        self._model, self._tokenizer = model, tokenizer
        self.service: Service | None = None
        self.app = App(model, settings, log)
        super().__init__(
            uvicorn.Config(
                self.app,
                lifespan="off",
                http=Connection,
                ws="none",
                log_config=None,
                log_level=logging.CRITICAL,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                h11_max_incomplete_event_size=_MAX_HEADERS,
                timeout_graceful_shutdown=max(1, round(settings.grace)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        reason = await self._begin()
        if reason is not None and self.settings.batching is None:
            self._log(
                f"continuous batching does not serve this model ({reason}); answers are written "
                "one after the other"
            )
            self.settings = replace(self.settings, batching=False)
            reason = await self._begin()
        if reason is not None:
            self.failure, self.should_exit = f"the model wrote no answer: {reason}", True
            return
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def _begin(self) -> str | None:
        """A service that has written an answer; why there is none."""
        self.failure = ""
        try:
            service = Service(self._model, self._tokenizer, self.settings, self._fail, self._log)
        except CatsparseError:
            raise
        except Exception as error:  # a model of a kind that transformers cannot batch
            return first_sentence(error)
        try:
            service.start()
            self.app.use(service)
            await asyncio.wait_for(service.warm_up(self.app.writer), _WARM_UP_SECONDS)
        except Exception as error:
            await service.stop()
            return self.failure or first_sentence(error)
        self.service, self.should_exit, self.failure = service, False, ""
        return None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.is_stopping = True
        await super().shutdown(sockets)
        if self.service is not None:
            self.hangs = not await self.service.stop()

    def _fail(self, sentence: str) -> None:
        self.failure, self.should_exit = sentence, True


def run(server: Server, bound: socket.socket) -> None:
    """Serve until a signal comes.

    Raises:
        ServerFailed: it could not go on.
    """
    transformers_logging.set_verbosity(logging.CRITICAL)  # each request would be a warning
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    before = {}
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal that ended it once more: an orderly end is no failure.
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: None)
    try:
        server.run([bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if server.hangs:
        os._exit(1)  # its thread would keep the process alive for ever
    if server.failure:
        raise ServerFailed(server.failure)
