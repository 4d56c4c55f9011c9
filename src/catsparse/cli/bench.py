"""``catsparse bench``: op and decode speed, dense beside sparse in one run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import (
    DEFAULT_METHOD,
    PRODUCT,
    SCOPES,
    WEIGHTS,
    check_choice,
    check_method,
    check_preview,
)
from ..errors import CatsparseError
from .bench_models import random_weights, real_weights
from .bench_simulate import simulate
from .common import (
    Device,
    Json,
    Scope,
    err,
    make_folder,
    out,
    print_json,
    sparsities,
    whole_numbers,
)

bench = typer.Typer(no_args_is_help=True, help="Measure speed: ratios from one interleaved run.")
bench.command()(simulate)

Sparsities = Annotated[str, typer.Option("--sparsity", help="Fractions to drop, as 0.5,0.7.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder; rows are added to its rows.jsonl.")
]
Rounds = Annotated[int, typer.Option(help="Rounds, each with every variant.", min=1)]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1)]
Backend = Annotated[
    str, typer.Option(help="auto, torch, c, cuda or triton: see catsparse.set_backend.")
]
DownCopy = Annotated[
    bool, typer.Option(help="Let the kernel keep a transposed copy of the down projection.")
]
Plot = Annotated[bool, typer.Option("--plot", help="Also draw the rows as PNG and SVG there.")]


@bench.command()
def op(
    shape: Annotated[
        str, typer.Option(help="Models' names (llama-2-7b,mistral-7b ...) or H,I or H,I,ACT.")
    ] = "llama-2-7b",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; several by commas.")] = (
        "float32"
    ),
    sparsity: Sparsities = "0.5,0.7,0.9",
    tokens: Annotated[str, typer.Option(help="Tokens a call, as 1,4.")] = "1",
    device: Device = None,
    rounds: Rounds = 31,
    threads: Threads = None,
    backend: Backend = "auto",
    down_copy: DownCopy = True,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="index_select, or a Python file that defines prepare; may be repeated."),
    ] = None,
    preview: Annotated[
        int | None, typer.Option(help="Also with previews of so many bits, 4 or 8.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Also on packed weights, as int8,fp8,int4.")
    ] = None,
    output: Output = Path("out/bench"),
    plot: Plot = False,
    json: Json = False,
) -> None:
    """One gated MLP, its weights outside the caches at every call."""
    check_preview(preview)
    from ..bench import append_rows, bench_op, find_shape
    from ..bench.peers import index_select, load_peer
    from ..bench.rows import parse_dtype

    formats = [] if weights is None else weights.split(",")
    for name in formats:
        check_choice("--weights", name, WEIGHTS)
    make_folder(output)
    sizes = [find_shape(name) for name in _names(shape)]
    dtypes = [parse_dtype(name) for name in dtype.split(",")]
    wanted, counts = sparsities(sparsity), _counts(tokens)
    where = _device(device, threads)
    peers = dict(
        ("index_select", index_select) if name == "index_select" else load_peer(Path(name))
        for name in peer or []
    )
    rows = []
    cases = list(itertools.product(sizes, dtypes, counts))
    with _progress(len(cases) * (rounds + 1), "timing") as advance:
        for size, kind, count in cases:
            part = bench_op(
                *(size, kind, wanted, count, where, rounds, backend, down_copy),
                *(peers, preview, advance, formats),
            )
            append_rows(output / "rows.jsonl", part)
            rows += part
    _show(rows, output, plot, json)


@bench.command()
def decode(
    model: Annotated[
        str | None, typer.Argument(help="A folder written by sparsify, or a dense model.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead of a model: random weights of this shape.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: as the checkpoint says.")
    ] = "auto",
    sparsity: Sparsities = "0.5,0.7",
    prompt_tokens: Annotated[
        str, typer.Option(help="Length of the prompt; several by commas, as 128,2048.")
    ] = "32",
    batch: Annotated[str, typer.Option(help="Sequences at once; several by commas.")] = "1",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate a round.", min=2)] = 16,
    preview: Annotated[
        int | None,
        typer.Option(help="Also with a preview of so many bits; a folder has its own."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{DEFAULT_METHOD} unless given; {PRODUCT} needs --preview."),
    ] = None,
    scope: Scope = "mlp",
    weights: Annotated[
        str | None, typer.Option(help="Format to pack the weights in: int8, fp8 or int4.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also dense by the compiled step; needs a GPU.")
    ] = False,
    device: Device = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    backend: Backend = "auto",
    down_copy: DownCopy = True,
    output: Output = Path("out/bench"),
    plot: Plot = False,
    json: Json = False,
) -> None:
    """Tokens/s of generate, dense and sparse; the prompt's own time is left out.

    On a GPU, catsparse.generate, beside transformers' own loop: give 40 new tokens or more.
    """
    check_preview(preview)
    check_method(method or DEFAULT_METHOD, preview, None)
    check_choice("scope", scope, SCOPES)
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    from ..bench import append_rows, bench_decode
    from ..surgery import state_of

    if (model is None) == (config is None):
        raise CatsparseError("name either a MODEL or a shape with --config")
    make_folder(output)
    wanted = sparsities(sparsity)
    lengths = whole_numbers(prompt_tokens, "--prompt-tokens", 2)
    batches = whole_numbers(batch, "--batch", 1)
    cases = list(itertools.product(batches, lengths))
    where = _device(device, threads)
    if compile and where.type != "cuda":
        raise CatsparseError("--compile needs a GPU; leave it out")
    make = random_weights if config is not None else real_weights
    name = config or model or ""
    settings = preview, method, scope, weights
    sparse, prompts = make(name, dtype, str(where), lengths, max(batches), *settings)
    rows = []
    variants = len({0.0, *wanted}) + 1 + (where.type == "cuda") + compile
    of = state_of(sparse).config
    if of.preview is not None and of.method != PRODUCT:  # the exact gate beside it
        variants += len({*wanted} - {0.0})
    with _progress(len(cases) * variants * (rounds + 1), "generating") as advance:
        for size, length in cases:
            prompt = prompts[length][:size]
            part = bench_decode(
                *(sparse, name, wanted, prompt, new_tokens, rounds),
                *(backend, down_copy, compile, advance),
            )
            append_rows(output / "rows.jsonl", part)
            rows += part
    _show(rows, output, plot, json)


@bench.command()
def tune(
    shape: Annotated[
        str, typer.Option(help="Models' names (llama-2-7b,mistral-7b ...) or H,I or H,I,ACT.")
    ] = "mistral-7b",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; several by commas.")] = (
        "bfloat16"
    ),
    sparsity: Sparsities = "0,0.5,0.9",
    tokens: Annotated[str, typer.Option(help="Tokens a call, 1 to 4, as 1,2.")] = "1",
    device: Device = None,
    rounds: Rounds = 9,
    output: Output = Path("out/bench"),
    json: Json = False,
) -> None:
    """The CUDA kernel's plans (threads, rows, chunks) timed against the one its rule takes."""
    from ..bench import append_rows, bench_tune, find_shape
    from ..bench.rows import parse_dtype
    from ..bench.tune import candidates

    make_folder(output)
    sizes = [find_shape(name) for name in _names(shape)]
    dtypes = [parse_dtype(name) for name in dtype.split(",")]
    wanted, counts, where = sparsities(sparsity), _counts(tokens), _device(device, None)
    cases = list(itertools.product(sizes, dtypes, counts))
    steps = sum(
        len(candidates(size.hidden * kind.itemsize, count)) + rounds + 1
        for size, kind, count in cases
    )
    rows = []
    with _progress(steps, "tuning") as advance:
        for size, kind, count in cases:
            part = bench_tune(size, kind, wanted, count, where, rounds, advance)
            append_rows(output / "rows.jsonl", part)
            rows += part
    if json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    for _, group in itertools.groupby(rows, lambda row: (row.name, row.dtype, row.tokens)):
        _print_plans(list(group))
    print(output / "rows.jsonl")


def _names(shape: str) -> list[str]:
    """Several names by commas, or one shape H,I or H,I,ACT."""
    from ..bench import SHAPES

    names = shape.split(",")
    return names if names[0] in SHAPES else [shape]


def _counts(text: str) -> list[int]:
    from ..kernels import MAX_OP_TOKENS

    parts = text.split(",")
    if not all(part.isdigit() and 0 < int(part) <= MAX_OP_TOKENS for part in parts):
        raise CatsparseError(f"--tokens takes numbers from 1 to {MAX_OP_TOKENS}, not {text!r}")
    return [int(part) for part in parts]


def _device(name: str | None, threads: int | None) -> Any:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and events are the current device's
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"cannot use the device {name}: {reason}") from error
    return device


@contextmanager
def _progress(total: int, what: str) -> Iterator[Any]:
    """A bar with an estimate on stderr; gives the function that advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _show(rows: list[Any], output: Path, plot: bool, json: bool) -> None:
    plots = []
    if plot:
        from ..report import plot_speed

        plots = plot_speed([asdict(row) for row in rows], output)
    if json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    key = attrgetter("name", "dtype", "tokens", "context")
    for _, group in itertools.groupby(rows, key):
        _print_table(list(group))
    for path in [output / "rows.jsonl", *plots]:
        print(path)


def _print_table(rows: list[Any]) -> None:
    first = rows[0]
    unit, scale = ("tokens/s", 1.0) if first.what == "decode" else ("µs", 1.0)
    if first.what == "op" and first.p50 >= 10_000:
        unit, scale = "ms", 1e-3
    many = f", {first.tokens} tokens" if first.tokens > 1 else ""
    many += f", context {first.context}" if first.context else ""
    threads = f", {first.threads} threads" if first.threads else ""
    table = Table(
        *("", "dropped", "skipped", f"{unit} (p20-p80)", "limit", "of limit", "vs dense"),
        title=f"{first.what} {first.name}, {first.dtype}{many}, on {first.device}{threads}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        table.add_row(
            *(row.impl, f"{row.sparsity:.0%}", f"{row.bytes_skipped:.1%}"),
            "{} ({}-{})".format(*(_short(scale * p) for p in (row.p50, row.p20, row.p80))),
            *(_short(scale * row.limit), f"{row.of_limit:.2f}", f"{row.vs_dense:.2f}x"),
        )
    out.print(table)


def _print_plans(rows: list[Any]) -> None:
    """Plans by their mean speed against the rule's; the rule's own and the eight best."""
    first = rows[0]
    plans: dict[tuple[int, ...], list[Any]] = {tuple(row.plan.values()): [] for row in rows}
    for row in rows:
        plans[tuple(row.plan.values())].append(row)
    ordered = sorted(plans.values(), key=lambda part: -sum(row.vs_rule for row in part))
    columns = [f"{row.sparsity:.0%}, µs" for row in ordered[0]]
    table = Table(
        *("threads", "rows", "chunks", *columns, "vs rule"),
        title=f"tune {first.name}, {first.dtype}, {first.tokens} tokens, on {first.device}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for place, part in enumerate(ordered):
        if place >= 8 and not part[0].rule:
            continue
        mean = sum(row.vs_rule for row in part) / len(part)
        table.add_row(
            *(str(value) for value in part[0].plan.values()),
            *(_short(row.p50) for row in part),
            f"{mean:.3f}x" + (" (the rule)" if part[0].rule else ""),
        )
    out.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
