"""``catsparse ARGS``, run in-process."""

from __future__ import annotations

import sys

import pytest

from catsparse import cli


def call(*args: object) -> int:
    """Exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["catsparse", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = call(*args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
