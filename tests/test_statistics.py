"""What calibration counts, against sorting, brute force and bit arithmetic of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from catsparse.statistics import (
    BINS,
    BUCKETS,
    DroppedMass,
    SiteStatistics,
    _histogram,
    bin_values,
    bins_below,
    bucket_of,
    magnitude_bins,
    threshold_above,
)

LAST_FINITE = 0x7F7F


def activations(tokens: int, neurons: int, seed: int = 0, relu: bool = False) -> tuple[Tensor, ...]:
    """g, u and h = g u; u leans on g, each neuron in its own way, so that E[g u] is not 0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, neurons, generator=generator)
    noise = torch.randn(tokens, neurons, generator=generator)
    lean = torch.linspace(-1.5, 2.0, neurons)
    g = (z - 0.5).relu() if relu else F.silu(z)
    u = lean * z + 0.5 * noise + 0.3
    return g, u, g * u


def count(*streams: tuple[Tensor, ...]) -> SiteStatistics:
    statistics = SiteStatistics.empty(streams[0][0].shape[1])
    for g, u, h in streams:
        statistics.update(g, u, h)
    return statistics


def bf16_bits(values: Tensor) -> NDArray[np.int64]:
    """Bits of |values| rounded to bf16, to nearest and ties to even, by integer arithmetic."""
    bits = values.float().abs().numpy().view(np.uint32).astype(np.int64)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def bucket_by_hand(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Half-octaves from 2^-11, everything outside in the first or last bucket."""
    value = np.where(bits < 0x7F80, bits, 0x7F7F)
    exponent = (value >> 7) - 127
    upper_half = (value >> 6) & 1
    return np.clip(2 * (exponent + 11) + upper_half, 0, BUCKETS - 1)


# Bins


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_bins_are_the_bits_of_the_rounded_magnitude(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert np.array_equal(magnitude_bins(tensor).numpy(), bf16_bits(tensor))
    assert torch.equal(magnitude_bins(tensor), magnitude_bins(-tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bins_of_every_dtype_and_layout(dtype: torch.dtype) -> None:
    values = torch.randn(6, 10).to(dtype)
    assert np.array_equal(magnitude_bins(values).numpy(), bf16_bits(values.bfloat16()))
    assert torch.equal(magnitude_bins(values.t()), magnitude_bins(values).t())
    assert torch.equal(magnitude_bins(values[:, ::2]), magnitude_bins(values)[:, ::2])


def test_bin_values_are_all_bf16_magnitudes_in_order() -> None:
    values = bin_values()
    finite = values[: LAST_FINITE + 1]
    assert values.shape == (BINS,)
    assert bool((finite.diff() > 0).all())
    assert finite[0] == 0
    assert finite[-1] == torch.finfo(torch.bfloat16).max
    assert values[LAST_FINITE + 1] == torch.inf
    assert torch.equal(magnitude_bins(finite).long(), torch.arange(LAST_FINITE + 1))


def test_buckets_are_half_octaves() -> None:
    bins = torch.arange(BINS)
    assert np.array_equal(bucket_of(bins).numpy(), bucket_by_hand(bins.numpy()))
    assert int(bucket_of(magnitude_bins(torch.tensor(1.0)))) == 22
    assert int(bucket_of(magnitude_bins(torch.tensor(1.5)))) == 23


# Thresholds


def test_threshold_lies_half_way_between_two_magnitudes() -> None:
    bins = torch.arange(LAST_FINITE)
    values = bin_values().double()
    middle = (values[:LAST_FINITE] + values[1 : LAST_FINITE + 1]) / 2
    assert torch.equal(threshold_above(bins).double(), middle)
    assert threshold_above(bins).dtype == torch.float32


def test_every_bf16_value_decides_as_its_bin_does() -> None:
    bins = torch.arange(LAST_FINITE + 1)
    thresholds = threshold_above(bins)
    values = bin_values()[: LAST_FINITE + 1]
    assert bool((values <= thresholds).all())  # the bin itself is dropped ...
    assert bool((values[1:] > thresholds[:-1]).all())  # ... and the next one kept
    assert bool(thresholds.isfinite().all())


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, LAST_FINITE))
def test_rounding_to_bf16_first_decides_alike(value: float, cut: int) -> None:
    g = torch.tensor(value, dtype=torch.float32).abs()
    threshold = threshold_above(torch.tensor(cut))
    kept = bool(bf16_bits(g[None])[0] > cut)
    assert bool(g.bfloat16().float() > threshold) == kept
    if g != threshold:  # on the boundary itself, rounding goes to even
        assert bool(g > threshold) == kept


@given(st.integers(0, LAST_FINITE - 1), st.integers(-0x7FFF, 0x7FFF))
def test_values_near_a_threshold_decide_alike_rounded_or_not(cut: int, steps: int) -> None:
    threshold = threshold_above(torch.tensor(cut))
    near = (threshold.view(torch.int32) + steps).view(torch.float32)
    if steps:
        assert bool(near > threshold) == (steps > 0) == bool(bf16_bits(near[None])[0] > cut)


def test_keep_all_is_minus_one() -> None:
    bins = torch.tensor([-1, 0, 5])
    assert threshold_above(bins).tolist()[0] == -1
    assert bool((threshold_above(bins)[1:] > 0).all())


def test_bins_below_inverts_threshold_above() -> None:
    bins = torch.arange(LAST_FINITE + 1)
    assert torch.equal(bins_below(threshold_above(bins)).long(), bins)


@given(st.floats(0, 2.0**127, width=32))
def test_bins_below_is_the_bin_a_threshold_falls_in(threshold: float) -> None:
    values = bin_values()[: LAST_FINITE + 1]
    below = int(bins_below(torch.tensor([threshold], dtype=torch.float32)))
    assert values[below] <= threshold
    assert below == LAST_FINITE or values[below + 1] > threshold


# Counting


@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (1, 7), (3, 7), (500, 1), (129, 33)])
@pytest.mark.parametrize("relu", [False, True])
def test_every_statistic_against_brute_force(tokens: int, neurons: int, relu: bool) -> None:
    g, u, h = activations(tokens, neurons, relu=relu)
    statistics = count((g, u, h))
    bits = bf16_bits(g)
    assert statistics.tokens == tokens
    assert statistics.neurons == neurons
    assert np.array_equal(statistics.histogram.numpy(), np.bincount(bits.ravel(), minlength=BINS))
    np.testing.assert_allclose(statistics.gate_square, (g.double() ** 2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.up_square, (u.double() ** 2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.up_rms, (u.double() ** 2).mean(0).sqrt(), rtol=1e-5)
    counts = np.zeros((BUCKETS, neurons), dtype=np.int64)
    sums = np.zeros((BUCKETS, neurons))
    buckets = bucket_by_hand(bits)
    for token in range(tokens):
        for neuron in range(neurons):
            counts[buckets[token, neuron], neuron] += 1
            sums[buckets[token, neuron], neuron] += float(h[token, neuron])
    assert np.array_equal(statistics.bucket_count.numpy(), counts)
    np.testing.assert_allclose(statistics.bucket_sum, sums, rtol=1e-4, atol=1e-4)
    assert statistics.is_finite


def test_large_updates_are_counted_in_pieces() -> None:
    stream = activations(700, 1000)  # 700,000 values: three pieces
    whole = count(stream)
    single = count(*(tuple(t[i : i + 1] for t in stream) for i in range(700)))
    assert_same_counts(whole, single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations(dtype: torch.dtype) -> None:
    g, u, h = (t.to(dtype) for t in activations(200, 9))
    statistics = count((g, u, h))
    assert np.array_equal(
        statistics.histogram.numpy(),
        np.bincount(bf16_bits(g.bfloat16()).ravel(), minlength=BINS),
    )
    np.testing.assert_allclose(statistics.up_square, (u.double() ** 2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(
        statistics.bucket_sum.double().sum(0), h.double().sum(0), rtol=1e-3, atol=1e-2
    )


def assert_same_counts(one: SiteStatistics, other: SiteStatistics) -> None:
    """Integers exactly, sums of floats within the rounding of another order."""
    assert one.tokens == other.tokens
    assert torch.equal(one.histogram, other.histogram)
    assert torch.equal(one.bucket_count, other.bucket_count)
    torch.testing.assert_close(one.gate_square, other.gate_square, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.up_square, other.up_square, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.bucket_sum, other.bucket_sum, rtol=1e-4, atol=1e-3)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(1, 9))
def test_addition_equals_one_stream(lengths: list[int], neurons: int) -> None:
    streams = [activations(n, neurons, seed=i) for i, n in enumerate(lengths)]
    added = SiteStatistics.empty(neurons)
    for stream in streams:
        added = added + count(stream)
    assert_same_counts(added, count(*streams))


def test_addition_leaves_the_terms_alone() -> None:
    one, other = count(activations(20, 5)), count(activations(30, 5, seed=1))
    before = one.histogram.clone(), other.bucket_sum.clone()
    one + other
    assert one.tokens == 20
    assert torch.equal(one.histogram, before[0])
    assert torch.equal(other.bucket_sum, before[1])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_noticed(value: float, where: int) -> None:
    tensors = list(activations(10, 6))
    tensors[where] = tensors[where].clone()
    tensors[where][3, 2] = value
    g, u, h = tensors
    assert not count((g, u, h if where == 2 else g * u)).is_finite


def test_the_largest_finite_gate_is_finite() -> None:
    g = torch.full((2, 3), torch.finfo(torch.bfloat16).max)
    assert count((g, torch.zeros_like(g), torch.zeros_like(g))).is_finite


# Quantiles


def nearest_attainable(g: Tensor, sparsity: float) -> int:
    """The number of dropped values nearest to the one asked, cutting between magnitudes only."""
    bits = np.sort(bf16_bits(g).ravel())
    _, firsts = np.unique(bits, return_index=True)
    attainable = np.append(firsts, len(bits))
    return int(attainable[np.argmin(np.abs(attainable - sparsity * len(bits)))])


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.77, 0.9, 0.999])
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (1, 7), (37, 5), (400, 48)])
def test_quantile_is_exact(tokens: int, neurons: int, sparsity: float) -> None:
    g, u, h = activations(tokens, neurons)
    statistics = count((g, u, h))
    threshold = threshold_above(torch.tensor(statistics.quantile_bin(sparsity)))
    dropped = int((g.bfloat16().float().abs() <= threshold).sum())
    off = abs(dropped - sparsity * g.numel())
    best = abs(nearest_attainable(g, sparsity) - sparsity * g.numel())
    assert off == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_quantile_agrees_with_torch(sparsity: float) -> None:
    g, u, h = activations(2000, 40)
    threshold = float(threshold_above(torch.tensor(count((g, u, h)).quantile_bin(sparsity))))
    # One bf16 step is 2^-7 of the magnitude at most.
    assert threshold == pytest.approx(float(g.abs().quantile(sparsity)), rel=2**-7)


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0, 1e-30, 3e38]), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
def test_quantile_with_many_ties(values: list[float], sparsity: float) -> None:
    g = torch.tensor(values)[:, None]
    statistics = count((g, g.clamp(-1, 1), g.clamp(-1, 1)))
    k = statistics.quantile_bin(sparsity)
    dropped = int((bf16_bits(g) <= k).sum())
    best = nearest_attainable(g, sparsity)
    if sparsity > 0:  # exact zeros cost nothing to drop, so they always are
        best = max(best, int((g == 0).sum()))
    assert abs(dropped - sparsity * len(g)) == pytest.approx(abs(best - sparsity * len(g)))


def test_nothing_is_dropped_at_sparsity_zero() -> None:
    assert count(activations(50, 8, relu=True)).quantile_bin(0.0) == -1


@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (5, 7), (40, 200)])
def test_histogram_in_copies(tokens: int, neurons: int) -> None:
    """What a GPU does, on the CPU."""
    bins = magnitude_bins(activations(tokens, neurons)[0])
    assert torch.equal(_histogram(bins, copies=64), _histogram(bins, copies=1))


def test_quantile_of_nothing() -> None:
    assert SiteStatistics.empty(4).quantile_bin(0.5) == -1


# What lies below a threshold


@pytest.mark.parametrize("relu", [False, True])
def test_counts_add_up_to_the_histogram_for_a_uniform_cut(relu: bool) -> None:
    statistics = count(activations(300, 23, relu=relu))
    mass = DroppedMass(statistics)
    below = statistics.histogram.cumsum(0)
    cuts = torch.cat([torch.arange(0, BINS, 97), torch.arange(0x3E00, 0x3F80), torch.tensor([-1])])
    for cut in cuts.tolist():
        total = float(mass.at(torch.full((23,), cut))[0].sum())
        assert total == pytest.approx(float(below[cut]) if cut >= 0 else 0.0, rel=1e-12)


def dropped_by_hand(g: Tensor, h: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    below = torch.from_numpy(bf16_bits(g)) <= bins
    return below.sum(0).double(), (h.double() * below).sum(0)


@pytest.mark.parametrize("relu", [False, True])
def test_exact_where_a_bucket_ends(relu: bool) -> None:
    g, u, h = activations(400, 16, relu=relu)
    mass = DroppedMass(count((g, u, h)))
    ends = ((torch.arange(BUCKETS - 1) + 2 * (127 - 11) + 1) << 6) - 1
    for end in ends.tolist():
        bins = torch.full((16,), end)
        counts, sums = mass.at(bins)
        by_hand = dropped_by_hand(g, h, bins)
        torch.testing.assert_close(counts, by_hand[0], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(sums, by_hand[1], rtol=1e-5, atol=1e-4)


def test_each_neuron_is_cut_on_its_own() -> None:
    g, u, h = activations(400, 16)
    mass = DroppedMass(count((g, u, h)))
    ends = ((torch.arange(16) + 2 * (127 - 11) + 8) << 6) - 1
    bins = ends[torch.randperm(16)]
    bins[3] = -1
    counts, sums = mass.at(bins)
    by_hand = dropped_by_hand(g, h, bins)
    torch.testing.assert_close(counts, by_hand[0], rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(sums, by_hand[1], rtol=1e-5, atol=1e-4)
    assert counts[3] == sums[3] == 0


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_means_are_the_direct_means(sparsity: float) -> None:
    """Within one bucket a neuron's tokens are taken to be spread as the layer's are.

    That leaves a mean off by 5 percent of the neuron's typical |h| at the most, which adds a
    quarter of a percent to the squared error; the means themselves lie ten times as far apart.
    """
    g, u, h = activations(8000, 24)
    statistics = count((g, u, h))
    bins = torch.full((24,), statistics.quantile_bin(sparsity))
    counts, sums = DroppedMass(statistics).at(bins)
    true_counts, true_sums = dropped_by_hand(g, h, bins)
    true = true_sums / true_counts
    below = torch.from_numpy(bf16_bits(g)) <= bins
    typical = ((h.double() ** 2 * below).sum(0) / true_counts).sqrt()
    assert float((true.max() - true.min()) / typical.median()) > 0.5  # not a trivial case
    assert float((((sums / counts) - true).abs() / typical).max()) < 0.05
    assert float(((counts - true_counts).abs() / 8000).max()) < 0.02


def test_zeros_are_all_dropped_first() -> None:
    """A ReLU gate: half of the values are 0, and they carry no product."""
    g, u, h = activations(500, 11, relu=True)
    statistics = count((g, u, h))
    zeros = (g == 0).sum(0).double()
    assert float(zeros.sum()) / g.numel() > 0.5
    counts, sums = DroppedMass(statistics).at(torch.zeros(11, dtype=torch.long))
    assert float(counts.sum()) == pytest.approx(float(zeros.sum()), rel=1e-12)
    assert float(sums.abs().max()) == 0


def test_mass_grows_with_the_cut() -> None:
    statistics = count(activations(100, 5))
    mass = DroppedMass(statistics)
    counts = torch.stack([mass.at(torch.full((5,), k))[0] for k in range(0x3A00, 0x4100, 7)])
    assert bool((counts.diff(dim=0) >= 0).all())
    assert float(counts.max()) <= statistics.tokens
