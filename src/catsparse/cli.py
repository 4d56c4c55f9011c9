"""The ``catsparse`` command: each subcommand imports only what it needs.

Results go to stdout (one JSON object with --json), everything else to stderr. Exit codes: 0 done,
2 the input is at fault (one sentence, no traceback), 1 anything else.
"""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

from ._version import __version__
from .cli_common import (
    BatchSize,
    Column,
    Data,
    Device,
    Directory,
    Dtype,
    Json,
    Model,
    Seed,
    SeqLen,
    Tokens,
    err,
    load,
    load_dense,
    out,
    print_json,
    refuse_options,
    token_windows,
)
from .config import DEFAULT_METHOD, METHODS, PREFILL_POLICIES, check_choice, check_sparsity
from .errors import CatsparseError

app = typer.Typer(
    name="catsparse",
    help="Make a gated-MLP language model activation-sparse, and measure what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def sparsify(
    context: typer.Context,
    model: Model = "default",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    sparsity: Annotated[float, typer.Option(help="Fraction of neurons to drop, 0 to 1.")] = 0.5,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = DEFAULT_METHOD,
    compensate: Annotated[
        bool, typer.Option(help="Replace dropped neurons by their means (free at run time).")
    ] = True,
    prefill: Annotated[
        str, typer.Option(help=f"{' or '.join(PREFILL_POLICIES)} treatment of the prompt.")
    ] = "masked",
    data: Data = None,
    column: Column = "text",
    tokens: Tokens = 100_000,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    merge: Annotated[bool, typer.Option("--merge", help="Write the weights as well.")] = False,
    json: Json = False,
) -> None:
    """Calibrate MODEL and write a sparse one to the output folder.

    Given a folder that was written before, take its calibration and only choose new thresholds.
    """
    check_sparsity(sparsity)
    check_choice("method", method, METHODS)
    check_choice("prefill", prefill, PREFILL_POLICIES)
    from . import hub
    from .calibration import Calibration
    from .observation import calibrate
    from .sites import describe, find_sites
    from .surgery import densify, state_of
    from .surgery import sparsify as sparsify_model

    calibration: Calibration | None = None
    if hub.is_artifact(model):
        refuse_options(
            context,
            ("data", "column", "tokens", "seq_len", "batch_size", "seed"),
            f"{model} brings its own calibration; name the dense model to calibrate again",
        )
        sparse, tokenizer = load(model, device, dtype)
        calibration = state_of(sparse).calibration
        if calibration is None:
            raise CatsparseError(f"{model} was saved without its calibration; name the dense model")
        dense = densify(sparse)
    else:
        dense, tokenizer = load_dense(model, device, dtype)
    if calibration is None:
        windows, data_name = token_windows(
            data, "calibration", tokenizer, tokens, seq_len, seed, column
        )
        try:
            calibration = calibrate(
                dense,
                windows,
                batch_size=batch_size,
                seed=seed,
                data_name=data_name,
                checkpoint=output / ".calibration.partial.safetensors",
            )
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on from the last saved part")
            raise typer.Exit(130) from None
    left_dense = describe(find_sites(dense)[1])
    sparse = sparsify_model(dense, calibration, sparsity, method, compensate, prefill)
    hub.save(sparse, output, merge=merge)
    if merge:
        tokenizer.save_pretrained(output)
    config = sparse.catsparse.config
    result = {
        "output": str(output),
        "method": method,
        "compensate": compensate,
        "sparsity": config.measured_sparsity,
        "bytes_skipped": config.bytes_skipped,
        "sites": {name: site.sparsity for name, site in config.sites.items()},
        "calibration_tokens": calibration.provenance.tokens,
        "calibration_data": calibration.provenance.data,
        "left_dense": left_dense,
    }
    if json:
        print_json(result)
        return
    if left_dense:
        err.print(f"left dense: {left_dense}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"{output}: {len(config.sites)} gated MLPs, {config.measured_sparsity:.1%} of neurons "
        f"dropped, {config.bytes_skipped:.1%} of the MLPs' weight bytes skipped in decode "
        f"({calibration.provenance.tokens:,} tokens of {calibration.provenance.data})"
    )
    out.print(f"next: catsparse evaluate {output}")


@app.command()
def evaluate(
    model: Model = "default",
    data: Data = None,
    column: Column = "text",
    tokens: Tokens = 100_000,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity with its standard error; for a sparse folder the dense one beside it."""
    from .evaluate import evaluate as evaluate_model
    from .evaluate import perplexity
    from .modules import sparse_modules
    from .surgery import state_of

    loaded, tokenizer = load(model, device, dtype)
    windows, data_name = token_windows(data, "heldout", tokenizer, tokens, seq_len, None, column)
    if not sparse_modules(loaded):
        dense = perplexity(loaded, windows, batch_size)
        result: dict[str, Any] = {
            "model": model,
            "data": data_name,
            "tokens": windows.shape[0] * (windows.shape[1] - 1),
            "perplexity": dense.value,
            "perplexity_se": dense.standard_error,
        }
        if json:
            print_json(result)
        else:
            out.print(
                f"{model} (dense): perplexity {dense.value:.3f} ± {dense.standard_error:.3f} on "
                f"{result['tokens']:,} tokens of {data_name}"
            )
        return
    e = evaluate_model(loaded, windows, batch_size)
    config = state_of(loaded).config
    result = {
        "model": model,
        "data": data_name,
        "tokens": e.tokens,
        "method": config.method,
        "compensate": config.compensate,
        "perplexity": e.perplexity.value,
        "perplexity_se": e.perplexity.standard_error,
        "dense_perplexity": e.dense_perplexity.value,
        "dense_perplexity_se": e.dense_perplexity.standard_error,
        "rise": e.rise,
        "rise_se": e.rise_standard_error,
        "sparsity": e.sparsity,
        "bytes_skipped": e.bytes_skipped,
        "sites": e.sites,
    }
    if json:
        print_json(result)
        return
    table = Table("", "perplexity", "rise", "neurons dropped", "MLP bytes skipped")
    d, s = e.dense_perplexity, e.perplexity
    table.add_row("dense", f"{d.value:.3f} ± {d.standard_error:.3f}", "", "", "")
    table.add_row(
        "sparse",
        f"{s.value:.3f} ± {s.standard_error:.3f}",
        f"{e.rise:+.1%} ± {e.rise_standard_error:.1%}",
        f"{e.sparsity:.1%}",
        f"{e.bytes_skipped:.1%}",
    )
    out.print(table)
    sites = Table("gated MLP", "asked", "achieved")
    for name, value in e.sites.items():
        sites.add_row(name, f"{config.sites[name].sparsity:.1%}", f"{value:.1%}")
    out.print(sites)
    out.print(f"{e.tokens:,} tokens of {data_name}; every token thresholded")


@app.command()
def generate(
    model: Model = "default",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = ...,  # type: ignore[assignment]
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens at most.", min=1)] = 100,
    compare: Annotated[bool, typer.Option("--compare", help="Dense beside sparse.")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Write text, streaming it as it comes."""
    from .modules import sparse_modules
    from .surgery import run_dense
    from .text import TextGenerator

    loaded, tokenizer = load(model, device, dtype)
    is_sparse = bool(sparse_modules(loaded))
    if compare and not is_sparse:
        raise CatsparseError(f"{model} is dense; --compare needs a folder made by sparsify")
    writer = TextGenerator(
        loaded, tokenizer, tokens, greedy=greedy, temperature=temperature, top_p=top_p, seed=seed
    )
    result: dict[str, Any] = {"model": model, "prompt": prompt}
    if compare:
        with run_dense(loaded):
            if not json:
                out.rule("dense", align="left")
            dense = writer.write(prompt, stream=not json)
        result |= {"dense_text": dense.text, "dense_tokens_per_second": dense.tokens_per_second}
        if not json:
            out.rule("sparse", align="left")
    written = writer.write(prompt, stream=not json)
    result |= {
        "text": written.text,
        "tokens": written.tokens,
        "tokens_per_second": written.tokens_per_second,
    }
    if json:
        print_json(result)
    else:
        err.print(f"{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s", style="dim")


@app.command()
def info(model: Model = "default", json: Json = False) -> None:
    """What is in a sparse folder, or which gated MLPs a dense model has (no weights are read)."""
    from . import hub
    from .surgery import explain

    if not hub.is_artifact(model):
        skeleton = hub.load_skeleton(model)
        lines = explain(skeleton).split("\n")
        if json:
            print_json({"model": model, "modules": lines})
        else:
            out.print(f"{model} ({type(skeleton).__name__})")
            out.print("\n".join(lines), highlight=False)
        return
    config, _, calibration = hub.read_artifact(model)
    if json:
        described = json_module.loads(config.to_json())
        print_json(described | {"bytes_skipped": config.bytes_skipped})
        return
    base, origin = config.base_model, config.calibration
    out.print(
        f"{model}: {base.name_or_path if base else 'unnamed'} "
        f"({base.model_type if base else '?'}), method {config.method}"
        f"{', compensated' if config.compensate else ''}, prefill {config.prefill}"
    )
    out.print(
        f"asked {config.sparsity:.1%}, {config.measured_sparsity or 0:.1%} of neurons dropped on "
        f"the calibration tokens, {config.bytes_skipped:.1%} of the MLPs' weight bytes skipped"
    )
    if origin:
        out.print(
            f"calibrated on {origin.tokens:,} tokens of {origin.data} in windows of "
            f"{origin.seq_len}, {origin.dtype}, seed {origin.seed}"
            + ("" if calibration else " (statistics not kept)")
        )
    table = Table("gated MLP", "act", "H", "I", "threshold", "dropped")
    for name, site in config.sites.items():
        table.add_row(
            name,
            site.act,
            str(site.hidden_size),
            str(site.intermediate_size),
            f"{site.threshold:.4g}",
            f"{site.sparsity:.1%}",
        )
    out.print(table)


@app.command()
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
    from .report import plot_directory

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


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = Path(
        "out/demo"
    ),
    json: Json = False,
) -> None:
    """The whole path on the bundled model: a table at 25/50/70/90%, two texts and plots."""
    from .demo import run_demo

    result = run_demo(output, show=None if json else out)
    if json:
        print_json(result)


def main() -> NoReturn:
    """Entry point: turns exceptions into one sentence and an exit code."""
    try:
        app()
    except Exception as error:
        if _debug:
            raise
        known = isinstance(error, CatsparseError)
        hint = " (catsparse --debug ... shows the traceback)"
        text = f"error: {error}" if known else f"{type(error).__name__}: {error}{hint}"
        err.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2 if known else 1)
    sys.exit(0)


if __name__ == "__main__":
    main()
