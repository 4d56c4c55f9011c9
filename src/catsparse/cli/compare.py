"""``catsparse compare``: the methods on the same data at equal bytes skipped."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..config import ALLOCATIONS, METHODS, PRODUCT, weights_of
from ..errors import CatsparseError
from .common import (
    BatchSize,
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Scope,
    Seed,
    SeqLen,
    Tokens,
    err,
    load_dense,
    make_folder,
    out,
    print_json,
    refuse_options,
    token_windows,
)

if TYPE_CHECKING:
    from ..compare import CompareRow


def compare(
    context: typer.Context,
    model: Model = "default",
    methods: Annotated[
        str, typer.Option(help=f"Of {', '.join(METHODS)}, with commas between them.")
    ] = ",".join(METHODS),
    compensate: Annotated[
        bool | None,
        typer.Option(
            help="Only with, or only without means in place of what is dropped.",
            show_default="both",
        ),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(ALLOCATIONS)}, with commas; all but the first measure every "
            "layer's sensitivity, as long as 30 evaluations take, for each method."
        ),
    ] = "uniform",
    bytes_skipped: Annotated[
        str, typer.Option(help="Budgets: fractions of the scope's weight bytes not to read.")
    ] = "0.333,0.467,0.6",
    scope: Scope = "mlp",
    preview: Annotated[
        int, typer.Option(help=f"Bits of the preview that {PRODUCT} decides by, 4 or 8.")
    ] = 4,
    data: Data = None,
    heldout: Annotated[
        str | None, typer.Option(help="Text to measure on, as --data; default: bundled.")
    ] = None,
    drift: Annotated[
        str | None, typer.Option(help="Another text to measure on, unlike --data.")
    ] = None,
    column: Column = "text",
    tokens: Tokens = 100_000,
    test_tokens: Annotated[
        int, typer.Option(help="Tokens of each text to measure on.", min=2)
    ] = 100_000,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder; rows are added to its compare.jsonl, a run goes on."
        ),
    ] = Path("out/compare"),
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw rise against bytes as PNG and SVG there.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Judge the methods on the same data at equal bytes skipped; every token is thresholded.

    The gate methods are decided by the exact gate, product by a preview; teal and wina drop inputs
    of linear layers.
    """
    from .. import hub
    from ..compare import FILE_NAME, Text, check_settings, make_settings
    from ..compare import compare as compare_methods

    settings = make_settings(
        methods.split(","),
        (False, True) if compensate is None else (compensate,),
        allocation.split(","),
        _budgets(bytes_skipped),
        preview,
        scope,
    )
    if all(s.preview is None for s in settings):
        refuse_options(context, ("preview",), f"it belongs to {PRODUCT}, which was not named")
    if hub.is_artifact(model):
        raise CatsparseError(f"{model} is sparse already; name the dense model that it came from")
    loaded, tokenizer = load_dense(model, device, dtype)
    check_settings(loaded, settings)  # refused now, not after reading texts

    def text(source: str | None, bundled: str, size: int, seed: int | None) -> Text:
        windows, name = token_windows(source, bundled, tokenizer, size, seq_len, seed, column)
        # Rows are for other machines, too: of a file its name.
        return Text(Path(name).name if Path(name).is_file() else name, windows)

    calibration = text(data, "calibration", tokens, seed)
    measured_on = [text(heldout, "heldout", test_tokens, None)]
    if drift is not None:
        measured_on.append(text(drift, "heldout", test_tokens, None))
    make_folder(output)
    try:
        rows = compare_methods(
            loaded, calibration, measured_on, settings, batch_size=batch_size, output=output
        )
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on from the last row")
        raise typer.Exit(130) from None
    plots = []
    if plot:
        from ..report import plot_compare

        plots = plot_compare([asdict(row) for row in rows], output)
    if json:
        print_json({"rows": [asdict(row) for row in rows], "plots": [str(p) for p in plots]})
        return
    for _, group in itertools.groupby(
        sorted(rows, key=lambda row: [t.name for t in measured_on].index(row.heldout)),
        key=lambda row: row.heldout,
    ):
        _print_table(list(group))
    for path in [output / FILE_NAME, *plots]:
        print(path)


def _budgets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise CatsparseError(
            f"--bytes-skipped takes numbers as 0.333,0.6, not {text[:40]!r}"
        ) from None


def _print_table(rows: list[CompareRow]) -> None:
    """Of one text: by budget, then rise; the best of each budget marked."""
    from ..compare import best_rows

    first, best = rows[0], best_rows(rows)
    table = Table(
        *("asked", "method", "means", "skipped", "dropped", "perplexity", "rise", ""),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    ordered = sorted(rows, key=lambda row: (row.target, row.rise))
    for target, group in itertools.groupby(ordered, key=lambda row: row.target):
        table.add_section()
        for row in group:
            table.add_row(
                f"{target:.1%}",
                _described(row),
                "yes" if row.compensate else "no",
                f"{row.bytes_skipped:.1%}",
                f"{row.sparsity:.1%}",
                f"{row.perplexity:.2f}",
                f"{row.rise:+.1%}" + ("" if row.rise_se is None else f" ± {row.rise_se:.1%}"),
                "best" if row.key in best else "",
                style="bold" if row.key in best else None,
            )
    out.print(table)
    bits = next((row.preview for row in rows if row.preview is not None), None)
    by_preview = "" if bits is None else f"; {PRODUCT} decided by a {bits}-bit preview"
    out.print(
        f"{first.tokens:,} tokens of {first.heldout}, dense perplexity "
        f"{first.dense_perplexity:.3f}; calibrated on {first.calibration_tokens:,} of "
        f"{first.calibration}; asked and skipped: of {weights_of(first.scope)} weight bytes"
        f"{by_preview}; "
        "every token thresholded",
        highlight=False,
    )


def _described(row: CompareRow) -> str:
    return row.method if row.allocation == "uniform" else f"{row.method}, {row.allocation}"
