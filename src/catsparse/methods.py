"""Scoring rules: from a site's statistics and a sparsity to thresholds and compensation.

A new method is one more function in :data:`METHODS`: it returns for each neuron the highest bf16
magnitude bin that is dropped. Everything else (thresholds, means, measured sparsity) follows.
These decide on the gate; method ``product`` decides on what a preview foretells of the product, and
has statistics of its own: :func:`product_threshold`. ``teal`` and ``wina``, in
:data:`INPUT_METHODS`, decide on the inputs of linear layers: :func:`input_threshold`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import SparsityConfig, check_choice
from .errors import CatsparseError
from .products import ProductStatistics, decide, second_decision
from .statistics import (
    DroppedMass,
    InputStatistics,
    SiteStatistics,
    bins_below,
    threshold_above,
)
from .strict_json import shorten


@dataclass(frozen=True)
class SiteThreshold:
    """What one site needs to run sparse.

    Attributes:
        threshold: fp32, 0-d or ``[I]``; a neuron is kept iff |g| > threshold, with method
            ``product`` iff |g u|, as its preview foretells it, is; an input ``[H]`` iff |x| is.
        mean: fp32 ``[I]``, E[g u | dropped] of each neuron, E[x | dropped] of each input, or None
            without compensation.
        scalar: the one number behind the threshold, on the method's score scale.
        sparsity: fraction of neurons dropped by this decision on the calibration tokens.
        product: fp32, 0-d or ``[I]``, if there is a second decision: a neuron is kept iff also
            |g u| > product; ``mean`` is then over the tokens on which it is dropped by either.
        product_scalar: the one number behind it: P, product = P / norm of the row of W_down.
        down_sparsity: fraction of W_down's rows not read on the calibration tokens.
    """

    threshold: Tensor
    mean: Tensor | None
    scalar: float
    sparsity: float
    product: Tensor | None = None
    product_scalar: float | None = None
    down_sparsity: float | None = None


def thresholds_of(config: SparsityConfig) -> tuple[SparsityConfig, dict[str, SiteThreshold]]:
    """``config``, its thresholds rounded to the fp32 that kernels compare with, and what its sites
    need where it alone tells that.

    Raises:
        CatsparseError: it does not: there are tensors beside it, or it was another method's.
    """
    more = config.compensate or config.down_sparsity is not None or config.scope != "mlp"
    if config.method != "cats" or more:
        raise CatsparseError(
            "a config alone is enough only for method 'cats' without compensation and second "
            "decision; give the calibration, or load the directory with catsparse.load"
        )
    sites = {
        name: replace(site, threshold=float(torch.tensor(site.threshold)))
        for name, site in config.sites.items()
    }
    for name, site in sites.items():
        # Those of `cats` are fp32; of other methods the scalar is none and on another scale.
        if config.calibration is not None and site != config.sites[name]:
            raise CatsparseError(
                f"the threshold of {shorten(name)} was not calibrated by the config's method "
                "'cats'; call sparsify(model, calibration, method='cats') instead"
            )
    thresholds = {
        name: SiteThreshold(torch.tensor(s.threshold), None, s.threshold, s.sparsity)
        for name, s in sites.items()
    }
    return replace(config, sites=sites), thresholds


@dataclass(frozen=True)
class _Cut:
    bins: Tensor  # [I] or 0-d: the highest bin dropped, -1 for none
    scalar: float


def site_threshold(
    statistics: SiteStatistics,
    method: str,
    sparsity: float,
    compensate: bool,
    products: ProductStatistics | None = None,
    down_sparsity: float = 0.0,
) -> SiteThreshold:
    """Thresholds (and means, if ``compensate``) that drop ``sparsity`` of the site's neurons.

    With ``products``, which must have been gathered behind these very thresholds, a second decision
    leaves ``down_sparsity`` of W_down's rows unread.
    """
    check_choice("method", method, tuple(METHODS))
    mass = DroppedMass(statistics)
    cut = METHODS[method](statistics, mass, sparsity)
    count, total = mass.at(cut.bins.expand(statistics.neurons))
    pairs = statistics.tokens * statistics.neurons
    threshold = threshold_above(cut.bins)
    if products is None:
        mean = _mean(count, total) if compensate else None
        return SiteThreshold(threshold, mean, cut.scalar, float(count.sum()) / pairs)
    second = second_decision(products, pairs, down_sparsity)
    return SiteThreshold(
        threshold,
        _mean(count + second.count, total + second.total) if compensate else None,
        cut.scalar,
        1 - second.seen / pairs,
        second.threshold,
        second.scalar,
        1 - (second.seen - second.dropped) / pairs,
    )


def product_threshold(
    foretold: ProductStatistics, sparsity: float, compensate: bool
) -> SiteThreshold:
    """Thresholds (and means, if ``compensate``) of method ``product``: t_i = P / norm_i, P the
    s-quantile of the scores |g_i u_i| norm_i, with norm_i that of neuron i's row of W_down.

    Args:
        foretold: of all the site's tokens and neurons, scored by what the preview foretells.
        sparsity: fraction of neurons to drop.
        compensate: whether to give means.
    """
    cut = decide(foretold, sparsity)
    mean = _mean(cut.count, cut.total) if compensate else None
    return SiteThreshold(cut.threshold, mean, cut.scalar, cut.dropped / cut.seen)


def input_threshold(
    statistics: InputStatistics, method: str, sparsity: float, compensate: bool
) -> SiteThreshold:
    """Thresholds on |x_j| (and means of x_j, if ``compensate``) that drop ``sparsity`` of the
    inputs of linear layers, by ``teal`` or ``wina``."""
    check_choice("method", method, tuple(INPUT_METHODS))
    mass = DroppedMass(statistics)
    cut = INPUT_METHODS[method](statistics, mass, sparsity)
    count, total = mass.at(cut.bins.expand(statistics.neurons))
    pairs = statistics.tokens * statistics.neurons
    mean = _mean(count, total) if compensate else None
    return SiteThreshold(threshold_above(cut.bins), mean, cut.scalar, float(count.sum()) / pairs)


def _mean(count: Tensor, total: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1e-9), 0.0).float()


def _quantile(
    statistics: SiteStatistics | InputStatistics, mass: DroppedMass, sparsity: float
) -> _Cut:
    """One threshold a layer: the s-quantile of |g| (CATS, arXiv 2404.08763, section 3), or of |x|
    (TEAL, arXiv 2408.14690, section 4)."""
    bins = torch.tensor(statistics.quantile_bin(sparsity))
    return _Cut(bins, float(threshold_above(bins)))


def _chess(statistics: SiteStatistics, mass: DroppedMass, sparsity: float) -> _Cut:
    """One threshold a neuron: t_i = sqrt(T / E[u_i^2]), T the s-quantile of g_i^2 E[u_i^2].

    CHESS (arXiv 2409.01366), channel-wise thresholding: a neuron's score is the expected square
    of its product. ``scalar`` is sqrt(T).
    """
    return _weighted(statistics, mass, sparsity, statistics.up_rms)


def _energy(statistics: SiteStatistics, mass: DroppedMass, sparsity: float) -> _Cut:
    """One threshold a neuron: t_i = T / E[u_i^2], T the s-quantile of |g_i| E[u_i^2].

    CHESS with the up projection's weight squared; found by measurement (docs/quality.md): once
    dropped neurons are compensated, which neuron it is tells more than how far its gate is open.
    ``scalar`` is T.
    """
    return _weighted(statistics, mass, sparsity, statistics.up_rms.square())


def _wina(statistics: InputStatistics, mass: DroppedMass, sparsity: float) -> _Cut:
    """One threshold an input: t_j = T / c_j, T the s-quantile of |x_j| c_j, c_j the norm of the
    input's weights (WINA, arXiv 2505.19427, which takes the largest scores of each token instead of
    those above a calibrated threshold). ``scalar`` is T.
    """
    return _weighted(statistics, mass, sparsity, statistics.weight_norm.double())


def _weighted(
    statistics: SiteStatistics | InputStatistics, mass: DroppedMass, sparsity: float, weight: Tensor
) -> _Cut:
    """Thresholds c / weight_i ``[I]``, c such that a fraction ``sparsity`` of |g_i| lies below."""
    if sparsity == 0:
        return _Cut(torch.full((statistics.neurons,), -1), -1.0)
    target = sparsity * statistics.tokens * statistics.neurons

    def bins_at(log2_scale: float) -> Tensor:
        # A dead up projection (weight 0) is always dropped: the largest finite bin.
        return bins_below((2.0**log2_scale / weight).clamp(max=3e38).float())

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(mass.at(bins_at(middle))[0].sum()) < target:
            low = middle
        else:
            high = middle
    return _Cut(bins_at(high), 2.0**high)


METHODS: dict[str, Callable[[SiteStatistics, DroppedMass, float], _Cut]] = {
    "cats": _quantile,
    "chess": _chess,
    "energy": _energy,
}
INPUT_METHODS: dict[str, Callable[[InputStatistics, DroppedMass, float], _Cut]] = {
    "teal": _quantile,
    "wina": _wina,
}
