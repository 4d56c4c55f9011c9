"""Plots of a comparison: rise of perplexity, and accuracy on tasks, against bytes skipped.

From rows; no torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import INK, MUTED, new_figure, plain_axis, save_figures

_MARKERS = {"uniform": "o", "greedy": "^", "optimal": "s"}
_WIDEST = 3  # panels side by side
Row = dict[str, Any]


def plot_compare(rows: Sequence[Row], output: str | Path, tasks: Sequence[Row] = ()) -> list[Path]:
    """Draw ``compare``, the rows of one comparison, in PNG and SVG into ``output``."""
    return save_figures({"compare": compare_figure(rows, tasks)}, Path(output))


def compare_figure(rows: Sequence[Row], tasks: Sequence[Row] = ()) -> Any:
    """Rise of perplexity against the bytes skipped, both as measured: a panel for each text, a
    line for each method (dashed: not compensated) and allocation, with standard errors. Below (or
    beside, if there are few) a panel for each task: accuracy, with the error of its difference to
    the dense model's, which is a line across.

    Args:
        rows: as ``catsparse compare --json`` prints them.
        tasks: the same of ``tasks``.
    """
    texts = list(dict.fromkeys(row["heldout"] for row in rows))
    names = list(dict.fromkeys(row["task"] for row in tasks))
    together = len(texts) + len(names)
    width = together if together <= _WIDEST else max(len(texts), min(len(names), _WIDEST))
    height = 1 if together == width else 1 + -(-len(names) // width)
    figure = new_figure(width=4.2 * width + 1.6, height=3.4 * height)
    axes = figure.subplots(height, width, squeeze=False)
    places = list(axes.flatten())
    of_texts = places[: len(texts)]
    of_tasks = places[len(texts) if height == 1 else width :]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    of = "MLP" if rows[0]["scope"] == "mlp" else "all linears'"
    for axis, text in zip(of_texts, texts, strict=True):
        if axis is not places[0]:
            axis.sharey(places[0])
            axis.tick_params(labelleft=False)
        chosen = [row for row in rows if row["heldout"] == text]
        _draw(axis, chosen, methods, ("rise", "rise_se"))
        _label(axis, f"{rows[0]['model']} on {text}", f"{of} bytes skipped")
        # From a percent to a doubling in one view; what does not rise, too.
        axis.set_yscale("symlog", linthresh=0.01)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    places[0].set_ylabel("rise of perplexity")
    for axis, name in zip(of_tasks, names, strict=False):
        _task_panel(axis, [row for row in tasks if row["task"] == name], methods, of)
    for axis in places:
        if not axis.has_data():
            axis.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _task_panel(axis: Any, rows: Sequence[Row], methods: Sequence[str], of: str) -> None:
    """Of one task: its dense row and those of the settings."""
    dense = next(row for row in rows if row["variant"] == "dense")
    sparse = [row for row in rows if row["variant"] == "sparse"]
    _draw(axis, sparse, methods, ("value", "difference_stderr"))
    axis.axhline(dense["value"], color=INK, linewidth=1, linestyle=":")
    axis.annotate(
        "dense",
        (1, dense["value"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=8,
    )
    _label(axis, f"{dense['task']}, {dense['n']:,} examples", f"{of} bytes skipped")
    share = dense["metric"].startswith(("acc", "exact_match"))
    axis.set_ylabel("accuracy" if share else dense["metric"])
    if share:
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")


def _draw(axis: Any, rows: Sequence[Row], methods: Sequence[str], keys: tuple[str, str]) -> None:
    """A line for each way of being sparse; ``keys`` of the value and its error."""
    value, error = keys
    lines: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        kind = (row["method"], row["compensate"], row["allocation"])
        lines.setdefault(kind, []).append(row)
    for (method, compensate, allocation), points in lines.items():
        points.sort(key=lambda row: row["bytes_skipped"])
        words = [method, *["compensated"] * compensate]
        words += [allocation] * (allocation != "uniform")
        axis.errorbar(
            [row["bytes_skipped"] for row in points],
            [row[value] for row in points],
            yerr=[row[error] or 0.0 for row in points],
            label=", ".join(words),
            color=f"C{methods.index(method)}",
            linestyle="-" if compensate else "--",
            marker=_MARKERS[allocation],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=8.5)
    axis.set_xlabel(below)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    plain_axis(axis)
