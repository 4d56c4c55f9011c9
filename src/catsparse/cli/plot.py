"""``catsparse plot``: histograms and sparsity by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CatsparseError
from .common import Directory, Json, print_json


def plot(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the plots; default: there.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to draw, as 0,5,11; default: first, middle, last.")
    ] = None,
    json: Json = False,
) -> None:
    """Draw activation histograms with their thresholds, and sparsity by layer (PNG and SVG)."""
    from ..report import plot_directory

    try:
        chosen = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError:
        raise CatsparseError(f"--layers takes numbers as 0,5,11, not {layers!r}") from None
    paths = plot_directory(directory, output or Path(directory), chosen)
    if json:
        print_json({"plots": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)
