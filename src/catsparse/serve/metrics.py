"""Numbers for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from .._version import __version__
from ..dropped import Dropped

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_WINDOW = 10  # seconds that tokens_per_second looks back

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """All counters of one server; they start at 0 with it."""

    def __init__(self, model: str, sparse: bool, batching: bool) -> None:
        self.registry = CollectorRegistry()
        registry: dict[str, Any] = {"registry": self.registry, "namespace": "catsparse"}
        info = Gauge("info", "The server.", ["version", "model", "sparse", "batching"], **registry)
        info.labels(__version__, model, str(sparse).lower(), str(batching).lower()).set(1)
        self.requests = Counter(
            "requests", "Requests by endpoint and HTTP status; 499: the client went away.",
            ["endpoint", "status"], **registry,
        )  # fmt: skip
        self.in_flight = Gauge("requests_in_flight", "Requests being answered.", **registry)
        self.seconds = Histogram(
            "request_seconds", "From a request's head to the end of its answer.",
            ["endpoint"], buckets=_SECONDS, **registry,
        )  # fmt: skip
        self.first = Histogram(
            "first_token_seconds", "From a checked request to its first token.",
            buckets=_SECONDS, **registry,
        )  # fmt: skip
        self.rate = Histogram(
            "answer_tokens_per_second", "Of each answer, after its first token.",
            ["mode"], buckets=_RATES, **registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **registry)
        self.new_tokens = Counter("generated_tokens", "Tokens written.", ["mode"], **registry)
        self.restarts = Counter("worker_restarts", "Workers that had died.", **registry)
        self.stalls = Counter("worker_stalls", "Workers that went on no more.", **registry)
        self.stalled = Gauge("worker_stalled", "1 while the worker does not go on.", **registry)
        rate = Gauge("tokens_per_second", f"Written in the last {_WINDOW} s.", **registry)
        rate.set_function(self._recent)
        self._times: deque[tuple[float, int]] = deque()
        self._sparse = sparse
        if sparse:
            self._add_sparsity(registry)
        ProcessCollector(registry=self.registry)

    def _add_sparsity(self, registry: dict[str, Any]) -> None:
        self._sparsity = Gauge(
            "achieved_sparsity", "Neurons (or inputs) dropped over all, on the texts measured.",
            **registry,
        )  # fmt: skip
        self._skipped = Gauge(
            "bytes_skipped_ratio",
            "Weight bytes of the sparse layers that one-token decode leaves unread, on the texts "
            "measured.",
            **registry,
        )
        self._measured = Counter("measured_tokens", "Tokens of the texts measured.", **registry)
        self._bytes = Counter(
            "weight_bytes_skipped",
            "Estimate: bytes_skipped_ratio of the sparse layers' weights for each token of a "
            "sparse answer, as if it had been decoded alone.",
            **registry,
        )
        self._sums = [0, 0.0, 0.0]  # tokens, and by tokens: sparsity, bytes skipped
        self._bytes_per_token = 0.0

    def wrote(self, tokens: int, dense: bool) -> None:
        now = time.monotonic()
        self._times.append((now, tokens))
        self._forget(now)
        self.new_tokens.labels("dense" if dense else "sparse").inc(tokens)
        if self._sparse and not dense:
            self._bytes.inc(tokens * self._bytes_per_token)

    def dropped(self, found: Dropped, tokens: int) -> None:
        """What was counted on one finished text."""
        self._sums[0] += tokens
        self._sums[1] += tokens * found.sparsity
        self._sums[2] += tokens * found.bytes_skipped
        self._sparsity.set(self._sums[1] / self._sums[0])
        ratio = self._sums[2] / self._sums[0]
        self._skipped.set(ratio)
        self._bytes_per_token = ratio * found.nbytes
        self._measured.inc(tokens)

    def _forget(self, now: float) -> None:
        while self._times and self._times[0][0] < now - _WINDOW:
            self._times.popleft()

    def _recent(self) -> float:
        self._forget(time.monotonic())
        return sum(tokens for _, tokens in self._times) / _WINDOW

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
