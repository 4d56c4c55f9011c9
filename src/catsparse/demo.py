"""The whole path on the bundled model, for a first look."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import hub
from .config import DEFAULT_METHOD
from .data import load_windows
from .evaluate import Evaluation, evaluate
from .observation import calibrate
from .report import plot_directory
from .surgery import densify, sparsify
from .text import TextGenerator

SPARSITIES = (0.25, 0.5, 0.7, 0.9)
PROMPT = "It was a dark and stormy night, and the old man"


def run_demo(output: Path, show: Console | None) -> dict[str, Any]:
    """Calibrate, evaluate at four sparsities, write two texts, save the 50% model and plot it.

    Args:
        output: folder for the artifact and the plots.
        show: console for the tables and texts, or None for silence.

    Returns:
        What was shown, ready for JSON.
    """
    start = time.perf_counter()
    model = hub.load_dense_model(hub.DEFAULT_MODEL)
    tokenizer = hub.load_tokenizer(hub.DEFAULT_MODEL)
    training = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=40_000, seed=0)
    heldout = load_windows(hub.bundled_text("heldout"), tokenizer, tokens=20_000, seed=None)
    calibration = calibrate(model, training, data_name="the bundled calibration text")

    texts = {"dense": TextGenerator(model, tokenizer, 80).write(PROMPT).text}
    evaluations: list[Evaluation] = []
    for s in SPARSITIES:
        sparsify(model, calibration, s)
        known = evaluations[0].dense_perplexity if evaluations else None
        evaluations.append(evaluate(model, heldout, dense=known))
        if s == 0.5:
            texts["50% sparse"] = TextGenerator(model, tokenizer, 80).write(PROMPT).text
            hub.save(model, output)
        densify(model)
    plots = plot_directory(output, output)
    seconds = time.perf_counter() - start

    if show is not None:
        show.print(_table(evaluations))
        for name, text in texts.items():
            show.rule(f"{name}, the same seed", align="left")
            show.print(Text.assemble((PROMPT, "bold"), text))
        show.rule(align="left")
        for path in plots:
            show.print(str(path), highlight=False, soft_wrap=True)
        show.print(f"{seconds:.0f} s; the 50% sparse model is in {output}", highlight=False)
    return {
        "dense_perplexity": evaluations[0].dense_perplexity.value,
        "rows": [
            {
                "target": s,
                "sparsity": e.sparsity,
                "bytes_skipped": e.bytes_skipped,
                "perplexity": e.perplexity.value,
                "rise": e.rise,
                "rise_se": e.rise_standard_error,
            }
            for s, e in zip(SPARSITIES, evaluations, strict=True)
        ],
        "prompt": PROMPT,
        "texts": texts,
        "plots": [str(path) for path in plots],
        "output": str(output),
        "seconds": seconds,
    }


def _table(evaluations: list[Evaluation]) -> Table:
    dense = evaluations[0].dense_perplexity
    table = Table(
        "sparsity",
        "neurons dropped",
        "MLP bytes skipped",
        "perplexity",
        "rise",
        title=f"the bundled model on held-out books ({DEFAULT_METHOD}, compensated)",
        title_justify="left",
    )
    table.add_row("dense", "", "", f"{dense.value:.2f} ± {dense.standard_error:.2f}", "")
    for s, e in zip(SPARSITIES, evaluations, strict=True):
        table.add_row(
            f"{s:.0%}",
            f"{e.sparsity:.1%}",
            f"{e.bytes_skipped:.1%}",
            f"{e.perplexity.value:.2f} ± {e.perplexity.standard_error:.2f}",
            f"{e.rise:+.1%} ± {e.rise_standard_error:.1%}",
        )
    return table
