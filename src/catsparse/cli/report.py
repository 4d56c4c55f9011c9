"""``catsparse report``: one HTML page about a sparse folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Directory, Json, err, print_json


def report(
    directory: Directory,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; default: report.html there."),
    ] = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(
            help="File with rows of 'compare', 'evaluate' (--json) or 'bench'; may be repeated."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML page, complete in itself: histograms with thresholds that a slider moves,
    sensitivities, and with --rows achieved sparsity, quality and speed."""
    from ..page import write_page

    path, payload = write_page(directory, output, rows or ())
    size = path.stat().st_size
    if json:
        result = {
            "page": str(path),
            "bytes": size,
            "layers": len(payload["layers"]),
            "rows": payload["count"],
            "predicts": payload["sensitivities"]["why_not"] is None,
        }
        print_json(result)
        return
    print(path)
    if (reason := payload["sensitivities"]["why_not"]) is not None:
        err.print(f"no predicted loss: {reason}", highlight=False, markup=False, soft_wrap=True)
