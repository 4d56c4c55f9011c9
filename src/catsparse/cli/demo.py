"""``catsparse demo``: the whole path on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Json, out, print_json


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path(
        "out/demo"
    ),
    json: Json = False,
) -> None:
    """The whole path on the bundled model: a table at 25/50/70/90%, two texts and plots."""
    from ..demo import run_demo

    result = run_demo(output, show=None if json else out)
    if json:
        print_json(result)
