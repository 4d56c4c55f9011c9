"""The second decision against counting over raw activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from catsparse.methods import METHODS, SiteThreshold, site_threshold
from catsparse.products import ProductStatistics, decide, second_decision
from catsparse.statistics import BINS, BUCKETS
from test_methods import TOKENS, often, uneven
from test_statistics import bf16_bits, count


def norms(neurons: int) -> Tensor:
    return torch.linspace(0.3, 2.0, neurons)


def gather(g: Tensor, h: Tensor, threshold: Tensor, norm: Tensor) -> ProductStatistics:
    products = ProductStatistics.empty(norm)
    for part_of_g, part in zip(g.split(977), h.split(977), strict=True):
        products.update(part, part, part_of_g.float().abs() > threshold)
    return products


def both(
    data: tuple[Tensor, ...], method: str, sparsity: float, down_sparsity: float
) -> SiteThreshold:
    g, _, h = data
    statistics = count(data)
    first = site_threshold(statistics, method, sparsity, False)
    products = gather(g, h, first.threshold, norms(g.shape[1]))
    t = site_threshold(statistics, method, sparsity, True, products, down_sparsity)
    assert torch.equal(t.threshold, first.threshold)
    return t


def masks(data: tuple[Tensor, ...], t: SiteThreshold) -> tuple[Tensor, Tensor]:
    """Kept by the gate, and kept in all."""
    g, _, h = data
    assert t.product is not None
    keep = g.abs() > t.threshold
    return keep, keep & (h.abs() > t.product)


@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (3, 7), (129, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_statistic_against_brute_force(tokens: int, neurons: int, dtype: torch.dtype) -> None:
    g, u, _ = (t.to(dtype) for t in uneven(tokens, neurons))
    h, norm = g * u, norms(neurons)
    threshold = torch.linspace(0.0, 0.4, neurons)
    products = gather(g, h, threshold, norm)
    bits = bf16_bits(h.float().abs() * norm)
    histogram = np.zeros(BINS, dtype=np.int64)
    counts = np.zeros((BUCKETS, neurons), dtype=np.int64)
    sums = np.zeros((BUCKETS, neurons))
    for t in range(tokens):
        for i in range(neurons):
            if abs(float(g[t, i])) > float(threshold[i]):
                histogram[bits[t, i]] += 1
                octave = int(np.clip((bits[t, i] >> 7) - 127 + 22, 0, BUCKETS - 1))
                counts[octave, i] += 1
                sums[octave, i] += float(h[t, i])
    assert np.array_equal(products.histogram.numpy(), histogram)
    assert np.array_equal(products.bucket_count.numpy(), counts)
    np.testing.assert_allclose(products.bucket_sum, sums, rtol=1e-4, atol=1e-4)
    assert products.is_finite


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sparsity", "down"), [(0.0, 0.3), (0.4, 0.45), (0.5, 0.65), (0.6, 0.9)])
def test_shares_are_those_of_the_tokens(method: str, sparsity: float, down: float) -> None:
    data = uneven()
    t = both(data, method, sparsity, down)
    keep, kept = masks(data, t)
    assert t.product is not None
    assert t.product.shape == (data[0].shape[1],)
    assert t.product.dtype == torch.float32
    # Exactly: the second pass has counted what the gate kept.
    assert t.sparsity == pytest.approx(1 - float(keep.double().mean()), abs=1e-9)
    # Each neuron's threshold is moved to the middle between two bf16 magnitudes.
    assert t.down_sparsity == pytest.approx(1 - float(kept.double().mean()), abs=2e-3)
    assert t.down_sparsity == pytest.approx(down, abs=2e-3)


def test_threshold_is_the_quantile_by_sorting() -> None:
    """P cuts the scores |h| norm of the kept, at what is missing to ``down_sparsity``."""
    g, _, h = data = uneven()
    t = both(data, "cats", 0.5, 0.7)
    keep, _ = masks(data, t)
    scores = (h.abs() * norms(g.shape[1]))[keep].double().sort().values
    wanted = round(0.7 * keep.numel()) - int((~keep).sum())
    assert t.product_scalar == pytest.approx(float(scores[wanted - 1]), rel=2**-7)
    assert t.product is not None
    cut = (t.product * norms(g.shape[1])).double()
    torch.testing.assert_close(cut, torch.full_like(cut, t.product_scalar), rtol=2**-7, atol=0)
    # Half-way between two bf16 magnitudes, whose fp32 bits end in 16 zeros.
    assert bool(((t.product.view(torch.int32) & 0xFFFF) == 0x8000).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sparsity", "down"), [(0.4, 0.6), (0.5, 0.8)])
def test_means_are_over_what_either_drops(method: str, sparsity: float, down: float) -> None:
    data = uneven()
    t = both(data, method, sparsity, down)
    h, dropped = data[2].double(), ~masks(data, t)[1]
    assert t.mean is not None
    direct = (h * dropped).sum(0) / dropped.sum(0)
    typical = ((h**2 * dropped).sum(0) / dropped.sum(0)).sqrt()
    # Interpolation within buckets, as for the gate's own means.
    off = ((t.mean - direct) / typical).square()[often(dropped)]
    assert float(off.max()) < 0.01
    assert float(off.mean()) < 0.001
    # The gate's means alone are something else.
    alone = site_threshold(count(data), method, sparsity, True).mean
    assert alone is not None
    assert float(((alone - direct) / typical).square()[often(dropped)].max()) > 0.02


def test_nothing_more_is_dropped_where_the_gate_drops_enough() -> None:
    data = uneven()
    t = both(data, "energy", 0.5, 0.5)
    keep, kept = masks(data, t)
    beyond = max(0.0, 0.5 - t.sparsity)
    assert float((keep & ~kept).double().mean()) == pytest.approx(beyond, abs=1e-3)
    statistics = count(data)
    first = site_threshold(statistics, "energy", 0.5, True)
    products = gather(data[0], data[2], first.threshold, norms(data[0].shape[1]))
    second = second_decision(products, data[0].numel(), 0.1)
    assert (second.scalar, second.dropped) == (-1.0, 0)
    assert bool((second.threshold == -1).all())
    assert not bool(second.count.any())


def test_row_of_zeros_is_never_read() -> None:
    g, _, h = data = uneven(300, 8)
    norm = norms(8)
    norm[3] = 0
    statistics = count(data)
    first = site_threshold(statistics, "cats", 0.3, False)
    products = gather(g, h, first.threshold, norm)
    t = site_threshold(statistics, "cats", 0.3, True, products, 0.5)
    assert t.product is not None
    assert bool(t.product.isfinite().all())
    assert not bool((h[:, 3].abs() > t.product[3]).any())


def test_gate_that_drops_everything() -> None:
    g, _, h = data = uneven(50, 6)
    products = gather(g, h, torch.tensor(1e30), norms(6))
    t = site_threshold(count(data), "cats", 0.5, True, products, 0.9)
    assert (t.sparsity, t.down_sparsity) == (1.0, 1.0)
    assert t.product is not None
    assert bool(t.product.isfinite().all())


def test_addition_equals_one_stream() -> None:
    g, _, h = uneven(400, 9)
    threshold, norm = torch.tensor(0.2), norms(9)
    whole = gather(g, h, threshold, norm)
    halves = gather(g[:150], h[:150], threshold, norm) + gather(g[150:], h[150:], threshold, norm)
    assert isinstance(halves, ProductStatistics)
    assert torch.equal(halves.histogram, whole.histogram)
    assert torch.equal(halves.bucket_count, whole.bucket_count)
    torch.testing.assert_close(halves.bucket_sum, whole.bucket_sum, rtol=1e-4, atol=1e-4)
    assert torch.equal(halves.down_norm, norm)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_noticed(value: float) -> None:
    g, _, h = uneven(20, 5)
    h = h.clone()
    h[3, 2], g[3, 2] = value, 9.0
    assert not gather(g, h, torch.tensor(0.1), norms(5)).is_finite


def test_scale_of_the_scores_does_not_matter() -> None:
    """Octaves from 2^-22: weights and activations 1,000 times smaller cut the same rows."""
    g, _, h = data = uneven(TOKENS // 4)
    statistics = count(data)
    t = site_threshold(statistics, "cats", 0.4, False)
    kept = []
    for scale in (1.0, 1e-3):
        products = gather(g, h * scale, t.threshold, norms(g.shape[1]))
        second = second_decision(products, g.numel(), 0.6)
        kept.append((h * scale).abs() > second.threshold)
    assert float((kept[0] == kept[1]).double().mean()) > 0.99


# The product that a preview foretells


def foretold(h: Tensor) -> Tensor:
    """What a poor preview would make of h: each neuron off by its own factor, and noise."""
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(5))
    return h * torch.linspace(0.6, 1.5, h.shape[1]) + 0.1 * noise


@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (3, 7), (129, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_foretold_and_sums_the_exact(
    tokens: int, neurons: int, dtype: torch.dtype
) -> None:
    h, norm = uneven(tokens, neurons)[2].to(dtype), norms(neurons)
    seen = foretold(h.float()).to(dtype)
    products = ProductStatistics.empty(norm)
    products.update(seen, h)
    bits = bf16_bits(seen.float().abs() * norm)
    octaves = np.clip((bits >> 7) - 127 + 22, 0, BUCKETS - 1)
    assert np.array_equal(products.histogram, np.bincount(bits.ravel(), minlength=BINS))
    for i in range(neurons):
        counts = np.bincount(octaves[:, i], minlength=BUCKETS)
        sums = np.bincount(octaves[:, i], weights=h[:, i].double(), minlength=BUCKETS)
        assert np.array_equal(products.bucket_count[:, i], counts)
        np.testing.assert_allclose(products.bucket_sum[:, i], sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["foretold", "exact"])
def test_neither_may_be_not_finite(value: float, which: str) -> None:
    h = uneven(20, 5)[2]
    seen = {"foretold": foretold(h), "exact": h.clone()}
    seen[which][3, 2] = value
    products = ProductStatistics.empty(norms(5))
    products.update(seen["foretold"], seen["exact"])
    assert not products.is_finite


@pytest.mark.parametrize("share", [0.0, 0.1, 0.51, 0.65, 0.95])
def test_share_of_what_was_counted_is_dropped(share: float) -> None:
    h = uneven()[2]
    seen = foretold(h)
    products = ProductStatistics.empty(norms(h.shape[1]))
    products.update(seen, h)
    cut = decide(products, share)
    dropped = seen.abs() <= cut.threshold
    assert cut.seen == h.numel()
    assert cut.dropped / cut.seen == pytest.approx(share, abs=2e-3)
    assert float(dropped.double().mean()) == pytest.approx(share, abs=3e-3)
    if not share:
        assert bool((cut.threshold == -1).all())
