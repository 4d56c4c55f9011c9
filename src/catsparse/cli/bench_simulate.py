"""``catsparse bench simulate``: decode speed from bytes alone, and how far that can be trusted."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..config import check_choice, check_preview
from ..errors import CatsparseError
from ..files import write_atomic
from .common import (
    Json,
    make_folder,
    out,
    print_json,
    refuse_options,
    sparsities,
    whole_numbers,
)

MOST_SEQUENCES, MOST_CONTEXT, MOST_GPUS, MOST_EXPERTS = 4096, 2**24, 1024, 4096
WIDTH = 120  # of the widest table
# What --rows has no use for: the rows say it.
_OF_SETTINGS = (
    *("config", "engine", "gpu", "sparsity", "batch", "context", "weights", "preview", "products"),
    *("tp", "pp", "experts", "active_experts", "link_latency", "link_bandwidth", "output", "plot"),
)


def simulate(
    settings: typer.Context,
    config: Annotated[str, typer.Option(help="Name of the model's shape.")] = "mistral-7b",
    engine: Annotated[
        str, typer.Option(help="catsparse (its generate, up to 16 sequences) or vllm.")
    ] = "catsparse",
    gpu: Annotated[str, typer.Option(help="h100 or h200.")] = "h200",
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the GPU's memory, TB/s, if it is another.")
    ] = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", help="Fractions to drop, as 0.5,0.7.")
    ] = "0.5,0.7",
    batch: Annotated[str, typer.Option(help="Sequences of a step; several by commas.")] = "1",
    context: Annotated[
        str, typer.Option(help="Tokens of a sequence in the cache; several by commas.")
    ] = "100",
    weights: Annotated[str, typer.Option(help="bf16, fp8, int8 or int4.")] = "bf16",
    preview: Annotated[
        int | None, typer.Option(help="A preview of so many bits decides, 4 or 8.")
    ] = None,
    products: Annotated[
        bool, typer.Option("--products", help="The preview is of gate and up: method product.")
    ] = False,
    overlap: Annotated[
        float,
        typer.Option(help="How alike the masks of a batch are: 0 independent, 1 the same."),
    ] = 0.0,
    tp: Annotated[str, typer.Option(help="GPUs that share each layer; several by commas.")] = "1",
    pp: Annotated[str, typer.Option(help="Stages of layers; several by commas.")] = "1",
    experts: Annotated[
        int, typer.Option(help="MLPs of a layer, each of the shape's.", min=1, max=MOST_EXPERTS)
    ] = 1,
    active_experts: Annotated[
        int, typer.Option(help="Experts that a token visits.", min=1, max=MOST_EXPERTS)
    ] = 1,
    link_latency: Annotated[
        float | None, typer.Option(help="Of a sum over GPUs, µs; default: 10, assumed.")
    ] = None,
    link_bandwidth: Annotated[
        float | None, typer.Option(help="GPU to GPU, GB/s one way; default: 370, assumed.")
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option(help="Rows of a GPU: its bandwidth and a layer's cost from the dense ones."),
    ] = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(help="Instead: show predictions beside these rows; may be repeated."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of simulated.jsonl, written anew.")
    ] = Path("out/bench"),
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw the rows as PNG and SVG there.")
    ] = False,
    json: Json = False,
) -> None:
    """Decode speed from bytes: batches, contexts, several GPUs, experts. Nothing is run.

    The constants are fitted on measured dense rows; docs/scale.md says how well that predicts.
    """
    _check_number("--bandwidth", bandwidth, "TB/s", 1e-3, 1e3)
    _check_number("--overlap", overlap, "", 0, 1)
    if rows:
        refuse_options(settings, _OF_SETTINGS, "--rows shows what was measured")
        _check_rows(rows, overlap, bandwidth, fit, json)
        return
    check_preview(preview)
    if products and preview is None:
        raise CatsparseError("--products needs a preview; give --preview 4 as well")
    if bandwidth is not None or fit is not None:
        refuse_options(settings, ("gpu",), "the GPU is that of --bandwidth or --fit")
    if experts == 1:
        refuse_options(settings, ("active_experts",), "give --experts as well")
    _check_number("--link-latency", link_latency, "µs", 0, 1e6)
    _check_number("--link-bandwidth", link_bandwidth, "GB/s", 1e-3, 1e6)
    from ..bench import find_shape
    from ..bench.costs import BANDWIDTH
    from ..bench.simulate import simulated_row
    from ..bench.traffic import ENGINES, WEIGHTS, Setting

    check_choice("engine", engine, ENGINES)
    check_choice("gpu", gpu, tuple(BANDWIDTH))
    check_choice("weights", weights, WEIGHTS)
    shape = find_shape(config)
    cases = itertools.product(
        whole_numbers(batch, "--batch", 1, MOST_SEQUENCES),
        whole_numbers(context, "--context", 0, MOST_CONTEXT),
        whole_numbers(tp, "--tp", 1, MOST_GPUS),
        whole_numbers(pp, "--pp", 1, MOST_GPUS),
        list(dict.fromkeys([0.0, *sparsities(sparsity)])),
    )
    on, name = _machine(engine, gpu, bandwidth, fit, link_latency, link_bandwidth)
    make_folder(output)
    found = []
    for size, length, ranks, stages, share in cases:
        setting = Setting(
            *(shape, share, size, length, weights, preview if share else None),
            *(products and share > 0, overlap, ranks, stages, experts, active_experts),
        )
        found.append(simulated_row(setting, on, name))
    _show(found, output, plot, json)


def _machine(
    engine: str,
    gpu: str,
    bandwidth: float | None,
    fit: Path | None,
    link_latency: float | None,
    link_bandwidth: float | None,
) -> tuple[Any, str]:
    """The machine and its name: the GPU's, or its bandwidth."""
    from ..bench.costs import BANDWIDTH, fitted_machine, machine, read_measured

    speed = None if bandwidth is None else bandwidth * 1e12
    if fit is not None:
        on = fitted_machine(read_measured([fit])[0], engine, speed)
    else:
        on = machine(engine, BANDWIDTH[gpu] if speed is None else speed)
    if link_latency is not None:
        on = replace(on, link_latency=link_latency * 1e-6)
    if link_bandwidth is not None:
        on = replace(on, link_bandwidth=link_bandwidth * 1e9)
    known = bandwidth is None and fit is None
    return on, gpu if known else f"a GPU of {on.bandwidth / 1e12:.3g} TB/s"


def _check_number(option: str, value: float | None, unit: str, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:  # so that NaN is refused
        said = f"from {least:g} to {most:g} {unit}".rstrip()
        raise CatsparseError(f"{option} must be {said}, not {value:g}")


def _check_rows(
    paths: list[Path], overlap: float, bandwidth: float | None, fit: Path | None, json: bool
) -> None:
    """Predictions beside measured rows, and the errors by kind of row."""
    from ..bench.costs import BANDWIDTH, check, fitted_machine, groups, machine, probed
    from ..bench.costs import read_measured as read

    found, left_out = read(paths)
    if not found:
        raise CatsparseError(
            f"none of the {left_out} rows can be simulated; give some of a GPU, in bf16 or fp16, "
            "of a named shape, and not of peers"
        )
    given = None if bandwidth is None else bandwidth * 1e12
    of_fit = [] if fit is None else read([fit])[0]
    machines: dict[tuple[str, str], Any] = {}
    for each in found:
        key = (each.engine, each.device)
        if key in machines:
            continue
        if fit is not None and each.engine != "op":  # of which a fit of whole steps says nothing
            machines[key] = fitted_machine(of_fit, each.engine, given)
            continue
        own = given or BANDWIDTH.get(each.gpu or "")
        own = own or probed([other for other in found if other.device == each.device])
        if own is None:
            raise CatsparseError(f"the bandwidth of {each.device} is not known; give --bandwidth")
        machines[key] = machine(each.engine, own)
    found = [replace(row, setting=replace(row.setting, overlap=overlap)) for row in found]
    checks = check(found, lambda row: machines[row.engine, row.device])
    if json:
        shown = [_of_check(one) for one in checks]
        kinds = [asdict(group) for group in groups(checks)]
        print_json({"rows": shown, "groups": kinds, "left_out": left_out})
        return
    table = _table("predicted beside measured", "", "dropped", "measured", "predicted", "off",
                   "vs dense", "predicted", "off")  # fmt: skip
    for one in checks:
        row = _of_check(one)
        values = (row["measured"], row["predicted"])
        table.add_row(
            f"{row['name']}, {row['what']}, {row['batch']} x {row['context']}, {row['decided']}",
            f"{row['sparsity']:.0%}",
            *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values),
            f"{one.error:+.1%}",
            *(f"{one.row.vs_dense:.2f}x", f"{one.vs_dense:.2f}x", f"{one.vs_dense_error:+.1%}"),
        )
    _print(table)
    table = _table("errors: median, and largest", "", "rows", "speed", "", "vs dense", "")
    for group in groups(checks):
        table.add_row(
            *(group.name, str(group.rows), f"{group.error:.1%}", f"{group.worst:+.1%}"),
            *(f"{group.vs_dense_error:.1%}", f"{group.vs_dense_worst:+.1%}"),
        )
    _print(table)
    if left_out:
        out.print(f"{left_out} other rows: peers, CPUs, fp32, dropped inputs, other shapes")


def _of_check(one: Any) -> dict[str, Any]:
    """Plain values of a check: µs of an op, tokens/s of a model."""
    from ..bench.costs import kind_of

    row, setting = one.row, one.row.setting
    op = row.what == "op"
    return {
        "what": row.what,
        "name": setting.shape.name,
        "device": row.device,
        "batch": setting.batch,
        "context": setting.context,
        "sparsity": setting.sparsity,
        "decided": kind_of(setting),
        "measured": row.seconds * 1e6 if op else setting.batch / row.seconds,
        "predicted": one.seconds * 1e6 if op else setting.batch / one.seconds,
        "vs_dense": row.vs_dense,
        "predicted_vs_dense": one.vs_dense,
        "error": one.error,
        "vs_dense_error": one.vs_dense_error,
    }


def _show(rows: list[Any], output: Path, plot: bool, json: bool) -> None:
    path = output / "simulated.jsonl"
    lines = "".join(dumps(asdict(row)) + "\n" for row in rows)

    def write(temporary: Path) -> None:
        temporary.write_text(lines, encoding="utf-8")

    write_atomic(path, write)
    plots = []
    if plot:
        from ..report import plot_simulated

        plots = plot_simulated([asdict(row) for row in rows], output)
    if json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    _print_table(rows)
    for each in [path, *plots]:
        print(each)


def _print_table(rows: list[Any]) -> None:
    first = rows[0]
    keys = ("batch", "context", "tp", "pp")
    varied = [key for key in keys if len({getattr(row, key) for row in rows}) > 1]
    fixed = [f"{key} {getattr(first, key)}" for key in keys if key not in varied]
    if first.experts > 1:
        fixed.append(f"{first.active_experts} of {first.experts} experts")
    stages, linked = (any(getattr(row, key) > 1 for row in rows) for key in ("pp", "tp"))
    title = ", ".join([f"simulated {first.name}", first.weights, *fixed, first.engine])
    table = _table(
        f"{title} on {first.gpu}",
        *varied,
        *("dropped", "MLP\nskipped", "GB\nread", "GB\nheld", "tokens/s"),
        *(["pipeline\nfull"] if stages else []),
        *("bytes\nallow", "vs\ndense", "cache", "fixed"),
        *(["links"] if stages or linked else []),
    )
    for row in rows:
        cells = [str(getattr(row, key)) for key in varied]
        cells += [f"{row.sparsity:.0%}", f"{row.bytes_skipped:.0%}"]
        cells += [f"{row.read_gb:.3g}", f"{row.memory_gb:,.3g}", f"{row.tokens_per_second:,.0f}"]
        cells += [f"{row.full_tokens_per_second:,.0f}"] if stages else []
        cells += [f"{row.bytes_allow:.2f}x", f"{row.vs_dense:.2f}x"]
        cells += [f"{row.cache_time:.0%}", f"{row.fixed_time:.0%}"]
        cells += [f"{row.links_time:.0%}"] if stages or linked else []
        table.add_row(*cells)
    _print(table)


def _table(title: str, *columns: str) -> Table:
    return Table(
        *columns,
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _print(table: Table) -> None:
    """Whole, as figures cut short would be wrong ones; a narrow terminal wraps the lines."""
    Console(width=max(out.width, WIDTH)).print(table)
