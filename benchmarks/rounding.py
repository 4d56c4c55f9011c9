"""Perplexity of packed weights rounded to nearest and with data, dense and sparse -> rows, a table.

    python benchmarks/rounding.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N]

Rounded with up to 32,768 of the tokens that thresholds are calibrated on. Sparse is `energy` with
means. The rise is over the dense model in floats. The table in docs/choosing.md was made by this
script.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from quality import RESULTS, load, options, row

from catsparse import calibrate, densify, quantize_weights, sparsify
from catsparse.config import ROUNDING_TOKENS, ROUNDINGS
from catsparse.evaluate import Perplexity, evaluate, perplexity

SPARSITIES = (0.0, 0.5, 0.7)


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--weights", default="int4,fp8,int8")
    args = parser.parse_args()
    path = RESULTS / f"rounding-{Path(args.model).name}.jsonl"
    rows = []
    dense: Perplexity | None = None
    for weights in args.weights.split(","):
        for rounding in ROUNDINGS:
            model, windows, heldout = load(args)
            model = model.to(torch.bfloat16)
            dense = dense or perplexity(model, heldout)
            some = windows[: max(1, ROUNDING_TOKENS // windows.shape[1])]
            quantize_weights(model, weights, some if rounding == "gptq" else None)
            calibration = calibrate(model, windows)
            for s in SPARSITIES:
                sparsify(model, calibration, s, "energy")
                e = evaluate(model, heldout, dense=dense)
                densify(model)
                more = {"weights": weights, "rounding": rounding}
                rows.append(row(args, "energy", True, s, e) | more)
                print(f"{weights} {rounding} {s:.0%}: {e.rise:+.2%}", flush=True)
            path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    print("| weights | rounded |" + "".join(f" {s:.0%} dropped |" for s in SPARSITIES))
    print("|---|---|" + "---|" * len(SPARSITIES))
    for at in range(0, len(rows), len(SPARSITIES)):
        part = rows[at : at + len(SPARSITIES)]
        cells = "".join(f" {r['rise']:+.2%} ± {r['rise_se']:.2%} |" for r in part)
        print(f"| {part[0]['weights']} | {part[0]['rounding']} |{cells}")
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
