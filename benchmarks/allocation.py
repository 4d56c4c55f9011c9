"""Perplexity by allocation at budgets of bytes skipped -> rows, tables, and the sensitivities.

    python benchmarks/allocation.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N]

The default method, compensated. Sensitivities are measured on the last windows of the calibration
text, which the calibration then does not see. The tables in docs/quality.md were made by this
script.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch
from quality import RESULTS, load, options, row

from catsparse import Sensitivities, allocate, calibrate, densify, measure_sensitivities, sparsify
from catsparse.config import ALLOCATIONS, DEFAULT_METHOD
from catsparse.evaluate import Perplexity, evaluate
from catsparse.probing import TOKENS

BUDGETS = (0.333, 0.467, 0.6)


def main() -> None:
    args = options(__doc__.split("\n")[0]).parse_args()
    model, windows, heldout = load(args)
    probes = max(1, TOKENS // args.seq_len)
    calibration = calibrate(model, windows[:-probes])
    started = time.perf_counter()
    table = measure_sensitivities(model, calibration, windows[-probes:])
    seconds = time.perf_counter() - started
    calibration.sensitivities = table

    dense: Perplexity | None = None
    rows = []
    for budget, allocation in itertools.product(BUDGETS, ALLOCATIONS):
        started = time.perf_counter()
        sparsities = allocate(calibration, budget, allocation)
        solving = time.perf_counter() - started
        sparsify(model, calibration, bytes_skipped=budget, allocation=allocation)
        target = model.catsparse.config.sparsity
        e = evaluate(model, heldout, dense=dense)
        dense = e.dense_perplexity
        densify(model)
        predicted = sum(
            float(table.curve(name, torch.tensor([s], dtype=torch.float64)))
            for name, s in sparsities.items()
        )
        rows.append(
            row(args, DEFAULT_METHOD, True, target, e)
            | {
                "allocation": allocation,
                "budget": budget,
                "predicted_loss": predicted,
                "sparsities": {name: round(s, 4) for name, s in sparsities.items()},
                "solving_seconds": round(solving, 3),
                "sensitivity_tokens": table.tokens,
                "sensitivity_seconds": round(seconds, 1),
                "dtype": calibration.provenance.dtype,
            }
        )
        print(
            f"{budget:.1%} {allocation:8}: {e.rise:+.1%} ± {e.rise_standard_error:.1%}", flush=True
        )

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"allocation-{Path(args.model).name}.jsonl"
    sensitivities = {
        "model": Path(args.model).name,
        "sensitivity_sparsities": table.sparsities,
        "sensitivities": {n: [round(v, 6) for v in t.tolist()] for n, t in table.losses.items()},
    }
    lines = [*rows, sensitivities]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"\n{_table(rows)}\n\n{_sensitivities(table)}\nrows: {path}")


def _table(rows: list[dict[str, object]]) -> str:
    lines = [f"| MLP bytes to skip | {' | '.join(ALLOCATIONS)} |", "|---" * 4 + "|"]
    for budget in BUDGETS:
        cells = [f"{r['rise']:+.1%} ± {r['rise_se']:.1%}" for r in rows if r["budget"] == budget]
        lines.append(f"| {budget:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sensitivities(table: Sensitivities) -> str:
    head = [f"{s:.0%}" for s in table.sparsities]
    lines = [f"| gated MLP | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, loss in table.losses.items():
        lines.append(f"| {name} | {' | '.join(f'{1000 * v:.1f}' for v in loss.tolist())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
