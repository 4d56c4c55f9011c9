"""Plots of a comparison: rise of perplexity, and accuracy on tasks, against bytes skipped, or, of
several formats of weights, rise against bytes read.

From rows; no torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import INK, MUTED, new_figure, plain_axis, save_figures

_MARKERS = {"uniform": "o", "greedy": "^", "optimal": "s"}
_OF_METHODS = "oDs^vP*"
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

    Of rows of several formats of weights each has a colour, a method a marker, and the bytes are
    those that a token reads; a line goes through the settings that none beats in both.

    Args:
        rows: as ``catsparse compare --json`` prints them.
        tasks: the same of ``tasks``.
    """
    formats = list(dict.fromkeys(row.get("weights") for row in rows))
    several = len(formats) > 1
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
        title = f"{rows[0]['model']} on {text}"
        if several:
            chosen = [row for row in chosen if row["bytes_read"] is not None]
            _draw(axis, chosen, methods, formats, ("bytes_read", "rise", "rise_se"))
            _draw_frontier(axis, chosen)
            _label(axis, title, "MB of linear layers read a token")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.3g}")
        else:
            _draw(axis, chosen, methods, formats, ("bytes_skipped", "rise", "rise_se"))
            _label(axis, title, f"{of} bytes skipped")
        # From a percent to a doubling in one view; what does not rise, too.
        axis.set_yscale("symlog", linthresh=0.01)
        axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    places[0].set_ylabel("rise of perplexity")
    for axis, name in zip(of_tasks, names, strict=False):
        _task_panel(axis, [row for row in tasks if row["task"] == name], methods, formats, of)
    for axis in places:
        if not axis.has_data():
            axis.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _task_panel(
    axis: Any, rows: Sequence[Row], methods: Sequence[str], formats: Sequence[str | None], of: str
) -> None:
    """Of one task: its dense row and those of the settings."""
    dense = next(row for row in rows if row["variant"] == "dense")
    sparse = [row for row in rows if row["variant"] != "dense"]
    _draw(axis, sparse, methods, formats, ("bytes_skipped", "value", "difference_stderr"))
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


def _draw(
    axis: Any,
    rows: Sequence[Row],
    methods: Sequence[str],
    formats: Sequence[str | None],
    keys: tuple[str, str, str],
) -> None:
    """A line for each way of running; ``keys`` of bytes, of the value, and of its error."""
    bytes_, value, error = keys
    several = len(formats) > 1
    lines: dict[tuple[str | None, str, bool, str], list[Row]] = {}
    for row in rows:
        kind = (row.get("weights"), row["method"], row["compensate"], row["allocation"])
        lines.setdefault(kind, []).append(row)
    for (weights, method, compensate, allocation), points in lines.items():
        points.sort(key=lambda row: row[bytes_])
        words = [*[str(weights)] * several, method, *["compensated"] * compensate]
        words += [allocation] * (allocation != "uniform")
        at = methods.index(method)
        axis.errorbar(
            [row[bytes_] for row in points],
            [row[value] for row in points],
            yerr=[row[error] or 0.0 for row in points],
            label=", ".join(words),
            color=f"C{formats.index(weights) if several else at}",
            linestyle="-" if compensate else "--",
            marker=_OF_METHODS[at % len(_OF_METHODS)] if several else _MARKERS[allocation],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )


def _draw_frontier(axis: Any, rows: Sequence[Row]) -> None:
    best = _frontier([(row["bytes_read"], row["rise"]) for row in rows])
    look = {"color": MUTED, "linewidth": 5, "alpha": 0.35, "zorder": 0}
    axis.plot(*zip(*best, strict=True), label="none reads and loses less", **look)


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is below in both, by their first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _label(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=8.5)
    axis.set_xlabel(below)
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    plain_axis(axis)
