"""Plots: an artifact's histograms with thresholds and sparsity by layer; a benchmark's
speedups.

Reads files with numpy; no model and no torch are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .config import CALIBRATION_NAME, CONFIG_NAME, SparsityConfig
from .errors import CatsparseError
from .files import write_atomic

INK, MUTED, _FILL, MARK = "#1f2430", "#8a90a0", "#9db4d6", "#c4472d"


@dataclass(frozen=True)
class Layer:
    """What the plots need of one site.

    Attributes:
        name: module path.
        counts: ``[32768]`` int64, tokens x neurons by bf16 magnitude of the activated gate.
        thresholds: fp32, one or one a neuron.
        sparsity: fraction dropped on the calibration tokens.
    """

    name: str
    counts: NDArray[np.int64]
    thresholds: NDArray[np.float32]
    sparsity: float


def read_layers(directory: str | Path) -> tuple[SparsityConfig, list[Layer]]:
    """The config and the sites' histograms of an artifact directory.

    Raises:
        CatsparseError: the directory is no artifact, or was saved without its calibration.
    """
    root = Path(directory)
    if not (root / CONFIG_NAME).is_file():
        raise CatsparseError(f"{root} holds no {CONFIG_NAME}; is it a catsparse directory?")
    config = SparsityConfig.from_file(root / CONFIG_NAME)
    try:
        with safe_open(root / CALIBRATION_NAME, framework="numpy") as file:
            present = set(file.keys())
            layers = [
                Layer(
                    name,
                    file.get_tensor(f"{name}.histogram"),
                    np.atleast_1d(file.get_tensor(f"{name}.threshold")),
                    site.sparsity,
                )
                for name, site in config.sites.items()
                if f"{name}.histogram" in present
            ]
    except (OSError, SafetensorError) as error:
        raise CatsparseError(f"cannot read {root / CALIBRATION_NAME}: {error}") from error
    if not layers:
        raise CatsparseError(f"{root} was saved without calibration statistics; calibrate again")
    return config, layers


def plot_directory(
    directory: str | Path, output: str | Path, layers: Sequence[int] | None = None
) -> list[Path]:
    """Draw ``histograms`` and ``sparsity`` as PNG and SVG into ``output``.

    Args:
        directory: an artifact.
        output: folder for the four files.
        layers: indices of the sites to draw histograms of; default: first, middle and last.

    Returns:
        The paths written.

    Raises:
        CatsparseError: no such layer, or matplotlib is not installed.
    """
    config, sites = read_layers(directory)
    if layers is None:
        layers = sorted({0, len(sites) // 2, len(sites) - 1})
    for index in layers:
        if not 0 <= index < len(sites):
            raise CatsparseError(f"there is no layer {index}; layers go from 0 to {len(sites) - 1}")
    figures = {
        "histograms": histogram_figure(config, [sites[index] for index in layers]),
        "sparsity": sparsity_figure(config, sites),
    }
    return save_figures(figures, Path(output))


def plot_speed(rows: Sequence[dict[str, Any]], output: str | Path) -> list[Path]:
    """Draw the rows of one benchmark run in PNG and SVG into ``output``.

    ``speed`` is the speedup; ``latency``, of ``op`` rows, the time of a call; ``rate``, of
    ``decode`` rows, tokens/s.
    """
    name = "latency" if rows[0]["what"] == "op" else "rate"
    figures = {"speed": speed_figure(rows), name: measured_figure(rows)}
    return save_figures(figures, Path(output))


_DENSE = {"dense": ":", "dense_compiled": "-.", "transformers": (0, (1, 4))}  # lines' styles


def speed_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Speedup over the best dense against sparsity; dashed, what the bytes skipped allow at most.

    Args:
        rows: of one run, as ``catsparse bench --json`` prints them.
    """
    figure, panels = _panels(rows, "speedup over the best dense", sharey=True)
    for axis, chosen in panels:
        axis.axhline(1.0, color=MUTED, linewidth=0.8)
        own = _line(chosen, "catsparse")
        bound = [own[0]["limit"] / row["limit"] for row in own]
        if rows[0]["what"] == "decode":
            bound = [1 / value for value in bound]
        shares = [row["sparsity"] for row in own]
        axis.plot(shares, bound, "--", color=MUTED, linewidth=1.2, label="bytes allow")
        for impl in dict.fromkeys(row["impl"] for row in chosen):
            line = [(row["sparsity"], row["vs_dense"]) for row in _line(chosen, impl)]
            style = {"catsparse": (MARK, "o-"), "dense": (INK, "s")}.get(impl, (None, "^-"))
            axis.plot(*zip(*line, strict=True), style[1], color=style[0], markersize=4, label=impl)
    panels[0][0].legend(frameon=False, fontsize=8)
    return figure


def measured_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Time of a call, or tokens/s, against sparsity, beside the byte limit, the dense lines and the
    peers (the CATS paper's figure of its kernel)."""
    label = "µs a call" if rows[0]["what"] == "op" else "tokens/s"
    figure, panels = _panels(rows, label, sharey=False)
    for axis, chosen in panels:
        own = _line(chosen, "catsparse")
        shares = [row["sparsity"] for row in own]
        limits = [row["limit"] for row in own]
        axis.plot(shares, limits, "--", color=MUTED, linewidth=1.2, label="byte limit")
        for impl in dict.fromkeys(row["impl"] for row in chosen):
            line = _line(chosen, impl)
            if impl in _DENSE:
                style = _DENSE[impl]
                axis.axhline(line[0]["p50"], linestyle=style, color=INK, linewidth=1, label=impl)
                continue
            points = [(row["sparsity"], row["p50"]) for row in line]
            color, marks = (MARK, "o-") if impl == "catsparse" else (None, "^-")
            axis.plot(*zip(*points, strict=True), marks, color=color, markersize=4, label=impl)
        axis.set_ylim(bottom=0)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    return figure


def plot_simulated(rows: Sequence[dict[str, Any]], output: str | Path) -> list[Path]:
    """Draw the rows of ``catsparse bench simulate`` as ``simulated`` in PNG and SVG."""
    return save_figures({"simulated": simulated_figure(rows)}, Path(output))


_AXES = {"batch": "sequences", "context": "context", "tp": "GPUs a layer", "pp": "stages"}


def simulated_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Speedup over dense, a line for each sparsity, against what was varied, else against
    sparsity; dashed, what the bytes allow. What else was varied makes panels."""
    varied = [key for key in _AXES if len({row[key] for row in rows}) > 1]
    along = varied[0] if varied else "sparsity"
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["sparsity"] or not varied:
            panels.setdefault(tuple(row[key] for key in varied[1:]), []).append(row)
    panels = panels or {(): list(rows)}
    figure = new_figure(width=3.6 * len(panels) + 2.2, height=3.2)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (values, chosen) in zip(axes, panels.items(), strict=True):
        lines = sorted({row["sparsity"] for row in chosen}) if varied else [None]
        for number, share in enumerate(lines):
            line = [row for row in chosen if share in (None, row["sparsity"])]
            line.sort(key=lambda row: row[along])
            x = [row[along] for row in line]
            color, label = f"C{number}", "simulated" if share is None else f"{share:.0%} dropped"
            axis.plot(x, [row["vs_dense"] for row in line], "o-", color=color, ms=4, label=label)
            allowed = [row["bytes_allow"] for row in line]
            axis.plot(x, allowed, "--", color=color, linewidth=1, label=f"{label}: bytes allow")
        axis.axhline(1.0, color=MUTED, linewidth=0.8)
        if along == "sparsity":
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        else:
            ticks = sorted({row[along] for row in chosen})
            axis.set_xscale("symlog" if ticks[0] == 0 else "log", base=2)
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
        axis.set_xlabel(_AXES.get(along, "neurons dropped"))
        parts = [f"{_AXES[key]} {value:,}" for key, value in zip(varied[1:], values, strict=True)]
        axis.set_title(", ".join(parts), loc="left", fontsize=8.5)
        plain_axis(axis)
    axes[0].set_ylabel("speedup over dense")
    first = rows[0]
    title = f"simulated: {first['name']}, {first['engine']} on {first['gpu']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    return figure


def _panels(
    rows: Sequence[dict[str, Any]], label: str, sharey: bool
) -> tuple[Any, list[tuple[Any, list[dict[str, Any]]]]]:
    """A figure, and for each panel its axis and its rows: a row of panels for each name, in it one
    for each dtype, number of tokens and context; one row in all if there is one of those."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    groups = sorted({_group(row) for row in rows})
    height, width = (len(names), len(groups)) if len(groups) > 1 else (1, len(names))
    figure = new_figure(width=3.6 * width + 0.6, height=2.9 * height + 0.3)
    axes = figure.subplots(height, width, squeeze=False, sharey=sharey)
    axes = axes.reshape(len(names), len(groups))
    panels = []
    for name, line in zip(names, axes, strict=True):
        if height > 1 or name == names[0]:
            line[0].set_ylabel(label)
        for axis, group in zip(line, groups, strict=True):
            chosen = [row for row in rows if row["name"] == name and _group(row) == group]
            if not chosen:
                axis.set_axis_off()
                continue
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axis.set_xlabel("neurons dropped")
            dtype, tokens, context = group
            many = "s" if tokens > 1 else ""
            title = f"{name}, {dtype}, {tokens} token{many}"
            if context:
                title += f", context {context}"
            axis.set_title(title, loc="left", fontsize=8.5)
            plain_axis(axis)
            panels.append((axis, chosen))
    title = f"{rows[0]['what']} on {rows[0]['device']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return figure, panels


def _group(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["dtype"], row["tokens"], row.get("context", 0)


def _line(rows: Sequence[dict[str, Any]], impl: str) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["impl"] == impl), key=lambda row: row["sparsity"])


def save_figures(
    figures: dict[str, Any], output: Path, suffixes: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write each figure under its name."""
    paths = []
    for name, figure in figures.items():
        for suffix in suffixes:
            path = output / f"{name}.{suffix}"
            write_atomic(path, lambda p, f=figure, s=suffix: f.savefig(p, format=s, dpi=150))  # type: ignore[misc]
            paths.append(path)
    return paths


def histogram_figure(config: SparsityConfig, layers: Sequence[Layer]) -> Any:
    """Histogram of |act(gate)| for each layer with its threshold (the paper's figure 2)."""
    figure = new_figure(width=3.4 * len(layers) + 0.4, height=2.9)
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    for axis, layer in zip(axes, layers, strict=True):
        upper = _bin_edges()
        share_below = layer.counts.cumsum() / layer.counts.sum()
        reach = upper[np.searchsorted(share_below, 0.985)]
        edges = np.linspace(0.0, max(float(reach), 1e-6), 61)
        # Through the cumulative share, so that a bf16 bin is spread over the bars it spans.
        shares = np.diff(np.interp(edges, upper, share_below, left=0.0))
        axis.bar(edges[:-1], shares, width=np.diff(edges), align="edge", color=_FILL, linewidth=0)
        middle = float(np.median(layer.thresholds))
        axis.axvline(middle, color=MARK, linewidth=1.4)
        if len(layer.thresholds) > 1:
            low, high = np.quantile(layer.thresholds, [0.1, 0.9])
            axis.axvspan(float(low), float(high), color=MARK, alpha=0.12, linewidth=0)
            note = f"median t = {middle:.3g}\n10-90% of neurons shaded"
        else:
            note = f"t = {middle:.3g}"
        axis.annotate(
            note,
            (middle, shares.max()),
            xytext=(5, -4),
            textcoords="offset points",
            va="top",
            color=MARK,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
        axis.set_title(f"{layer.name}: {layer.sparsity:.0%} dropped", loc="left", fontsize=8.5)
        axis.set_xlabel("|act(gate)|")
        plain_axis(axis)
    axes[0].set_ylabel("share of activations")
    figure.suptitle(_heading(config), x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def sparsity_figure(config: SparsityConfig, layers: Sequence[Layer]) -> Any:
    """Fraction of neurons dropped at each site on the calibration tokens."""
    figure = new_figure(width=max(4.5, 0.22 * len(layers) + 2.5), height=2.9)
    axis = figure.subplots()
    axis.bar(range(len(layers)), [layer.sparsity for layer in layers], color=_FILL, width=0.8)
    axis.axhline(config.sparsity, color=MARK, linewidth=1.2)
    axis.annotate(
        f"asked {config.sparsity:.0%}",
        (len(layers) - 0.5, config.sparsity),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=MARK,
        fontsize=8,
    )
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("gated MLP, in model order")
    axis.set_ylabel("neurons dropped")
    axis.set_title(_heading(config), loc="left", fontsize=10, color=INK)
    plain_axis(axis)
    return figure


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CatsparseError("plots need pip install 'catsparse[plot]'") from error
    # Not pyplot: no global state, no display needed.
    return Figure(figsize=(width, height), layout="constrained")


def _heading(config: SparsityConfig) -> str:
    name = (config.base_model.name_or_path if config.base_model else "") or "model"
    short = re.split(r"[\\/]", name.rstrip("/\\"))[-1]
    return f"{short}: {config.described} at {config.sparsity:.0%}"


def _bin_edges() -> NDArray[np.float64]:
    """``[32768]``: the upper edge of each bf16 magnitude's bin, increasing and finite."""
    bits = np.minimum(np.arange(32768, dtype=np.uint32), 0x7F7F)  # the largest finite one
    return ((bits << 16) | 0x8000).view(np.float32).astype(np.float64)


def plain_axis(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
    axis.tick_params(colors=MUTED, labelsize=8)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
