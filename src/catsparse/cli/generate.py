"""``catsparse generate``: text, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import CatsparseError
from .common import (
    Compile,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    err,
    load,
    out,
    print_json,
    summarize_paths,
)

if TYPE_CHECKING:  # it brings torch, which --help does not need
    from ..text import TextGenerator, Written


def generate(
    model: Model = "default",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")] = ...,  # type: ignore[assignment]
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="New tokens at most.", min=1)] = 100,
    compare: Annotated[bool, typer.Option("--compare", help="Dense beside sparse.")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Seed = 0,
    stats: Annotated[
        bool, typer.Option("--stats", help="Also speed by phase, neurons dropped, bytes skipped.")
    ] = False,
    compile: Compile = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Write text, streaming it as it comes."""
    from ..surgery import run_dense, sparse_layers
    from ..text import TextGenerator

    loaded, tokenizer = load(model, device, dtype)
    is_sparse = bool(sparse_layers(loaded))
    if compare and not is_sparse:
        raise CatsparseError(f"{model} is dense; --compare needs a folder made by sparsify")
    writer = TextGenerator(
        loaded,
        tokenizer,
        tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        compile=compile,
    )
    result: dict[str, Any] = {"model": model, "prompt": prompt}
    dense = None
    if compare:
        if not json:
            out.rule("dense", align="left")
        with run_dense(loaded):
            dense = _write(writer, prompt, show=not json)
        result |= {"dense_text": dense.text, "dense_tokens_per_second": dense.tokens_per_second}
        if not json:
            out.rule("sparse", align="left")
    written = _write(writer, prompt, show=not json)
    result |= {
        "text": written.text,
        "tokens": written.tokens,
        "tokens_per_second": written.tokens_per_second,
    }
    if stats:
        measured = _measured(loaded, written, is_sparse)
        if dense is not None:
            measured |= {
                "dense_seconds_to_first_token": dense.seconds_to_first_token,
                "dense_decode_tokens_per_second": dense.decode_tokens_per_second,
            }
        result |= measured
    if json:
        print_json(result)
    elif stats:
        _show_stats(result)
    else:
        err.print(f"{written.tokens} tokens, {written.tokens_per_second:.1f} tokens/s", style="dim")


def _write(writer: TextGenerator, prompt: str, show: bool) -> Written:
    if not show:
        return writer.write(prompt)
    _show(prompt)
    written = writer.write(prompt, _show)
    print()
    return written


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _measured(model: Any, written: Written, is_sparse: bool) -> dict[str, Any]:
    from .. import decoding
    from ..bench.decode import bytes_per_token
    from ..dropped import measure
    from ..explanation import model_paths

    found: dict[str, Any] = {
        "prompt_tokens": written.prompt_tokens,
        "seconds_to_first_token": written.seconds_to_first_token,
        "decode_tokens_per_second": written.decode_tokens_per_second,
        "step": decoding.last_step(model) or "model.generate",
    }
    if not is_sparse:
        return found
    dropped = measure(model, written.ids)
    of_all = None
    if all(p.dim() <= 2 for p in model.parameters()):  # a token reads few of an MoE's experts
        of_all = dropped.bytes_skipped * dropped.nbytes / bytes_per_token(model)[0]
    return found | {
        "sparsity": dropped.sparsity,
        "sparsity_min": dropped.lowest,
        "sparsity_max": dropped.highest,
        "bytes_skipped": dropped.bytes_skipped,
        "bytes_skipped_of_all": of_all,
        "decode": summarize_paths(model_paths(model)),
    }


def _show_stats(result: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2))
    row = grid.add_row
    row("prompt", f"{result['prompt_tokens']} tokens, {_time(result, '')}")
    row("new", f"{result['tokens']} tokens, {_rate(result, '')}")
    if "dense_text" in result:
        row("dense", f"{_time(result, 'dense_')}, {_rate(result, 'dense_')}")
    row("a token by", result["step"])
    if "sparsity" in result:
        low, high = result["sparsity_min"], result["sparsity_max"]
        row("dropped", f"{result['sparsity']:.1%} ({low:.1%} to {high:.1%} by layer)")
        of_all = result["bytes_skipped_of_all"]
        share = "" if of_all is None else f", {of_all:.1%} of all that a step reads"
        row("bytes skipped", f"{result['bytes_skipped']:.1%} of the layers{share}")
        row("they run by", result["decode"])
    out.print(grid, highlight=False)


def _time(result: dict[str, Any], which: str) -> str:
    return f"first token after {result[f'{which}seconds_to_first_token']:.3f} s"


def _rate(result: dict[str, Any], which: str) -> str:
    rate = result[f"{which}decode_tokens_per_second"]
    return "too few for a rate" if rate is None else f"decode {rate:.1f} tokens/s"
