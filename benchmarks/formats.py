"""Perplexity beside bytes read a token, of packed weights, sparsity, and both -> rows, a plot.

    python benchmarks/formats.py [MODEL] [--data FILE] [--heldout FILE] [--tokens N]

Every format is quantized and calibrated by itself; each rise is over the dense model in floats, on
the same windows. The packed weights' values are put back into float layers, so that a CPU need not
unpack them for every batch. Bytes are those of all linear layers that decode reads, of floats 16
bits each. Sparse are the gated MLPs: by CATS as in its paper, by `energy` with means (the default
without a preview), and by `product` with a preview of 4 bits (the default with one; not for int4,
whose weights are as small as that). The table and the plot in docs/choosing.md were made by this
script.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from quality import RESULTS, load, options, row
from torch import nn

from catsparse import calibrate, densify, quantize_weights, sparsify
from catsparse.config import WEIGHTS
from catsparse.evaluate import Perplexity, evaluate, perplexity
from catsparse.footprint import bytes_skipped, weight_bytes
from catsparse.quantized import linears_to_quantize
from catsparse.quantized_linear import QuantizedLinear
from catsparse.report import new_figure, plain_axis, save_figures
from catsparse.sites import find_sites

# Method, compensated, preview, sparsity. Every neuron kept is the format alone.
SETTINGS = [
    ("energy", False, None, 0.0),
    ("cats", False, None, 0.5),
    *(("energy", True, None, s) for s in (0.5, 0.7)),
    *(("product", True, 4, s) for s in (0.5, 0.7)),
]
NAMES = {"cats": "CATS", "energy": "energy, compensated", "product": "product, compensated"}


def main() -> None:
    args = options(__doc__.split("\n")[0]).parse_args()
    name = Path(args.model).name
    path = RESULTS / f"formats-{name}.jsonl"
    rows: list[dict[str, Any]] = []
    dense: Perplexity | None = None
    for weights in (None, *WEIGHTS):
        model, windows, heldout = load(args)
        model = model.float()
        if dense is None:
            dense = perplexity(model, heldout)
        linears = linears_to_quantize(model)
        elements = sum(model.get_submodule(n).weight.numel() for n in linears)
        sites = find_sites(model)[0]
        of_mlps = sum(3 * site.hidden_size * site.intermediate_size for site in sites)
        if weights is not None:
            unpack(quantize_weights(model, weights))
        each = weight_bytes("bfloat16", weights)
        calibrations: dict[int | None, Any] = {}
        for method, compensate, preview, s in SETTINGS:
            if preview is not None and weights == "int4":
                continue
            if preview not in calibrations:
                calibrations[preview] = calibrate(model, windows, preview=preview)
            sparsify(model, calibrations[preview], s, method, compensate)
            e = evaluate(model, heldout, dense=dense)
            densify(model)
            # The previews are counted beside 32 bits by evaluate: the model runs in floats here.
            skipped = skipped_bytes(e.sparsity, preview, each, sites[0].hidden_size)
            read = each * (elements - of_mlps) + each * of_mlps * (1 - skipped)
            more = {"weights": weights or "bf16", "preview": preview, "bytes_skipped": skipped}
            rows.append(row(args, method, compensate, s, e) | more | {"bytes_read": read})
            print(f"{weights} {method} {s:.0%}: {e.rise:+.2%}, {read / 1e6:.1f} MB", flush=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    images = Path(__file__).parent.parent / "docs" / "images"
    save_figures({f"formats-{name}": figure(rows)}, images, suffixes=("svg",))
    print(f"\n{table(rows)}\nrows: {path}")


def unpack(model: Any) -> None:
    """The same weights in layers of floats."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantized(torch.float32).contiguous())
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)


def skipped_bytes(sparsity: float, preview: int | None, each: float, hidden: int) -> float:
    return bytes_skipped(sparsity, None, preview, hidden, each, of_products=preview is not None)


def label_of(row: dict[str, Any]) -> str:
    return "dense" if row["target"] == 0 else NAMES[row["method"]]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| weights | | dropped | MB a token | rise |", "|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: -r["bytes_read"]):
        lines.append(
            f"| {r['weights']} | {label_of(r)} | {r['sparsity']:.0%} | {r['bytes_read'] / 1e6:.1f} "
            f"| {r['rise']:+.1%} ± {r['rise_se']:.1%} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> Any:
    """Rise against bytes read, a colour a format, a line a method."""
    drawn = new_figure(width=6.4, height=4.2)
    axis = drawn.subplots()
    styles = {"CATS": ":", "energy, compensated": "-", "product, compensated": "--"}
    for number, weights in enumerate(dict.fromkeys(r["weights"] for r in rows)):
        of = [r for r in rows if r["weights"] == weights]
        plain = next(r for r in of if r["target"] == 0)
        axis.plot(
            *(plain["bytes_read"] / 1e6, 100 * plain["rise"]),
            marker="D",
            color=f"C{number}",
            linestyle="none",
            label=f"{weights}, dense",
        )
        for method, style in styles.items():
            points = sorted((r for r in of if label_of(r) == method), key=lambda r: r["target"])
            if points:
                axis.plot(
                    [r["bytes_read"] / 1e6 for r in points],
                    [100 * r["rise"] for r in points],
                    marker=".",
                    linestyle=style,
                    color=f"C{number}",
                    label=f"{weights}, {method}",
                )
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xlabel("MB of linear layers' weights read a token")
    axis.set_ylabel("rise of perplexity, %")
    plain_axis(axis)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    return drawn


if __name__ == "__main__":
    main()
