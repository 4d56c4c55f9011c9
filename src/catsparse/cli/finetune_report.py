"""What ``catsparse finetune`` prints and draws at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..errors import CatsparseError
from .common import err, out, print_json

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..finetune import Examples, FineTuned, Row


def report(
    result: FineTuned,
    rows: list[Row],
    before: Evaluation | None,
    after: Evaluation | None,
    examples: Examples,
    output: Path,
    json: bool,
) -> None:
    """Print it, or one JSON object, and draw the plots."""
    plots = _plots(rows, result, output)
    config = result.config
    asked = result.asked
    shares = [abs(result.drifted[name] - value) for name, value in asked.items()]
    losses = {
        variant: [r["eval_loss"] for r in rows if r["variant"] == variant and "eval_loss" in r]
        for variant in dict.fromkeys(row["variant"] for row in rows)
    }
    if json:
        print_json(
            {
                "output": str(output),
                "method": config.method,
                "steps": max((row["step"] for row in result.rows), default=0),
                "tokens": examples.tokens,
                "loss": next((r["loss"] for r in reversed(result.rows) if "loss" in r), None),
                "eval_loss": {
                    name: {"first": values[0], "last": values[-1]}
                    for name, values in losses.items()
                    if values
                },
                "before": _as_json(result, before),
                "after": _as_json(result, after),
                "sparsity": config.measured_sparsity,
                "bytes_skipped": config.bytes_skipped,
                "asked": asked,
                "drifted": result.drifted,
                "sites": {name: site.sparsity for name, site in config.sites.items()},
                "plots": [str(path) for path in plots],
            }
        )
        return
    if before is not None and after is not None:
        out.print(_table(result, before, after))
    for name, values in losses.items():
        if values:
            out.print(f"held-out loss, {name}: {values[0]:.4f} to {values[-1]:.4f}")
    out.print(
        f"sparsity by layer had moved by at most {max(shares):.1%} under the old thresholds; "
        f"now {config.measured_sparsity:.1%} of neurons are dropped and {config.bytes_skipped:.1%} "
        "of the MLPs' weight bytes skipped in decode",
        highlight=False,
    )
    for path in plots:
        print(path)
    out.print(f"{output}: next: catsparse evaluate {output}")


def _table(result: FineTuned, before: Evaluation, after: Evaluation) -> Table:
    table = Table("", "perplexity", "rise", "neurons dropped", "MLP bytes skipped")
    d = before.dense_perplexity
    table.add_row("dense", f"{d.value:.3f} ± {d.standard_error:.3f}", "", "", "")
    for name, e in (("sparse", before), ("fine-tuned", after)):
        table.add_row(
            name,
            f"{e.perplexity.value:.3f} ± {e.perplexity.standard_error:.3f}",
            f"{e.rise:+.1%} ± {e.rise_standard_error:.1%}",
            f"{e.sparsity:.1%}",
            f"{_bytes(result, e):.1%}",
        )
    return table


def _bytes(result: FineTuned, e: Evaluation) -> float:
    """Of weights as they are stored; on a CPU they were trained in fp32."""
    from ..finetune import bytes_skipped_at

    return bytes_skipped_at(result.config, e.sites, e.down_sites)


def _as_json(result: FineTuned, e: Evaluation | None) -> dict[str, Any] | None:
    if e is None:
        return None
    return {
        "tokens": e.tokens,
        "perplexity": e.perplexity.value,
        "perplexity_se": e.perplexity.standard_error,
        "dense_perplexity": e.dense_perplexity.value,
        "rise": e.rise,
        "rise_se": e.rise_standard_error,
        "sparsity": e.sparsity,
        "bytes_skipped": _bytes(result, e),
    }


def _plots(rows: list[Row], result: FineTuned, output: Path) -> list[Path]:
    from ..curves import plot_finetune

    try:
        tuned = {name: site.sparsity for name, site in result.config.sites.items()}
        return plot_finetune(rows, result.asked, result.drifted, tuned, output)
    except CatsparseError as error:  # matplotlib is not there: the model is
        err.print(f"no plot: {error}", highlight=False, soft_wrap=True)
        return []
