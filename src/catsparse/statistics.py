"""What calibration keeps of a site: exact, additive, and enough for any threshold later.

Two things are counted over the calibration tokens, both indexed by the bf16 magnitude of the
activated gate g (the 15 bits under the sign, so bins 0 .. 32,767, no range to guess):

* a histogram of |g| over all neurons, one bin a magnitude: exact quantiles at any sparsity;
* for each neuron, the count and the sum of h = g u in 32 coarse buckets of |g| (two an octave,
  2^-11 to 2^5): the mean of h over the tokens on which a neuron is dropped is a cumulative sum.

Adding two statistics equals having seen both token streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

BINS = 32768
BUCKETS = 32


class Layout(NamedTuple):
    """Bucket of a bin: its bits from ``shift`` up, less ``first``; the ends take the rest."""

    first: int
    shift: int


HALF_OCTAVES = Layout(2 * (127 - 11), 6)  # exponent and top mantissa bit, 2^-11 to 2^5
OCTAVES = Layout(127 - 22, 7)  # 2^-22 to 2^10, for what spreads over more magnitudes than gates
_FIRST_NOT_FINITE = 0x7F80
# Elements handled at once. On a CPU this keeps the int64 temporaries in cache, at 2 MB each; on a
# GPU it bounds them to 64 MB each and keeps launches few.
_CHUNK = {"cpu": 2**18, "cuda": 2**23}


_Own = TypeVar("_Own", bound="Magnitudes")


class Magnitudes:
    """A histogram of magnitudes and, by neuron and bucket of them, counts and sums of h = g u.

    Base of dataclasses whose fields, numbers and tensors, add up, but for those ``of_model``.
    """

    layout: ClassVar[Layout] = HALF_OCTAVES
    of_model: ClassVar[frozenset[str]] = frozenset()
    histogram: Tensor
    bucket_count: Tensor
    bucket_sum: Tensor

    def _count(self, bins: Tensor, h: Tensor, counted: Tensor | None = None) -> None:
        """Tokens by bin of magnitude ``[T, I]``; ``counted`` ``[T, I]`` says which, None all."""
        self.histogram += _histogram(bins, counted)
        bucket = bucket_of(bins, self.layout).long()
        if counted is None:
            sums, ones = h.float(), _ones_like(bucket)
        else:
            sums, ones = torch.where(counted, h.float(), 0.0), counted.int()
        self.bucket_sum.scatter_add_(0, bucket, sums)
        self.bucket_count.scatter_add_(0, bucket, ones)

    def __add__(self: _Own, other: _Own) -> _Own:
        names = [f.name for f in fields(self) if f.name not in self.of_model]  # type: ignore[arg-type]
        sums = {n: getattr(self, n) + getattr(other, n) for n in names}
        return replace(self, **sums)  # type: ignore[type-var]

    def to(self: _Own, device: torch.device | str) -> _Own:
        values: list[Any] = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(v.to(device) if isinstance(v, Tensor) else v for v in values))

    @property
    def is_finite(self) -> bool:
        """False if a magnitude that was counted is an infinity or a NaN, or a sum of h is."""
        counted = int(self.histogram[_FIRST_NOT_FINITE:].sum())
        return counted == 0 and bool(self.bucket_sum.isfinite().all())

    def quantile_bin(self, share: float) -> int:
        """The bin such that dropping it and all below drops nearest to ``share``; -1 for none.

        Exact: the histogram has one bin for each magnitude there is.
        """
        below = self.histogram.cumsum(0)
        if share == 0:
            return -1
        target = share * float(below[-1])
        upper = int(torch.searchsorted(below.double(), target))
        # Exact zeros (a ReLU's) cost nothing to drop, so they always are.
        lowest = 0 if below[0] > 0 else -1
        candidates = [k for k in (upper - 1, upper) if lowest <= k < BINS]
        return min(candidates, key=lambda k: abs((float(below[k]) if k >= 0 else 0.0) - target))


@dataclass
class SiteStatistics(Magnitudes):
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
        for piece in pieces(g):
            self._update(g[piece], u[piece], h[piece])

    def _update(self, g: Tensor, u: Tensor, h: Tensor) -> None:
        bins = magnitude_bins(g)
        self.tokens += len(g)
        self._count(bins, h)
        self.gate_square += _column_squares(g)
        self.up_square += _column_squares(u)

    @property
    def up_rms(self) -> Tensor:
        """``[I]`` fp64: sqrt(E[u^2]) of each neuron."""
        return (self.up_square / max(self.tokens, 1)).sqrt()


@dataclass
class InputStatistics(Magnitudes):
    """Statistics of H inputs that one or several linear layers share; x takes the place of g and h.

    Attributes:
        tokens: tokens seen.
        histogram: ``[BINS]`` int64, |x| over tokens and inputs.
        bucket_count: ``[BUCKETS, H]`` int32, tokens whose |x| fell in the bucket.
        bucket_sum: ``[BUCKETS, H]`` fp32, sum of x over them.
        weight_norm: ``[H]`` fp32, norm of each input's weights in all these layers.
    """

    layout: ClassVar[Layout] = OCTAVES
    of_model: ClassVar[frozenset[str]] = frozenset({"weight_norm"})

    tokens: int
    histogram: Tensor
    bucket_count: Tensor
    bucket_sum: Tensor
    weight_norm: Tensor

    @classmethod
    def empty(cls, weight_norm: Tensor) -> InputStatistics:
        """Nothing counted yet, on the device of ``weight_norm`` ``[H]``."""
        device, inputs = weight_norm.device, len(weight_norm)
        return cls(
            0,
            torch.zeros(BINS, dtype=torch.int64, device=device),
            torch.zeros(BUCKETS, inputs, dtype=torch.int32, device=device),
            torch.zeros(BUCKETS, inputs, dtype=torch.float32, device=device),
            weight_norm.float(),
        )

    @property
    def neurons(self) -> int:
        return self.weight_norm.shape[0]

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count tokens; x is ``[T, H]`` on the statistics' device."""
        for piece in pieces(x):
            self.tokens += len(x[piece])
            self._count(magnitude_bins(x[piece]), x[piece])


class DroppedMass:
    """What lies below given thresholds in one site's statistics; see :meth:`at`."""

    def __init__(self, statistics: Magnitudes) -> None:
        fine, self._layout = statistics.histogram.double(), statistics.layout
        by_value = fine * bin_values().double().nan_to_num(0.0, 0.0, 0.0)
        self._shares = [_share_within_bucket(mass, self._layout) for mass in (fine, by_value)]
        self._per_bucket = (statistics.bucket_count.double(), statistics.bucket_sum.double())
        self._before = tuple(mass.cumsum(0) - mass for mass in self._per_bucket)

    def at(self, bins: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of h over the tokens on which neuron i's magnitude, |g|, lies in bins
        0 .. ``bins[i]``.

        Within the one bucket that ``bins[i]`` cuts, neuron i's tokens are taken to be spread over
        magnitudes as the whole layer's are; so the counts add up exactly to the histogram's when
        all neurons are cut alike.

        Args:
            bins: ``[I]`` integer, -1 for "never dropped".

        Returns:
            count and sum, each ``[I]`` fp64.
        """
        fine = bins.clamp(min=0).long()
        bucket = bucket_of(fine, self._layout)[None]
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


def bucket_of(bins: Tensor, layout: Layout = HALF_OCTAVES) -> Tensor:
    """Coarse bucket 0 .. BUCKETS - 1 of each bin."""
    return ((bins >> layout.shift) - layout.first).clamp(0, BUCKETS - 1)


def pieces(values: Tensor) -> Iterator[slice]:
    """Rows of ``values`` ``[T, I]`` to be handled at once."""
    rows = max(1, _CHUNK.get(values.device.type, 2**23) // values.shape[1])
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def threshold_above(bins: Tensor) -> Tensor:
    """fp32 thresholds half-way between bin k's magnitude and the next; -1 (keep all) for k = -1.

    Half-way between two bf16 magnitudes, rounding g to bf16 before the comparison decides alike.
    """
    half = ((bins.clamp(0, _FIRST_NOT_FINITE - 1).int() << 16) | 0x8000).view(torch.float32)
    return torch.where(bins < 0, -1.0, half)


def bins_below(thresholds: Tensor) -> Tensor:
    """Inverse of :func:`threshold_above`, for any non-negative fp32: the bin it falls in."""
    return thresholds.contiguous().view(torch.int32) >> 16


def _histogram(bins: Tensor, counted: Tensor | None = None, copies: int | None = None) -> Tensor:
    """``[BINS]`` int64 counts of ``bins`` ``[T, I]``, where ``counted``.

    Magnitudes crowd into a few bins. A GPU's threads would queue up there (bincount takes 127 ps an
    element on an H200, everything else of an update 40), so each neuron counts in one of ``copies``
    histograms, added up at the end.
    """
    if copies is None:
        copies = 1 if bins.device.type == "cpu" else 64
    if copies == 1:
        chosen = bins.view(-1) if counted is None else bins[counted]
        return torch.bincount(chosen.long(), minlength=BINS)
    offsets = torch.arange(bins.shape[1], device=bins.device) % copies * BINS
    index = (bins + offsets).view(-1)
    ones = _ones_like(index) if counted is None else counted.int().view(-1)
    counts = torch.zeros(copies * BINS, dtype=torch.int32, device=bins.device)
    return counts.scatter_add_(0, index, ones).view(copies, BINS).sum(0)


def _column_squares(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values.float().square().sum(0).double()
    # One fused pass on a GPU; on a CPU it is four times slower than the three above.
    norms: Tensor = torch.linalg.vector_norm(values, dim=0, dtype=torch.float32)
    return norms.square().double()


def _ones_like(index: Tensor) -> Tensor:
    # Expanded, not materialised: scatter_add_ reads it through zero strides.
    return torch.ones((), dtype=torch.int32, device=index.device).expand_as(index)


def _share_within_bucket(mass: Tensor, layout: Layout) -> Tensor:
    """``[BINS]``: the share of its bucket's mass that lies at or below each bin."""
    bucket = bucket_of(torch.arange(BINS), layout).long()
    totals = torch.zeros(BUCKETS, dtype=torch.float64).scatter_add_(0, bucket, mass)
    before = totals.cumsum(0) - totals
    share = (mass.cumsum(0) - before[bucket]) / totals[bucket]
    return share.nan_to_num(1.0, 1.0, 1.0).clamp(0.0, 1.0)
