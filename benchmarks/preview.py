"""Perplexity with a preview of gate or product and a second decision, beside the exact gate -> rows
and a table.

    python benchmarks/preview.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N] [--bits 4|8]
                                 [--only exact|gate|second|product ...]

The table in docs/quality.md was made by this script. The default methods, compensated; rows are
added to those of earlier runs.
"""

from __future__ import annotations

import json
from pathlib import Path

from quality import RESULTS, load, options, row

from catsparse import Calibration, calibrate, densify, sparsify
from catsparse.config import DEFAULT_METHOD, PREVIEW_BITS, PRODUCT
from catsparse.evaluate import Perplexity, evaluate
from catsparse.footprint import bytes_skipped

KINDS = ("exact", "gate", "second", "product")
SPARSITIES = (0.5, 0.7, 0.9)
SECOND = ((0.4, 0.45), (0.5, 0.65), (0.6, 0.85))  # sparsity of the gate, and of down
SKIPPED = (0.333, 0.467, 0.6)  # MLP bytes: what the exact gate skips at SPARSITIES


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--bits", type=int, choices=PREVIEW_BITS, default=4)
    parser.add_argument("--only", action="append", choices=KINDS, help="default: all")
    args = parser.parse_args()
    model, windows, heldout = load(args)
    kinds = tuple(args.only or KINDS)
    dense: Perplexity | None = None
    rows = []

    def measure(calibration: Calibration, s: float, method: str, down: float | None = None) -> None:
        nonlocal dense
        sparsify(model, calibration, s, method, down_sparsity=down)
        e = evaluate(model, heldout, dense=dense)
        dense = e.dense_perplexity
        densify(model)
        rows.append(
            row(args, method, True, s, e)
            | {
                "preview": calibration.preview,
                "down_target": down,
                "down_sparsity": e.down_sparsity,
                "dtype": calibration.provenance.dtype,
            }
        )
        print(f"{_decided_by(rows[-1])}, {s:.1%}, down {down}: {e.rise:+.1%}", flush=True)

    if "exact" in kinds:
        exact = calibrate(model, windows)
        for s in SPARSITIES:
            measure(exact, s, DEFAULT_METHOD)
    pairs = SECOND if "second" in kinds else ()
    calibrations = [calibrate(model, windows, preview=args.bits, products_at=s) for s, _ in pairs]
    first = calibrations[0] if calibrations else None
    if first is None and {"gate", "product"} & {*kinds}:
        first = calibrate(model, windows, preview=args.bits)
    if first is not None and "gate" in kinds:
        for s in SPARSITIES:
            measure(first, s, DEFAULT_METHOD)
    for calibration, (s, down) in zip(calibrations, pairs, strict=True):
        measure(calibration, s, DEFAULT_METHOD, down)
    if first is not None and "product" in kinds:
        hidden, itemsize = next(iter(first.sites.values())).hidden_size, model.dtype.itemsize
        for skipped in SKIPPED:
            # As many bytes as that once the previews, which are read whole, are paid for.
            read = -bytes_skipped(0.0, None, args.bits, hidden, itemsize, of_products=True)
            measure(first, skipped + read, PRODUCT)

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"preview-{Path(args.model).name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    print(f"\n{_table(rows)}\nrows: {path}")


def _decided_by(r: dict[str, object]) -> str:
    if not r["preview"]:
        return "exact gate"
    by = f"{r['preview']}-bit preview"
    if r["method"] == PRODUCT:
        return f"{by} of the product"
    return by if r["down_target"] is None else f"{by} and product"


def _table(rows: list[dict[str, object]]) -> str:
    head = ("decided by", "neurons dropped", "down rows unread", "MLP bytes skipped", "rise")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        shares = [f"{r[key]:.1%}" for key in ("sparsity", "down_sparsity", "bytes_skipped")]
        rise = f"{r['rise']:+.1%} ± {r['rise_se']:.1%}"
        lines.append(f"| {_decided_by(r)} | {' | '.join(shares)} | {rise} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
