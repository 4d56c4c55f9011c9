"""Perplexity of every method of the gate at 25/50/70/90% on one model -> rows and a Markdown table.

    python benchmarks/quality.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N]

Without arguments it measures the bundled model with its own texts. The table in docs/quality.md
was made by this script.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from catsparse import calibrate, densify, hub, sparsify
from catsparse.config import GATE_METHODS
from catsparse.data import load_windows
from catsparse.evaluate import Evaluation, Perplexity, evaluate

SPARSITIES = (0.25, 0.5, 0.7, 0.9)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--method", action="append", choices=GATE_METHODS, help="default: all")
    args = parser.parse_args()
    model, windows, heldout = load(args)
    calibration = calibrate(model, windows)

    name = Path(args.model).name
    chosen = tuple(args.method or GATE_METHODS)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"quality-{name}.jsonl"
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows: list[dict[str, object]] = [r for r in map(json.loads, kept) if r["method"] not in chosen]
    dense: Perplexity | None = None
    for method, compensate, s in itertools.product(chosen, (False, True), SPARSITIES):
        sparsify(model, calibration, s, method, compensate)
        e = evaluate(model, heldout, dense=dense)
        dense = e.dense_perplexity
        densify(model)
        rows.append(row(args, method, compensate, s, e))
        print(
            f"{method} {'compensated' if compensate else 'plain':11} {s:.0%}: {e.rise:+.1%}",
            flush=True,
        )

    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"\n{_table(rows)}\nrows: {path}")


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", nargs="?", default=hub.DEFAULT_MODEL)
    parser.add_argument("--data", default=str(hub.bundled_text("calibration")))
    parser.add_argument("--heldout", default=str(hub.bundled_text("heldout")))
    parser.add_argument("--tokens", type=int, default=100_000, help="of each text, at most")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def load(args: argparse.Namespace) -> tuple[Any, Tensor, Tensor]:
    """The model, and windows of both texts."""
    model = hub.load_dense_model(args.model).to(args.device)
    tokenizer = hub.load_tokenizer(args.model)
    sizes = {"tokens": args.tokens, "seq_len": args.seq_len}
    windows = load_windows(args.data, tokenizer, seed=0, **sizes)
    return model, windows, load_windows(args.heldout, tokenizer, seed=None, **sizes)


def row(
    args: argparse.Namespace, method: str, compensate: bool, target: float, e: Evaluation
) -> dict[str, object]:
    return {
        "model": Path(args.model).name,
        "calibration": Path(args.data).name,
        "heldout": Path(args.heldout).name,
        "tokens": e.tokens,
        "method": method,
        "compensate": compensate,
        "target": target,
        "sparsity": e.sparsity,
        "bytes_skipped": e.bytes_skipped,
        "dense_perplexity": e.dense_perplexity.value,
        "perplexity": e.perplexity.value,
        "perplexity_se": e.perplexity.standard_error,
        "rise": e.rise,
        "rise_se": e.rise_standard_error,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def _table(rows: list[dict[str, object]]) -> str:
    """Rise over dense by method and sparsity, with the bytes skipped at each."""
    head = [f"{s:.0%}" for s in SPARSITIES]
    lines = [f"| method | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for method, compensate in itertools.product(GATE_METHODS, (False, True)):
        chosen = [r for r in rows if (r["method"], r["compensate"]) == (method, compensate)]
        cells = [f"{r['rise']:+.1%} ± {r['rise_se']:.1%}" for r in chosen]
        label = f"{method}{', compensated' if compensate else ''}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    skipped = [r for r in rows if (r["method"], r["compensate"]) == ("cats", False)]
    cells = [f"{r['bytes_skipped']:.3f}" for r in skipped]
    lines.append(f"| MLP bytes skipped (cats) | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
