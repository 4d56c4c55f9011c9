"""``catsparse compare``: the methods on the same data at equal bytes skipped."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..config import ALLOCATIONS, METHODS, PRODUCT, WEIGHTS, weights_of
from ..errors import CatsparseError
from .accuracy import average, is_share, titled, with_error, without_examples
from .common import (
    BatchSize,
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Scope,
    Seed,
    SeqLen,
    TasksData,
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
    from ..compare import CompareRow, CompareTaskRow

# More tasks than a terminal is wide are shown as their average.
_MOST_COLUMNS = 4


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
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"Also packed: formats of {', '.join(WEIGHTS)}, with commas, each calibrated by "
            "itself and dense beside it. Without methods of inputs; int4 is its own preview.",
            show_default="the model's own weights alone",
        ),
    ] = None,
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
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks beside perplexity: names with commas, or 'all'."),
    ] = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder; rows are added to its compare.jsonl, of tasks to its tasks.jsonl, and a "
            "run goes on from them.",
        ),
    ] = Path("out/compare"),
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Also draw rise (and accuracy) against bytes as PNG and SVG."),
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
    from ..compare import FILE_NAME, TASKS_FILE_NAME, Text, check_settings, make_settings
    from ..compare import compare as compare_methods
    from ..tasks import prepare_tasks

    settings = make_settings(
        methods.split(","),
        (False, True) if compensate is None else (compensate,),
        allocation.split(","),
        _budgets(bytes_skipped),
        preview,
        scope,
        [] if weights is None else weights.split(","),
    )
    if all(s.preview is None for s in settings):
        refuse_options(context, ("preview",), f"it belongs to {PRODUCT}, which was not named")
    if tasks is None:
        only = ("tasks_data", "limit")
        refuse_options(context, only, "it belongs to --tasks, which was not given")
    if hub.is_artifact(model):
        raise CatsparseError(f"{model} is sparse already; name the dense model that it came from")
    loaded, tokenizer = load_dense(model, device, dtype)
    # Refused now, not after reading texts.
    check_settings(loaded, settings)
    prepared = (
        []
        if tasks is None
        else prepare_tasks(loaded, tokenizer, tasks, folder=tasks_data, limit=limit)
    )

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
        found = compare_methods(
            loaded,
            calibration,
            measured_on,
            settings,
            tasks=prepared,
            batch_size=batch_size,
            output=output,
        )
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on from the last row")
        raise typer.Exit(130) from None
    rows, scores = [asdict(row) for row in found.rows], without_examples(found.tasks)
    plots = []
    if plot:
        from ..pareto import plot_compare

        plots = plot_compare(rows, output, scores)
    if json:
        print_json({"rows": rows, "tasks": scores, "plots": [str(p) for p in plots]})
        return
    for _, group in itertools.groupby(
        sorted(found.rows, key=lambda row: [t.name for t in measured_on].index(row.heldout)),
        key=lambda row: row.heldout,
    ):
        _print_table(list(group))
    names = [FILE_NAME]
    if found.tasks:
        _print_tasks(found.tasks)
        names.append(TASKS_FILE_NAME)
    for path in [*(output / name for name in names), *plots]:
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

    first, best = rows[0], best_rows([row for row in rows if row.target])
    several = len({row.weights for row in rows}) > 1
    columns = ["MB", "dropped"] if several else ["skipped", "dropped", "perplexity"]
    table = Table(
        *("asked", *["weights"] * several, "method", "means", *columns, "rise", ""),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    ordered = sorted(rows, key=lambda row: (row.target, row.rise))
    for target, group in itertools.groupby(ordered, key=lambda row: row.target):
        table.add_section()
        for row in group:
            read = "" if row.bytes_read is None else f"{row.bytes_read / 1e6:,.1f}"
            skipped, dropped = f"{row.bytes_skipped:.1%}", f"{row.sparsity:.1%}"
            table.add_row(
                f"{target:.1%}" if target else "",
                *[row.weights] * several,
                _described(row),
                ("yes" if row.compensate else "no") if target else "",
                *([read, dropped] if several else [skipped, dropped, f"{row.perplexity:.2f}"]),
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
        + "MB: of linear layers' weights a token reads; " * several
        + "every token thresholded",
        highlight=False,
    )


def _print_tasks(rows: list[CompareTaskRow]) -> None:
    """A line for each setting by budget: of each task the difference to the dense model."""
    from ..compare import TASKS_FILE_NAME

    dense = [row for row in rows if row.variant == "dense"]
    by_setting: dict[tuple[object, ...], list[CompareTaskRow]] = {}
    for row in rows:
        if row.variant != "dense":
            setting = (
                *(row.bytes_asked, row.method, row.compensate, row.preview, row.allocation),
                row.weights,
            )
            by_setting.setdefault(setting, []).append(row)
    several = len({row.weights for row in rows}) > 1
    shares = all(map(is_share, dense))
    each, together = len(dense) <= _MOST_COLUMNS or not shares, len(dense) > 1 and shares
    columns = [titled(row) for row in dense] * each + ["average"] * together

    def cells(values: list[tuple[float, float | None]], form: str) -> list[str]:
        pairs = zip(dense, values, strict=True)
        shown = [with_error(*value, is_share(row), form) for row, value in pairs]
        return shown * each + [average(values, form)] * together

    table = Table(
        *("asked", *["weights"] * several, "method", "means", "skipped", *columns),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    values = [(row.value, row.stderr) for row in dense]
    table.add_row("", *[dense[0].weights] * several, "dense", "", "", *cells(values, ".1f"))
    ordered = sorted(by_setting.values(), key=lambda group: group[0].bytes_asked or 0.0)
    for target, settings in itertools.groupby(ordered, key=lambda group: group[0].bytes_asked):
        table.add_section()
        for group in settings:
            changes = [(row.difference or 0.0, row.difference_stderr) for row in group]
            table.add_row(
                f"{target:.1%}",
                *[group[0].weights] * several,
                _described(group[0]),
                "yes" if group[0].compensate else "no",
                f"{sum(row.bytes_skipped for row in group) / len(group):.1%}",
                *cells(changes, "+.1f"),
            )
    out.print(table)
    scope = next(row.scope for row in rows if row.scope is not None)
    notes = [
        "dense: accuracy in %; below: points more or less, ± the error of that difference",
        "examples: " + ", ".join(f"{row.task} {row.n:,}" for row in dense),
        f"skipped: of {weights_of(scope)} weight bytes" + ", mean of the tasks" * (len(dense) > 1),
        "every token thresholded",
        *[f"each task by itself: {TASKS_FILE_NAME}"] * (not each),
    ]
    if truncated := sum(row.truncated for row in dense):
        notes.append(f"{truncated:,} texts lost their beginning to the context window")
    out.print("; ".join(notes), highlight=False)


def _described(row: CompareRow | CompareTaskRow) -> str:
    return f"{row.method}" + ("" if row.allocation == "uniform" else f", {row.allocation}")
