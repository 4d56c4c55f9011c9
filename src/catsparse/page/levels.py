"""What the page's slider shows: thresholds, bytes and predicted loss, at every percent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..calibration import Calibration
from ..config import PRODUCT, InputConfig, SiteConfig, SparsityConfig
from ..errors import CatsparseError
from ..methods import SiteThreshold
from ..statistics import Magnitudes, threshold_above
from .numbers import exact, rounded

POSITIONS = tuple(k / 100 for k in range(98))
# Bars of the histograms: 32 bf16 magnitudes each, so 4 an octave, and a threshold never cuts a
# magnitude in two.
_MAGNITUDES = 32
# Shares of a layer's activations that may lie left and right of the histograms' axis.
_LEFT, _RIGHT = 5e-3, 1e-4


def levels(config: SparsityConfig, calibration: Calibration, progress: bool) -> dict[str, Any]:
    """Thresholds of every site at each of :data:`POSITIONS`, the same sparsity in all.

    The thresholds are those that ``calibration.thresholds(s, method, compensate)`` gives for the
    config's method, without its second decision: that one's statistics stand behind one sparsity
    of the gate and move with no other.

    Returns:
        JSON values. ``scalar``, ``low``, ``middle``, ``high`` and ``sparsity`` by site: for each
        position the number behind the thresholds, their 10th, 50th and 90th percentile over neurons
        (as fp32, exactly), and the fraction dropped on the calibration tokens. ``bytes`` and
        ``dropped``: over all sites. null where every neuron is kept.
    """
    of_sites: dict[str, dict[str, list[Any]]] = {
        name: {key: [] for key in ("scalar", "low", "middle", "high", "sparsity")}
        for name in parts_of(config)
    }
    skipped, dropped = [], []
    console = Console(stderr=True)
    for share in track(
        POSITIONS, "thresholds", console=console, transient=True, disable=not progress
    ):
        found = calibration.thresholds(share, config.method, compensate=False, scope=config.scope)
        for name, into in of_sites.items():
            for key, value in described(config, name, found[name]).items():
                into[key].append(value)
        at = _config_at(config, found)
        skipped.append(rounded(at.bytes_skipped))
        dropped.append(rounded(at.measured_sparsity or at.input_sparsity or 0.0))
    return {
        "positions": list(POSITIONS),
        "sites": list(of_sites.values()),
        "bytes": skipped,
        "dropped": dropped,
    }


def parts_of(config: SparsityConfig) -> dict[str, SiteConfig | InputConfig]:
    """All that gets thresholds, by name: gated MLPs and inputs of linear layers."""
    return {**config.sites, **config.inputs}


def axis_of(config: SparsityConfig, name: str) -> str:
    """What a part's threshold is compared with: ``input``, ``product`` or ``gate``."""
    return "input" if name in config.inputs else config.decided_on


def scalar_of(config: SparsityConfig, name: str) -> str:
    """The method whose number stands behind a part's thresholds."""
    return config.input_method if name in config.inputs else config.method


def described(
    config: SparsityConfig, name: str, threshold: SiteThreshold
) -> dict[str, float | None]:
    """A site's thresholds as the page shows them, on the axis of its histogram."""
    scalar = None if threshold.scalar < 0 else exact(threshold.scalar)
    if scalar_of(config, name) == PRODUCT:  # its histogram is of scores, which have one threshold
        low = middle = high = scalar
    else:
        shares = torch.tensor([0.1, 0.5, 0.9])
        low, middle, high = (
            None if value < 0 else exact(value) for value in _quantiles(threshold.threshold, shares)
        )
    return {
        "scalar": scalar,
        "low": low,
        "middle": middle,
        "high": high,
        "sparsity": rounded(threshold.sparsity),
    }


def _quantiles(values: Tensor, shares: Tensor) -> list[float]:
    """Values that are there: no interpolation, so that a single threshold stays as it is."""
    flat = values.reshape(-1).sort().values
    return flat[(shares * (len(flat) - 1)).round().long()].tolist()


def _config_at(config: SparsityConfig, found: dict[str, SiteThreshold]) -> SparsityConfig:
    sites: dict[str, SiteConfig] = {
        name: replace(
            site,
            threshold=found[name].scalar,
            sparsity=found[name].sparsity,
            product_threshold=None,
            down_sparsity=None,
        )
        for name, site in config.sites.items()
    }
    inputs = {
        name: replace(part, threshold=found[name].scalar, sparsity=found[name].sparsity)
        for name, part in config.inputs.items()
    }
    neurons = sum(site.intermediate_size for site in sites.values())
    dropped = sum(site.sparsity * site.intermediate_size for site in sites.values())
    return replace(
        config,
        sites=sites,
        inputs=inputs,
        measured_sparsity=dropped / neurons if neurons else None,
        down_sparsity=None,
        measured_down_sparsity=None,
    )


def histograms(config: SparsityConfig, calibration: Calibration) -> dict[str, Any]:
    """Histograms of what the first threshold is compared with, in bars of a quarter octave.

    Returns:
        JSON values. ``edges``: ascending, one more than bars, the same for all sites. ``shares`` by
        site: of the (token, neuron) pairs, in each bar; ``below``: left of the first edge, exact
        zeros among them; ``above``: right of the last.
    """
    of_sites: Mapping[str, Magnitudes] = (
        calibration.foretold if config.method == PRODUCT else calibration.statistics
    )
    kinds: dict[str, Magnitudes] = {**of_sites, **calibration.input_statistics}
    counts = torch.stack([kinds[name].histogram for name in parts_of(config)]).double()
    total = counts.sum(1, keepdim=True)
    counts[:, 0] = 0  # exact zeros, a ReLU's, have no place on a log axis
    bars = counts.view(len(counts), -1, _MAGNITUDES).sum(2)
    reached = bars.cumsum(1) / bars.sum(1, keepdim=True).clamp(min=1)
    last = min(int((reached < 1 - _RIGHT).sum(1).max()), bars.shape[1] - 1)
    first = min(int((reached < _LEFT).sum(1).min()), last)
    shares = (bars / total)[:, first : last + 1]
    above = bars[:, last + 1 :].sum(1) / total[:, 0]
    below = 1 - shares.sum(1) - above
    tops = torch.arange(first, last + 2) * _MAGNITUDES - 1
    return {
        "edges": [exact(max(edge, 0.0)) for edge in threshold_above(tops).tolist()],
        "shares": [[rounded(v, 4) for v in row] for row in shares.tolist()],
        "below": [rounded(max(v, 0.0), 4) for v in below.tolist()],
        "above": [rounded(v, 4) for v in above.tolist()],
    }


def sensitivities(config: SparsityConfig, calibration: Calibration) -> dict[str, Any]:
    """The table of sensitivities and what it predicts at each of :data:`POSITIONS`.

    Returns:
        JSON values. ``why_not``: in words, where there is nothing to predict from; else null and
        ``grid``, ``losses`` as measured and ``predicted``, by site, at each position (null beyond
        the grid), and ``saved``: the sum at the sparsities of the config.
    """
    table, parts = calibration.sensitivities, parts_of(config)
    if table is None:
        return {"why_not": "the calibration holds no table of layer sensitivities"}
    try:
        table.require(config.method, config.compensate, config.preview, parts)
    except CatsparseError as error:
        return {"why_not": str(error)}
    last = table.sparsities[-1]
    within = torch.tensor([s for s in POSITIONS if s <= last], dtype=torch.float64)
    beyond = [None] * (len(POSITIONS) - len(within))
    predicted = [
        [*(rounded(v) for v in table.curve(name, within).tolist()), *beyond] for name in parts
    ]
    reached = [min(part.sparsity, last) for part in parts.values()]
    saved = sum(
        float(table.curve(name, torch.tensor([share], dtype=torch.float64)))
        for name, share in zip(parts, reached, strict=True)
    )
    # What was asked may drop a hair more than asked, at the table's end, too.
    known = all(part.sparsity <= last + 1e-3 for part in parts.values())
    return {
        "why_not": None,
        "tokens": table.tokens,
        "grid": list(table.sparsities),
        "losses": [[rounded(v) for v in table.losses[name].tolist()] for name in parts],
        "predicted": predicted,
        "saved": rounded(saved) if known and config.down_sparsity is None else None,
    }
