"""``catsparse evaluate``: perplexity or zero-shot tasks, dense beside sparse."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..config import weights_of
from ..errors import CatsparseError
from .accuracy import average, is_share, titled, with_error, without_examples
from .common import (
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    SeqLen,
    TasksData,
    Tokens,
    err,
    load,
    out,
    print_json,
    refuse_options,
    token_windows,
)

if TYPE_CHECKING:
    from ..tasks import TaskRow

# Tokens of an automatic batch of windows, halved for as long as memory is too small.
_BATCH_TOKENS = 2048


def evaluate(
    context: typer.Context,
    model: Model = "default",
    data: Data = None,
    column: Column = "text",
    tokens: Tokens = 100_000,
    seq_len: SeqLen = 512,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks instead of perplexity: names with commas, or 'all'."),
    ] = None,
    tasks_data: TasksData = None,
    limit: Limit = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File that the tasks' rows are added to; a run goes on from it."
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="Windows or texts a forward pass; auto finds it.")
    ] = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity, or accuracy on zero-shot tasks, with standard errors; for a sparse folder the
    dense result beside it."""
    size = _batch_size(batch_size)
    if tasks is None:
        only = ("tasks_data", "limit", "output")
        refuse_options(context, only, "it belongs to --tasks, which was not given")
    else:
        of_perplexity = ("data", "column", "tokens", "seq_len")
        refuse_options(context, of_perplexity, "it belongs to perplexity, and --tasks was given")
    loaded, tokenizer = load(model, device, dtype)
    if tasks is None:
        _perplexity(model, loaded, tokenizer, (data, column, tokens, seq_len), size, json)
        return
    from ..tasks import evaluate_tasks

    rows = evaluate_tasks(
        loaded, tokenizer, tasks, folder=tasks_data, limit=limit, batch_size=size, output=output
    )
    if json:
        print_json({"model": model, "rows": without_examples(rows)})
        return
    _print_tasks(rows)
    if output is not None:
        err.print(f"rows: {output}", highlight=False, soft_wrap=True)


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    if not (given.isascii() and given.isdigit()) or int(given) < 1:
        raise CatsparseError(f"--batch-size must be auto or a number from 1 on, not {given[:40]!r}")
    return int(given)


def _perplexity(
    model: str,
    loaded: Any,
    tokenizer: Any,
    source: tuple[str | None, str, int, int],
    batch_size: int | None,
    json: bool,
) -> None:
    from ..evaluate import evaluate as evaluate_model
    from ..evaluate import perplexity
    from ..judge import while_it_fits
    from ..rows import model_name
    from ..surgery import sparse_layers, state_of

    data, column, tokens, seq_len = source
    windows, data_name = token_windows(data, "heldout", tokenizer, tokens, seq_len, None, column)
    size = batch_size or max(1, _BATCH_TOKENS // seq_len)
    if not sparse_layers(loaded):
        dense = while_it_fits(size, lambda size: perplexity(loaded, windows, size))
        result: dict[str, Any] = {
            "model": model,
            "data": data_name,
            "tokens": windows.shape[0] * (windows.shape[1] - 1),
            "perplexity": dense.value,
            "perplexity_se": _or_none(dense.standard_error),
        }
        if json:
            print_json(result)
        else:
            out.print(
                f"{model} (dense): perplexity {dense.value:.3f} ± {dense.standard_error:.3f} on "
                f"{result['tokens']:,} tokens of {data_name}"
            )
        return
    e = while_it_fits(size, lambda size: evaluate_model(loaded, windows, size))
    config = state_of(loaded).config
    result = {
        "model": model,
        "base_model": model_name(loaded),
        "data": data_name,
        "tokens": e.tokens,
        "seq_len": seq_len,
        "method": config.method,
        "compensate": config.compensate,
        "preview": config.preview,
        "scope": config.scope,
        "prefill": "masked",
        "perplexity": e.perplexity.value,
        "perplexity_se": _or_none(e.perplexity.standard_error),
        "dense_perplexity": e.dense_perplexity.value,
        "dense_perplexity_se": _or_none(e.dense_perplexity.standard_error),
        "rise": e.rise,
        "rise_se": _or_none(e.rise_standard_error),
        "sparsity": e.sparsity,
        "down_sparsity": e.down_sparsity,
        "bytes_skipped": e.bytes_skipped,
        "sites": e.sites,
        "down_sites": e.down_sites,
        "input_sparsity": e.input_sparsity,
        "inputs": e.inputs,
        "expected_sites": {
            name: part.sparsity for name, part in (config.sites | config.inputs).items()
        },
        "positions": None if e.positions is None else asdict(e.positions),
    }
    if json:
        print_json(result)
        return
    second = config.down_sparsity is not None
    columns = ["neurons dropped"] * bool(e.sites) + ["down rows unread"] * second
    columns += ["inputs dropped"] * bool(e.inputs) + [f"bytes skipped ({config.scope})"]
    table = Table("", "perplexity", "rise", *columns)
    d, s = e.dense_perplexity, e.perplexity
    table.add_row("dense", f"{d.value:.3f} ± {d.standard_error:.3f}", "", *[""] * len(columns))
    table.add_row(
        "sparse",
        f"{s.value:.3f} ± {s.standard_error:.3f}",
        f"{e.rise:+.1%} ± {e.rise_standard_error:.1%}",
        *[f"{e.sparsity:.1%}"] * bool(e.sites),
        *[f"{e.down_sparsity:.1%}"] * second,
        *([] if e.input_sparsity is None else [f"{e.input_sparsity:.1%}"]),
        f"{e.bytes_skipped:.1%}",
    )
    out.print(table)
    sites = Table("gated MLP", "asked", "achieved", *["down asked", "achieved"] * second)
    for name, value in e.sites.items():
        site = config.sites[name]
        cells = [f"{site.sparsity:.1%}", f"{value:.1%}"]
        cells += [f"{site.down_sparsity:.1%}", f"{e.down_sites[name]:.1%}"] if second else []
        sites.add_row(name, *cells)
    if e.sites:
        out.print(sites)
    if e.inputs:
        inputs = Table("input of", "asked", "achieved")
        for name, part in config.inputs.items():
            inputs.add_row(name, f"{part.sparsity:.1%}", f"{e.inputs[name]:.1%}")
        out.print(inputs)
    of = f"; a {config.preview}-bit preview of the {config.decided_on} decides"
    by_preview = of if config.preview else ""
    out.print(f"{e.tokens:,} tokens of {data_name}; every token thresholded{by_preview}")


def _or_none(error: float) -> float | None:
    """A standard error for JSON, which has no nan: of a single window there is none."""
    return None if math.isnan(error) else error


def _print_tasks(rows: list[TaskRow]) -> None:
    dense = [row for row in rows if row.variant == "dense"]
    sparse = {row.task: row for row in rows if row.variant == "sparse"}
    table = Table("task", "n", "dense")
    if sparse:
        for title in ("sparse", "difference", "skipped"):
            table.add_column(title)
    for row in dense:
        share = is_share(row)
        cells = [titled(row), str(row.n), with_error(row.value, row.stderr, share)]
        if (other := sparse.get(row.task)) is not None:
            cells += [
                with_error(other.value, other.stderr, share),
                with_error(other.difference or 0.0, other.difference_stderr, share, "+.2f"),
                f"{other.bytes_skipped:.1%}",
            ]
        table.add_row(*cells)
    if len(dense) > 1 and all(map(is_share, dense)):
        others = list(sparse.values())
        cells = ["average", "", average([(r.value, r.stderr) for r in dense])]
        if others:
            cells.append(average([(r.value, r.stderr) for r in others]))
            changes = [(r.difference or 0.0, r.difference_stderr) for r in others]
            cells.append(average(changes, "+.2f"))
        table.add_section()
        table.add_row(*cells)
    out.print(table)
    notes = ["accuracy in %"] if any(map(is_share, dense)) else []
    if sparse:
        shares = [row.sparsity for row in sparse.values()]
        scopes = {weights_of(row.scope or "mlp") for row in sparse.values()}
        notes.append(f"skipped: of {' and '.join(sorted(scopes))} weight bytes")
        notes.append(f"{min(shares):.1%} to {max(shares):.1%} of neurons (or inputs) dropped")
        notes.append("prefill policy masked: every token thresholded")
    if truncated := sum(row.truncated for row in dense):
        notes.append(f"{truncated:,} texts lost their beginning to the context window")
    if notes:
        out.print("; ".join(notes))
