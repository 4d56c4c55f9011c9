"""A worker that neither dies nor goes on: a deadlock, or a kernel without end.

Nothing can end a thread from outside, and a second one would run the same model while the first may
wake up in the middle of it. So a worker that stalls is not replaced: its answers fail, the server
says that it is not well, and takes requests again only if the worker goes on by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

PROMPT_TOKENS = 512  # the timeout is for so many, a longer prompt has a multiple of it
# The watch itself may have been stopped, as by SIGSTOP; between two looks it counts no more.
_MOST_BETWEEN = 1.0


class StallWatch:
    """How long somebody has waited without a sign of life.

    Args:
        timeout: seconds after which the worker counts as stalled; 0 for never.
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout, self._clock = timeout, clock
        self._last, self._quiet, self._signs = clock(), 0.0, 0

    def look(self, waits: bool, signs: int, prompt: int) -> bool:
        """Whether the worker stalls, for somebody who looks now and then.

        Args:
            waits: whether an answer is under way that is not written. Time without one does not
                count, but does not end a wait either: clients may leave before the timeout.
            signs: counts up with each step and token.
            prompt: tokens of the longest one that may be read now without a sign of life.
        """
        now = self._clock()
        since, self._last = min(now - self._last, _MOST_BETWEEN), now
        if signs != self._signs:
            self._signs, self._quiet = signs, 0.0
        elif waits:
            self._quiet += since
        patience = self.timeout * max(1, math.ceil(prompt / PROMPT_TOKENS))
        return 0 < patience <= self._quiet

    def reset(self) -> None:
        """Another worker, or one that goes on."""
        self._quiet = 0.0
