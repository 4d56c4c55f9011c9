"""What decisions on products need: scores of h = g u, and thresholds from them.

A neuron's score is |h| times the norm of its row of W_down: how much is lost if that row is not
read. Scores are counted as |g| is (:mod:`catsparse.statistics`): a histogram over the layer, one
bin for each bf16 magnitude, and for each neuron count and sum of h by bucket of its score. So a
threshold P for any share of rows follows without the model; neuron i's own is P / norm_i on |h|.

Two decisions are made so. The second decision is on the product itself, of the neurons that the
gate keeps. Method ``product`` decides but once, on all neurons, on the product that a preview
foretells: the score is that one's, the sums are of the exact h, which is what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .statistics import (
    BINS,
    BUCKETS,
    OCTAVES,
    DroppedMass,
    Layout,
    Magnitudes,
    bins_below,
    magnitude_bins,
    pieces,
    threshold_above,
)


@dataclass
class ProductStatistics(Magnitudes):
    """Statistics of products at one site with I neurons: of all tokens, or where the gate keeps.

    Attributes:
        histogram: ``[BINS]`` int64, scores over counted tokens and neurons.
        bucket_count: ``[BUCKETS, I]`` int32, counted tokens of the neuron, by bucket of its score.
        bucket_sum: ``[BUCKETS, I]`` fp32, sum of h over them.
        down_norm: ``[I]`` fp32, norm of each neuron's row of W_down.
    """

    layout: ClassVar[Layout] = OCTAVES
    of_model: ClassVar[frozenset[str]] = frozenset({"down_norm"})

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

    @torch.no_grad()
    def update(self, decided: Tensor, h: Tensor, keep: Tensor | None = None) -> None:
        """Count tokens, all tensors on the statistics' device.

        Args:
            decided: ``[T, I]`` the products to be decided on, whose scores count: h itself, or what
                a preview foretells of it.
            h: ``[T, I]`` the exact products.
            keep: ``[T, I]`` bool, which of them count; None for all.
        """
        for piece in pieces(h):
            score = decided[piece].float().abs() * self.down_norm
            counted = None if keep is None else keep[piece]
            self._count(magnitude_bins(score), h[piece], counted)


@dataclass(frozen=True)
class ProductDecision:
    """Thresholds on products, and what they drop of what was counted.

    Attributes:
        threshold: fp32 ``[I]``: neuron i is kept iff its product's magnitude is above threshold_i.
        scalar: P, the one number behind it; -1 to keep all.
        count: ``[I]`` fp64, counted tokens on which the neuron is dropped.
        total: ``[I]`` fp64, sum of h over them.
        seen: (token, neuron) pairs that were counted.
        dropped: how many of them are dropped.
    """

    threshold: Tensor
    scalar: float
    count: Tensor
    total: Tensor
    seen: int
    dropped: int


def decide(products: ProductStatistics, share: float) -> ProductDecision:
    """The scores to cut so that ``share`` of the counted (token, neuron) pairs are dropped."""
    norm, seen = products.down_norm.double(), int(products.histogram.sum())
    cut = products.quantile_bin(share) if seen else -1
    count, total = DroppedMass(products).at(torch.full(norm.shape, cut))
    limit = threshold_above(torch.tensor(cut))
    if cut < 0:
        bins = torch.full(norm.shape, -1)
    else:  # a row of zeros (norm 0) is never read: the largest finite bin
        bins = bins_below((limit.double() / norm).clamp(max=3e38).float())
    dropped = int(products.histogram[: cut + 1].sum())
    return ProductDecision(threshold_above(bins), float(limit), count, total, seen, dropped)


def second_decision(
    products: ProductStatistics, pairs: int, down_sparsity: float
) -> ProductDecision:
    """The scores to cut so that, with the gate's, ``down_sparsity`` of ``pairs`` are dropped.

    Args:
        products: of one site, where the gate keeps.
        pairs: tokens times neurons that the gate decided on.
        down_sparsity: share of W_down's rows not to be read. If the gate drops more by itself,
            every row it keeps is read.
    """
    kept = int(products.histogram.sum())
    wanted = down_sparsity * pairs - (pairs - kept)
    return decide(products, wanted / kept if kept and wanted > 0 else 0.0)
