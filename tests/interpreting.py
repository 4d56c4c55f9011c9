"""Tests of Triton kernels on a CPU, by Triton's interpreter.

Triton decides at its import whether it interprets, so they run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process with TRITON_INTERPRET=1")


def outside(test: Callable[[], None]) -> Callable[[], None]:
    test = pytest.mark.skipif(INTERPRETING, reason="this is that process")(test)
    missing = importlib.util.find_spec("triton") is None
    return pytest.mark.skipif(missing, reason="triton is not installed")(test)


def run_interpreted(file: str) -> None:
    """The tests of ``file`` marked ``inside``."""
    # -v: a wild pointer ends the process, and the last line then names the case.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:xdist", "-rfE", "--tb=short", file],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
