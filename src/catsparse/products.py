"""What the second decision needs: h = g u of the neurons that the gate keeps, and its thresholds.

A neuron's score is |h| times the norm of its row of W_down: how much is lost if that row is not
read. Scores are counted as |g| is (:mod:`catsparse.statistics`): a histogram over the layer, one
bin for each bf16 magnitude, and for each neuron count and sum of h by bucket of its score. So a
threshold P for any share of rows follows without the model; neuron i's own is P / norm_i on |h|.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .kernels import keep_mask
from .statistics import (
    BINS,
    BUCKETS,
    DroppedMass,
    Layout,
    Magnitudes,
    bins_below,
    magnitude_bins,
    pieces,
    threshold_above,
)

# Products spread over more magnitudes than gates: whole octaves, 2^-22 to 2^10.
OCTAVES = Layout(127 - 22, 7)


@dataclass
class ProductStatistics(Magnitudes):
    """Statistics of h = g u at one site with I neurons, behind one decision of the gate.

    Attributes:
        histogram: ``[BINS]`` int64, scores over kept tokens and neurons.
        bucket_count: ``[BUCKETS, I]`` int32, tokens that keep the neuron, by bucket of its score.
        bucket_sum: ``[BUCKETS, I]`` fp32, sum of h over them.
        down_norm: ``[I]`` fp32, norm of each neuron's row of W_down.
    """

    layout: ClassVar[Layout] = OCTAVES

    histogram: Tensor
    bucket_count: Tensor
    bucket_sum: Tensor
    down_norm: Tensor

    @classmethod
    def empty(cls, down_norm: Tensor) -> ProductStatistics:
        """Nothing counted yet, on the device of ``down_norm`` ``[I]``."""
        device, neurons = down_norm.device, len(down_norm)
        return cls(
            torch.zeros(BINS, dtype=torch.int64, device=device),
            torch.zeros(BUCKETS, neurons, dtype=torch.int32, device=device),
            torch.zeros(BUCKETS, neurons, dtype=torch.float32, device=device),
            down_norm.float(),
        )

    def __add__(self, other: ProductStatistics) -> ProductStatistics:
        # The norms are the model's, not counts.
        return replace(super().__add__(other), down_norm=self.down_norm)

    @torch.no_grad()
    def update(self, g: Tensor, h: Tensor, threshold: Tensor) -> None:
        """Count products where the gate keeps the neuron.

        Args:
            g: ``[T, I]`` the activated gate that decides, on the statistics' device.
            h: ``[T, I]`` the products.
            threshold: fp32, 0-d or ``[I]``.
        """
        for piece in pieces(h):
            keep = keep_mask(g[piece], h[piece], threshold)
            score = h[piece].float().abs() * self.down_norm
            self._count(magnitude_bins(score), h[piece], keep)


@dataclass(frozen=True)
class SecondDecision:
    """Thresholds of the second decision, and what it drops of what the gate kept.

    Attributes:
        threshold: fp32 ``[I]``: a row of W_down is read iff |h_i| > threshold_i.
        scalar: P, the one number behind it; -1 to read every row.
        count: ``[I]`` fp64, tokens on which the neuron is kept by the gate and dropped then.
        total: ``[I]`` fp64, sum of h over them.
        kept: (token, neuron) pairs that the gate keeps.
        dropped: how many of them are dropped then.
    """

    threshold: Tensor
    scalar: float
    count: Tensor
    total: Tensor
    kept: int
    dropped: int


def second_decision(
    products: ProductStatistics, pairs: int, down_sparsity: float
) -> SecondDecision:
    """The scores to cut so that, with the gate's, ``down_sparsity`` of ``pairs`` are dropped.

    Args:
        products: of one site.
        pairs: tokens times neurons that the gate decided on.
        down_sparsity: share of W_down's rows not to be read. If the gate drops more by itself,
            every row it keeps is read.
    """
    norm, kept = products.down_norm.double(), int(products.histogram.sum())
    wanted = down_sparsity * pairs - (pairs - kept)
    cut = products.quantile_bin(wanted / kept) if kept and wanted > 0 else -1
    count, total = DroppedMass(products).at(torch.full(norm.shape, cut))
    limit = threshold_above(torch.tensor(cut))
    if cut < 0:
        bins = torch.full(norm.shape, -1)
    else:  # a row of zeros (norm 0) is never read: the largest finite bin
        bins = bins_below((limit.double() / norm).clamp(max=3e38).float())
    dropped = int(products.histogram[: cut + 1].sum())
    return SecondDecision(threshold_above(bins), float(limit), count, total, kept, dropped)
