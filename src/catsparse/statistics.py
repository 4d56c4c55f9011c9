"""What calibration keeps of a site: exact, additive, and enough for any threshold later.

Two things are counted over the calibration tokens, both indexed by the bf16 magnitude of the
activated gate g (the 15 bits under the sign, so bins 0 .. 32,767, no range to guess):

* a histogram of |g| over all neurons, one bin a magnitude: exact quantiles at any sparsity;
* for each neuron, the count and the sum of h = g u in 32 coarse buckets of |g| (two an octave,
  2^-11 to 2^5): the mean of h over the tokens on which a neuron is dropped is a cumulative sum.

Adding two statistics equals having seen both token streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 32768
BUCKETS = 32
# Bucket of a bin: exponent and top mantissa bit, from 2^-11; the ends take the rest.
_FIRST = 2 * (127 - 11)
_FIRST_NOT_FINITE = 0x7F80
# Elements handled at once. On a CPU this keeps the int64 temporaries in cache, at 2 MB each; on a
# GPU it bounds them to 64 MB each and keeps launches few.
_CHUNK = {"cpu": 2**18, "cuda": 2**23}


@dataclass
class SiteStatistics:
    """Statistics of one site with I neurons.

    Attributes:
        tokens: tokens seen.
        histogram: ``[BINS]`` int64, |g| over tokens and neurons.
        gate_square: ``[I]`` fp64, sum of g^2.
        up_square: ``[I]`` fp64, sum of u^2.
        bucket_count: ``[BUCKETS, I]`` int32, tokens whose |g| fell in the bucket.
        bucket_sum: ``[BUCKETS, I]`` fp32, sum of g u over them.
    """

    tokens: int
    histogram: Tensor
    gate_square: Tensor
    up_square: Tensor
    bucket_count: Tensor
    bucket_sum: Tensor

    @classmethod
    def empty(cls, neurons: int, device: torch.device | str = "cpu") -> SiteStatistics:
        return cls(
            0,
            torch.zeros(BINS, dtype=torch.int64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros(neurons, dtype=torch.float64, device=device),
            torch.zeros(BUCKETS, neurons, dtype=torch.int32, device=device),
            torch.zeros(BUCKETS, neurons, dtype=torch.float32, device=device),
        )

    @property
    def neurons(self) -> int:
        return self.gate_square.shape[0]

    @torch.no_grad()
    def update(self, g: Tensor, u: Tensor, h: Tensor) -> None:
        """Count tokens; g, u and h = g u are ``[T, I]`` on the statistics' device."""
        for start in range(
            0, len(g), rows := max(1, _CHUNK.get(g.device.type, 2**23) // g.shape[1])
        ):
            piece = slice(start, start + rows)
            self._update(g[piece], u[piece], h[piece])

    def _update(self, g: Tensor, u: Tensor, h: Tensor) -> None:
        bins = magnitude_bins(g)
        self.tokens += len(g)
        self.histogram += _histogram(bins)
        self.gate_square += _column_squares(g)
        self.up_square += _column_squares(u)
        bucket = bucket_of(bins).long()
        self.bucket_sum.scatter_add_(0, bucket, h.float())
        self.bucket_count.scatter_add_(0, bucket, _ones_like(bucket))

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        return SiteStatistics(
            self.tokens + other.tokens,
            self.histogram + other.histogram,
            self.gate_square + other.gate_square,
            self.up_square + other.up_square,
            self.bucket_count + other.bucket_count,
            self.bucket_sum + other.bucket_sum,
        )

    def to(self, device: torch.device | str) -> SiteStatistics:
        return SiteStatistics(
            self.tokens,
            self.histogram.to(device),
            self.gate_square.to(device),
            self.up_square.to(device),
            self.bucket_count.to(device),
            self.bucket_sum.to(device),
        )

    @property
    def is_finite(self) -> bool:
        """False if the gate held an infinity or a NaN, or its product with up did."""
        counted = int(self.histogram[_FIRST_NOT_FINITE:].sum())
        return counted == 0 and bool(self.bucket_sum.isfinite().all())

    def quantile_bin(self, sparsity: float) -> int:
        """The bin such that dropping it and all below drops nearest to ``sparsity``; -1 for none.

        Exact: the histogram has one bin for each magnitude there is.
        """
        below = self.histogram.cumsum(0)
        if sparsity == 0:
            return -1
        target = sparsity * float(below[-1])
        upper = int(torch.searchsorted(below.double(), target))
        # Exact zeros (a ReLU's) cost nothing to drop, so they always are.
        lowest = 0 if below[0] > 0 else -1
        candidates = [k for k in (upper - 1, upper) if lowest <= k < BINS]
        return min(candidates, key=lambda k: abs((float(below[k]) if k >= 0 else 0.0) - target))

    @property
    def up_rms(self) -> Tensor:
        """``[I]`` fp64: sqrt(E[u^2]) of each neuron."""
        return (self.up_square / max(self.tokens, 1)).sqrt()


class DroppedMass:
    """What lies below given thresholds in one site's statistics; see :meth:`at`."""

    def __init__(self, statistics: SiteStatistics) -> None:
        fine = statistics.histogram.double()
        self._shares = (
            _share_within_bucket(fine),
            _share_within_bucket(fine * bin_values().double().nan_to_num(0.0, 0.0, 0.0)),
        )
        self._per_bucket = (statistics.bucket_count.double(), statistics.bucket_sum.double())
        self._before = tuple(mass.cumsum(0) - mass for mass in self._per_bucket)

    def at(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of h over the tokens on which neuron i's |g| lies in bins 0 .. ``bins[i]``.

        Within the one bucket that ``bins[i]`` cuts, neuron i's tokens are taken to be spread over
        magnitudes as the whole layer's are; so the counts add up exactly to the histogram's when
        all neurons are cut alike.

        Args:
            bins: ``[I]`` integer, -1 for "never dropped".

        Returns:
            count and sum, each ``[I]`` fp64.
        """
        fine = bins.clamp(min=0).long()
        bucket = bucket_of(fine)[None]
        results = []
        for share, mass, before in zip(self._shares, self._per_bucket, self._before, strict=True):
            inside = mass.gather(0, bucket).squeeze(0) * share[fine]
            results.append((before.gather(0, bucket).squeeze(0) + inside).masked_fill(bins < 0, 0))
        return results[0], results[1]


def magnitude_bins(values: Tensor) -> Tensor:
    """Bin of each value: the bits of its bf16 magnitude, int16 in 0 .. 32,767, same shape."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16) & 0x7FFF


def bin_values(device: torch.device | str = "cpu") -> Tensor:
    """``[BINS]`` fp32: the magnitude each bin stands for (infinities and NaN at the end)."""
    return torch.arange(BINS, device=device).to(torch.int16).view(torch.bfloat16).float()


def bucket_of(bins: Tensor) -> Tensor:
    """Coarse bucket 0 .. BUCKETS - 1 of each bin."""
    return ((bins >> 6) - _FIRST).clamp(0, BUCKETS - 1)


def threshold_above(bins: Tensor) -> Tensor:
    """fp32 thresholds half-way between bin k's magnitude and the next; -1 (keep all) for k = -1.

    Half-way between two bf16 magnitudes, rounding g to bf16 before the comparison decides alike.
    """
    half = ((bins.clamp(0, _FIRST_NOT_FINITE - 1).int() << 16) | 0x8000).view(torch.float32)
    return torch.where(bins < 0, -1.0, half)


def bins_below(thresholds: Tensor) -> Tensor:
    """Inverse of :func:`threshold_above`, for any non-negative fp32: the bin it falls in."""
    return thresholds.contiguous().view(torch.int32) >> 16


def _histogram(bins: Tensor, copies: int | None = None) -> Tensor:
    """``[BINS]`` int64 counts of ``bins`` ``[T, I]``.

    Magnitudes crowd into a few bins. A GPU's threads would queue up there (bincount takes 127 ps an
    element on an H200, everything else of an update 40), so each neuron counts in one of ``copies``
    histograms, added up at the end.
    """
    if copies is None:
        copies = 1 if bins.device.type == "cpu" else 64
    if copies == 1:
        return torch.bincount(bins.view(-1).long(), minlength=BINS)
    offsets = torch.arange(bins.shape[1], device=bins.device) % copies * BINS
    index = (bins + offsets).view(-1)
    counts = torch.zeros(copies * BINS, dtype=torch.int32, device=bins.device)
    return counts.scatter_add_(0, index, _ones_like(index)).view(copies, BINS).sum(0)


def _column_squares(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values.float().square().sum(0).double()
    # One fused pass on a GPU; on a CPU it is four times slower than the three above.
    norms: Tensor = torch.linalg.vector_norm(values, dim=0, dtype=torch.float32)
    return norms.square().double()


def _ones_like(index: Tensor) -> Tensor:
    # Expanded, not materialised: scatter_add_ reads it through zero strides.
    return torch.ones((), dtype=torch.int32, device=index.device).expand_as(index)


def _share_within_bucket(mass: Tensor) -> Tensor:
    """``[BINS]``: the share of its bucket's mass that lies at or below each bin."""
    bucket = bucket_of(torch.arange(BINS)).long()
    totals = torch.zeros(BUCKETS, dtype=torch.float64).scatter_add_(0, bucket, mass)
    before = totals.cumsum(0) - totals
    share = (mass.cumsum(0) - before[bucket]) / totals[bucket]
    return share.nan_to_num(1.0, 1.0, 1.0).clamp(0.0, 1.0)
