"""Plots of fine-tuning: loss against steps, and how sparsity moved by layer.

From rows and numbers; no torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import INK, MARK, MUTED, new_figure, plain_axis, save_figures

# By variant of a run; a sparse one is named by its method.
_COLORS = {"dense": MUTED, "relu": MARK}
_SPARSE = ("#2f5d9b", "#4c8c5a", "#8a5fa8", "#b0813a")
_LABELS = {"dense": "dense + LoRA", "relu": "ReLUfication + LoRA"}
Row = Mapping[str, Any]


def plot_finetune(
    rows: Sequence[Row],
    asked: Mapping[str, float],
    drifted: Mapping[str, float],
    tuned: Mapping[str, float],
    output: str | Path,
) -> list[Path]:
    """Draw ``loss`` and ``drift`` as PNG and SVG into ``output``.

    Args:
        rows: of the log: ``variant``, ``step``, and ``loss`` or ``eval_loss``.
        asked, drifted, tuned: sparsity by site before training; after it under the old thresholds;
            under those of the end.

    Raises:
        CatsparseError: matplotlib is not installed.
    """
    figures = {"loss": loss_figure(rows), "drift": drift_figure(asked, drifted, tuned)}
    return save_figures(figures, Path(output))


def loss_figure(rows: Sequence[Row]) -> Any:
    """Loss on held-out text against steps, a line for each variant; without any, that of training.
    Where losses lie far apart the axis is logarithmic."""
    measured = "eval_loss" if any("eval_loss" in row for row in rows) else "loss"
    figure = new_figure(width=6.4, height=3.6)
    axis = figure.subplots()
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    others = [variant for variant in variants if variant not in _COLORS]
    values = []
    for variant in variants:
        points = [row for row in rows if row["variant"] == variant and measured in row]
        color = _COLORS.get(variant)
        if color is None:
            color = _SPARSE[others.index(variant) % len(_SPARSE)]
        losses = [row[measured] for row in points]
        values += losses
        axis.plot(
            *([row["step"] for row in points], losses),
            color=color,
            linewidth=1.4,
            marker="o" if len(points) < 30 else None,
            markersize=3,
            label=_LABELS.get(variant, f"{variant} + LoRA"),
        )
    if values and max(values) > 1.5 * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("steps")
    axis.set_ylabel("loss on held-out text" if measured == "eval_loss" else "loss in training")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    plain_axis(axis)
    return figure


def drift_figure(
    asked: Mapping[str, float], drifted: Mapping[str, float], tuned: Mapping[str, float]
) -> Any:
    """Neurons dropped at each site: as asked, after training by the same thresholds, and by those
    of the end."""
    figure = new_figure(width=max(4.5, 0.3 * len(asked) + 2.5), height=3.0)
    axis = figure.subplots()
    places = range(len(asked))
    axis.bar(places, list(drifted.values()), color="#9db4d6", width=0.8, label="old thresholds")
    for values, color, label in ((asked, MARK, "asked"), (tuned, INK, "thresholds of the end")):
        axis.plot(
            *(places, list(values.values())),
            color=color,
            linewidth=0,
            marker="_",
            markersize=9,
            label=label,
        )
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("gated MLP, in model order")
    axis.set_ylabel("neurons dropped")
    axis.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper left")
    plain_axis(axis)
    return figure
