"""Perplexity with a gate preview and a second decision, beside the exact gate -> rows and a table.

    python benchmarks/preview.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N] [--bits 4|8]

The table in docs/quality.md was made by this script. The default method, compensated; rows are
added to those of earlier runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from quality import RESULTS, load, options, row

from catsparse import Calibration, calibrate, densify, sparsify
from catsparse.config import DEFAULT_METHOD, PREVIEW_BITS
from catsparse.evaluate import Perplexity, evaluate

SPARSITIES = (0.5, 0.7, 0.9)
SECOND = ((0.4, 0.45), (0.5, 0.65), (0.6, 0.85))  # sparsity of the gate, and of down


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, choices=PREVIEW_BITS, default=4)
    args = parser.parse_args()
    model, windows, heldout = load(args)
    dense: Perplexity | None = None
    rows = []

    def measure(calibration: Calibration, s: float, down: float | None = None) -> None:
        nonlocal dense
        sparsify(model, calibration, s, down_sparsity=down)
        e = evaluate(model, heldout, dense=dense)
        dense = e.dense_perplexity
        densify(model)
        rows.append(
            row(args, DEFAULT_METHOD, True, s, e)
            | {
                "preview": calibration.preview,
                "down_target": down,
                "down_sparsity": e.down_sparsity,
                "dtype": calibration.provenance.dtype,
            }
        )
        print(f"preview {calibration.preview}, {s:.0%}, down {down}: {e.rise:+.1%}", flush=True)

    exact = calibrate(model, windows)
    for s in SPARSITIES:
        measure(exact, s)
    calibrations = [calibrate(model, windows, preview=args.bits, products_at=s) for s, _ in SECOND]
    for s in SPARSITIES:
        measure(calibrations[0], s)
    for calibration, (s, down) in zip(calibrations, SECOND, strict=True):
        measure(calibration, s, down)

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"preview-{Path(args.model).name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    print(f"\n{_table(rows)}\nrows: {path}")


def _table(rows: list[dict[str, object]]) -> str:
    head = ("decided by", "neurons dropped", "down rows unread", "MLP bytes skipped", "rise")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        by = f"{r['preview']}-bit preview" if r["preview"] else "exact gate"
        by += "" if r["down_target"] is None else " and product"
        shares = [f"{r[key]:.1%}" for key in ("sparsity", "down_sparsity", "bytes_skipped")]
        lines.append(f"| {by} | {' | '.join(shares)} | {r['rise']:+.1%} ± {r['rise_se']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
