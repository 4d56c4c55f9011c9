"""What a worker is: the thread that writes answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from .generation import Generation


class Engine(Protocol):
    """Called on the event loop, except for :meth:`exclusive`.

    Attributes:
        context: tokens of a prompt and its answer, at most; None for no limit.
        together: whether answers share steps, so that all of a step must be sparse or dense.
        steps: how many the worker has begun; 0 where it does not count them.
    """

    context: int | None
    together: bool

    @property
    def steps(self) -> int: ...

    def start(self) -> None:
        """A fresh worker, also after one has died."""

    def why_dead(self) -> str | None:
        """What ended the worker; None while it lives."""

    def submit(self, generation: Generation) -> None:
        """Write it, from ``generation.tokens`` on."""

    def cancel(self, generation: Generation) -> None:
        """Nobody waits for it any more; also called for those that are complete."""

    def exclusive(self, call: Callable[[], Any]) -> Any:
        """``call()`` while the model computes nothing else; on any thread but the loop's.

        Raises:
            RuntimeError: the worker died.
        """

    def stop(self, seconds: float) -> bool:
        """End the worker; False if it did not within ``seconds``."""


def context_of(model: Any) -> int | None:
    """Positions that the model knows."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
