"""A server in a thread of this process, and the bundled model at 50% to serve."""

from __future__ import annotations

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import torch

import catsparse
from catsparse import hub
from catsparse.data import load_windows
from catsparse.serve import Settings
from catsparse.serve.server import Server, ServerFailed, listen, run

NAME = "half"
PROMPT = "The captain looked"


@functools.cache
def tokenizer() -> Any:
    return hub.load_tokenizer("default")


@functools.cache
def _sparse() -> Any:
    model = hub.load_dense_model("default", dtype=torch.float32)
    windows = load_windows(hub.bundled_text("calibration"), tokenizer(), tokens=4096, seq_len=256)
    calibration = catsparse.calibrate(model, windows, progress=False)
    return catsparse.sparsify(model, calibration, sparsity=0.5)


def sparse_model() -> Any:
    """A fresh copy in fp32, in which texts do not depend on what is written beside them."""
    return copy.deepcopy(_sparse())


@functools.cache
def expected(prompt: str, tokens: int, dense: bool = False, **options: Any) -> str:
    """What ``catsparse.generate`` writes; greedy, if nothing else is said."""
    model, ids = _sparse(), tokenizer()(prompt, return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": tokens} | options
    with catsparse.surgery.run_dense(model) if dense else torch.no_grad():
        written = catsparse.generate(model, ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def wait_for(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


@dataclass
class Running:
    """A server that answers."""

    server: Server
    url: str
    thread: threading.Thread
    notes: list[str] = field(default_factory=list)

    @property
    def service(self) -> Any:
        return self.server.service

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float | None:
        """A sample's value, None where there is none."""
        value = self.service.metrics.registry.get_sample_value(f"catsparse_{name}", labels)
        return None if value is None else float(value)

    def complete(self, prompt: str = PROMPT, tokens: int = 8, **options: Any) -> str:
        options = {"temperature": 0, "max_tokens": tokens} | options
        made = self.client().completions.create(model=NAME, prompt=prompt, **options)
        return made.choices[0].text


@contextmanager
def serving(model: Any = None, tokens: Any = None, **settings: Any) -> Iterator[Running]:
    """Ends orderly, and fails if the worker's thread hangs."""
    model = sparse_model() if model is None else model
    settings = {"name": NAME, "port": 0, "grace": 5.0} | settings
    made = Settings(**settings)
    ready, address, notes = threading.Event(), [""], []

    def say(url: str) -> None:
        address[0] = url
        ready.set()

    server = Server(model, tokens or tokenizer(), made, say, notes.append)
    thread = threading.Thread(target=server.run, args=([listen(made)],), daemon=True)
    thread.start()
    for _ in range(600):
        if ready.wait(0.1) or not thread.is_alive():
            break
    if not ready.is_set():
        raise RuntimeError(f"the server does not answer: {server.failure} {notes}")
    try:
        yield Running(server, address[0], thread, notes)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not server.hangs


__all__ = ["Server", "ServerFailed", "Settings", "listen", "run"]
