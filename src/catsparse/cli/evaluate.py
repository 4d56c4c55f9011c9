"""``catsparse evaluate``: perplexity, dense beside sparse."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .common import (
    BatchSize,
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    SeqLen,
    Tokens,
    load,
    out,
    print_json,
    token_windows,
)


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
    from ..evaluate import evaluate as evaluate_model
    from ..evaluate import perplexity
    from ..modules import sparse_modules
    from ..surgery import state_of

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
        "preview": config.preview,
        "perplexity": e.perplexity.value,
        "perplexity_se": e.perplexity.standard_error,
        "dense_perplexity": e.dense_perplexity.value,
        "dense_perplexity_se": e.dense_perplexity.standard_error,
        "rise": e.rise,
        "rise_se": e.rise_standard_error,
        "sparsity": e.sparsity,
        "down_sparsity": e.down_sparsity,
        "bytes_skipped": e.bytes_skipped,
        "sites": e.sites,
        "down_sites": e.down_sites,
    }
    if json:
        print_json(result)
        return
    second = config.down_sparsity is not None
    columns = ["neurons dropped", *["down rows unread"] * second, "MLP bytes skipped"]
    table = Table("", "perplexity", "rise", *columns)
    d, s = e.dense_perplexity, e.perplexity
    table.add_row("dense", f"{d.value:.3f} ± {d.standard_error:.3f}", "", *[""] * len(columns))
    table.add_row(
        "sparse",
        f"{s.value:.3f} ± {s.standard_error:.3f}",
        f"{e.rise:+.1%} ± {e.rise_standard_error:.1%}",
        f"{e.sparsity:.1%}",
        *[f"{e.down_sparsity:.1%}"] * second,
        f"{e.bytes_skipped:.1%}",
    )
    out.print(table)
    sites = Table("gated MLP", "asked", "achieved", *["down asked", "achieved"] * second)
    for name, value in e.sites.items():
        site = config.sites[name]
        cells = [f"{site.sparsity:.1%}", f"{value:.1%}"]
        cells += [f"{site.down_sparsity:.1%}", f"{e.down_sites[name]:.1%}"] if second else []
        sites.add_row(name, *cells)
    out.print(sites)
    of = f"; a {config.preview}-bit preview of the {config.decided_on} decides"
    by_preview = of if config.preview else ""
    out.print(f"{e.tokens:,} tokens of {data_name}; every token thresholded{by_preview}")
