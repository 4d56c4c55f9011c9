"""All that a page shows of a sparse model's folder, as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..calibration import Calibration
from ..config import CONFIG_NAME, PRODUCT, InputConfig, SparsityConfig
from ..errors import CatsparseError
from ..hub import read_artifact
from ..methods import SiteThreshold
from .levels import (
    POSITIONS,
    axis_of,
    described,
    histograms,
    levels,
    parts_of,
    scalar_of,
    sensitivities,
)
from .numbers import portable, rounded
from .rows import read_rows

# The number behind a site's thresholds, on the method's score scale.
_SCALARS = {
    "cats": "t, on |g|",
    "chess": "√T, on |g| √E[u²]",
    "energy": "T, on |g| E[u²]",
    PRODUCT: "P, on |g u| ‖w_down‖",
    "teal": "t, on |x|",
    "wina": "T, on |x| times the norm of the input's weights",
}


def gather(
    directory: str | Path, rows: Sequence[str | Path] = (), progress: bool = True
) -> dict[str, Any]:
    """Read and check a folder, and whatever results are given with it.

    Args:
        directory: written by ``catsparse sparsify`` or :func:`catsparse.save`.
        rows: files of results, see :func:`catsparse.page.rows.read_rows`.
        progress: show a progress bar on stderr.

    Returns:
        JSON values only; the same for the same files.

    Raises:
        CatsparseError: the folder or a file is missing, damaged, or of another model.
    """
    root = Path(directory)
    if not (root / CONFIG_NAME).is_file():  # nor is a Hub name asked for: nothing is downloaded
        raise CatsparseError(f"{root} holds no {CONFIG_NAME}; is it a catsparse directory?")
    config, thresholds, calibration = read_artifact(str(root))
    results = read_rows(rows, config)
    start = min(range(len(POSITIONS)), key=lambda k: abs(POSITIONS[k] - config.sparsity))
    payload: dict[str, Any] = {
        "version": __version__,
        "folder": portable(str(root.resolve())),
        "model": _model(config),
        "calibration": _provenance(config),
        "layers": _layers(config, thresholds),
        "start": start,
        "levels": None,
        "histograms": None,
        "sensitivities": {"why_not": "the folder was saved without its calibration's statistics"},
    }
    if calibration is not None:
        payload |= _statistics(config, calibration, progress)
    return payload | results


def _statistics(config: SparsityConfig, calibration: Calibration, progress: bool) -> dict[str, Any]:
    return {
        "levels": levels(config, calibration, progress),
        "histograms": histograms(config, calibration),
        "sensitivities": sensitivities(config, calibration),
    }


def _model(config: SparsityConfig) -> dict[str, Any]:
    base = config.base_model
    return {
        "name": portable(base.name_or_path) if base and base.name_or_path else "unnamed model",
        "type": portable(base.model_type) if base else None,
        "revision": portable(base.revision) if base and base.revision else None,
        "method": config.method,
        "described": config.described,
        "decided_on": config.decided_on,
        "compensate": config.compensate,
        "preview": config.preview,
        "prefill": config.prefill,
        "asked": config.sparsity,
        "dropped": config.measured_sparsity,
        "down_asked": config.down_sparsity,
        "down": config.measured_down_sparsity,
        "bytes": rounded(config.bytes_skipped),
        "weights": config.weights,
        "version": portable(config.catsparse_version) or None,
    }


def _provenance(config: SparsityConfig) -> dict[str, Any] | None:
    origin = config.calibration
    if origin is None:
        return None
    return {
        "data": portable(origin.data),
        "tokens": origin.tokens,
        "seq_len": origin.seq_len,
        "seed": origin.seed,
        "dtype": portable(origin.dtype),
    }


def _layers(config: SparsityConfig, thresholds: dict[str, SiteThreshold]) -> list[dict[str, Any]]:
    """A gated MLP's neurons, and the inputs of linear layers, each with what decides on it."""
    parts = parts_of(config)
    shown = {name: portable(name) for name in parts}
    return [
        {
            "name": shown[name],
            "short": short,
            "axis": axis_of(config, name),
            "method": scalar_of(config, name),
            "scalar": _SCALARS[scalar_of(config, name)],
            "size": part.in_features if isinstance(part, InputConfig) else part.intermediate_size,
            "act": None if isinstance(part, InputConfig) else part.act,
            "saved": described(config, name, thresholds[name]),
        }
        for (name, part), short in zip(
            parts.items(), short_names(list(shown.values())), strict=True
        )
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """What tells module names apart: without the parts that all have in common at either end."""
    parts = [name.split(".") for name in names]
    if len(parts) == 1:
        return [next((part for part in parts[0] if part.isdigit()), names[0])]
    shortest = min(map(len, parts))
    head = tail = 0
    while head < shortest - 1 and len({part[head] for part in parts}) == 1:
        head += 1
    while tail < shortest - 1 - head and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    return [".".join(part[head : len(part) - tail]) for part in parts]
