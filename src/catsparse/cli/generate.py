"""``catsparse generate``: text, streamed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import CatsparseError
from .common import Device, Dtype, Json, Model, Seed, err, load, out, print_json


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
    from ..modules import sparse_modules
    from ..surgery import run_dense
    from ..text import TextGenerator

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
