"""How many neurons sequences of a batch drop together -> rows and a table; runs on a CPU.

    python benchmarks/unions.py

The bundled model on windows of its held-out text: at each position the neurons that all of some
windows drop, in the mean over layers. ``overlap`` is the one of `catsparse bench simulate`: of a
sparsity s, T tokens leave out s^(T^(1 - overlap)). docs/scale.md quotes the rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import catsparse
from catsparse import hub
from catsparse.bench.rows import commit, versions
from catsparse.data import load_windows
from catsparse.modules import sparse_modules

RESULTS = Path(__file__).parent / "results" / "unions-default.jsonl"
WINDOWS, LENGTH, FIRST = 64, 256, 32  # the first positions see little text
BATCHES = (1, 2, 4, 8, 16)


def main() -> None:
    model, tokenizer = hub.load_dense_model("default"), hub.load_tokenizer("default")
    texts = {name: str(hub.bundled_text(name)) for name in ("calibration", "heldout")}
    data = load_windows(texts["calibration"], tokenizer, tokens=32768, seq_len=LENGTH, seed=0)
    windows = load_windows(
        texts["heldout"], tokenizer, tokens=WINDOWS * LENGTH, seq_len=LENGTH, seed=None
    )
    calibrations = {
        preview: catsparse.calibrate(model, data, preview=preview, progress=False)
        for preview in (None, 4)
    }
    rows = []
    for method, preview in (("cats", None), ("energy", None), ("product", 4)):
        for sparsity in (0.5, 0.7, 0.9):
            catsparse.sparsify(model, calibrations[preview], sparsity, method=method)
            rows += measure(model, windows, {"method": method, "asked": sparsity})
            catsparse.densify(model)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))


@torch.no_grad()
def measure(model: Any, windows: Tensor, setting: dict[str, Any]) -> list[dict[str, Any]]:
    layers: dict[str, list[Tensor]] = {name: [] for name in sparse_modules(model)}
    for name, module in sparse_modules(model).items():
        module.catsparse_counter = lambda keep, kept, seen=layers[name]: seen.append(kept.clone())
    for part in windows.split(8):
        model(part)
    for module in sparse_modules(model).values():
        module.catsparse_counter = None
    dropped = dict.fromkeys(BATCHES, 0.0)
    for seen in layers.values():
        keep = torch.cat([mask.reshape(-1, LENGTH, mask.shape[-1]) for mask in seen])[:, FIRST:]
        for batch in BATCHES:
            any_of = keep.view(WINDOWS // batch, batch, *keep.shape[1:]).any(1)
            dropped[batch] += (1 - float(any_of.float().mean())) / len(layers)
    return [
        {
            "what": "union",
            "model": "default",
            **setting,
            "batch": batch,
            "dropped": share,
            "overlap": overlap(dropped[1], share, batch),
            "windows": WINDOWS,
            "positions": LENGTH - FIRST,
            "versions": versions(),
            "commit": commit(),
        }
        for batch, share in dropped.items()
    ]


def overlap(one: float, all_of: float, batch: int) -> float | None:
    if batch == 1 or not 0 < all_of < 1:
        return None
    return 1 - math.log(math.log(all_of) / math.log(one)) / math.log(batch)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(map(str, BATCHES)) + " |", "|---" * (len(BATCHES) + 1) + "|"]
    for key in dict.fromkeys((row["method"], row["asked"]) for row in rows):
        cells = [
            f"{row['dropped']:.3f}" + (f" ({row['overlap']:.2f})" if row["overlap"] else "")
            for row in rows
            if (row["method"], row["asked"]) == key
        ]
        lines.append(f"| {key[0]}, {key[1]:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
