"""Scoring rules against sorting and an implementation of our own from the papers' formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catsparse.errors import CatsparseError
from catsparse.methods import METHODS, SiteThreshold, product_threshold, site_threshold
from catsparse.products import ProductStatistics
from catsparse.statistics import SiteStatistics
from test_statistics import activations, count

TOKENS, NEURONS, HIDDEN = 4000, 48, 24


def uneven(tokens: int = TOKENS, neurons: int = NEURONS, seed: int = 0) -> tuple[Tensor, ...]:
    """Activations whose up projections differ by a factor of 30 between neurons."""
    g, u, _ = activations(tokens, neurons, seed)
    u = u * torch.logspace(-1, 0.5, neurons)
    return g, u, g * u


def kept(g: Tensor, threshold: Tensor) -> Tensor:
    return g.float().abs() > threshold


def often(dropped: Tensor) -> Tensor:
    """Neurons dropped on a twentieth of the tokens; of the rest there is too little to average."""
    return dropped.float().mean(0) > 0.05


def chess_by_hand(g: Tensor, u: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """(keep mask, T): score g_i^2 E[u_i^2] of every token and neuron, T its quantile."""
    score = g.double() ** 2 * (u.double() ** 2).mean(0)
    ordered = score.flatten().sort().values
    cut = float(ordered[round(sparsity * len(ordered)) - 1])
    return score > cut, cut


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compensate", [False, True])
def test_shapes_and_dtypes(method: str, compensate: bool) -> None:
    t = site_threshold(count(uneven(50, 7)), method, 0.5, compensate)
    assert t.threshold.shape == (() if method == "cats" else (7,))
    assert t.threshold.dtype == torch.float32
    assert (t.mean is not None) == compensate
    if t.mean is not None:
        assert t.mean.shape == (7,)
        assert t.mean.dtype == torch.float32
    assert isinstance(t.scalar, float)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_cats_threshold_is_the_quantile_by_sorting(sparsity: float) -> None:
    g, u, h = uneven()
    t = site_threshold(count((g, u, h)), "cats", sparsity, False)
    ordered = g.abs().flatten().sort().values
    quantile = float(ordered[round(sparsity * len(ordered)) - 1])
    assert float(t.threshold) == pytest.approx(quantile, rel=2**-7)
    assert t.scalar == float(t.threshold)
    # One bf16 magnitude holds the values that a cut cannot part.
    assert float((~kept(g, t.threshold)).float().mean()) == pytest.approx(sparsity, abs=0.005)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_chess_against_brute_force(sparsity: float) -> None:
    g, u, h = uneven()
    t = site_threshold(count((g, u, h)), "chess", sparsity, False)
    by_hand, cut = chess_by_hand(g, u, sparsity)
    # T is found by counts that are interpolated within half-octaves, and thresholds are bf16.
    assert t.scalar == pytest.approx(cut**0.5, rel=0.03)
    rms = (u.double() ** 2).mean(0).sqrt()
    torch.testing.assert_close(
        t.threshold.double() * rms, torch.full_like(rms, t.scalar), rtol=2**-7, atol=0
    )
    assert float((kept(g, t.threshold) == by_hand).float().mean()) > 0.99
    assert float((~kept(g, t.threshold)).float().mean()) == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_energy_against_brute_force(sparsity: float) -> None:
    """Keep iff |g| E[u^2] > T, T the s-quantile of the scores."""
    g, u, h = uneven()
    t = site_threshold(count((g, u, h)), "energy", sparsity, False)
    energy = (u.double() ** 2).mean(0)
    scores = g.double().abs() * energy
    cut = float(scores.flatten().quantile(sparsity))
    assert t.scalar == pytest.approx(cut, rel=0.03)
    torch.testing.assert_close(
        t.threshold.double() * energy, torch.full_like(energy, t.scalar), rtol=2**-7, atol=0
    )
    assert float((kept(g, t.threshold) == (scores > cut)).float().mean()) > 0.99


def test_chess_equals_cats_where_all_neurons_are_alike() -> None:
    g, _, _ = activations(TOKENS, NEURONS)
    u = torch.ones_like(g) * 3
    statistics = count((g, u, g * u))
    cats = site_threshold(statistics, "cats", 0.5, False)
    chess = site_threshold(statistics, "chess", 0.5, False)
    torch.testing.assert_close(chess.threshold, cats.threshold.expand(NEURONS), rtol=2**-7, atol=0)
    assert chess.scalar == pytest.approx(3 * cats.scalar, rel=2**-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_sparsity_zero_keeps_everything(method: str, compensate: bool, relu: bool) -> None:
    g, u, h = activations(60, 13, relu=relu)
    t = site_threshold(count((g, u, h)), method, 0.0, compensate)
    assert bool(kept(g, t.threshold).all())
    assert t.sparsity == 0
    if t.mean is not None:
        assert bool((t.mean == 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_stated_sparsity_is_what_is_dropped(method: str, sparsity: float) -> None:
    g, u, h = uneven()
    t = site_threshold(count((g, u, h)), method, sparsity, True)
    measured = float((~kept(g.bfloat16(), t.threshold)).double().mean())
    assert t.sparsity == pytest.approx(sparsity, abs=0.005)
    # Exact for one threshold a layer; for one a neuron by interpolation within half-octaves.
    assert t.sparsity == pytest.approx(measured, abs=1e-12 if method == "cats" else 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_more_sparsity_means_higher_thresholds(method: str) -> None:
    statistics = count(uneven(500))
    thresholds = [
        site_threshold(statistics, method, s, False).threshold for s in (0, 0.2, 0.4, 0.6, 0.8)
    ]
    assert bool((torch.stack(thresholds).diff(dim=0) >= 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dead", ["gate", "up"])
def test_dead_neuron_is_dropped_and_has_no_mean(method: str, dead: str) -> None:
    g, u, _ = (t.clone() for t in uneven(500, 9))
    (g if dead == "gate" else u)[:, 4] = 0
    t = site_threshold(count((g, u, g * u)), method, 0.5, True)
    assert bool(t.threshold.isfinite().all())
    assert t.mean is not None
    assert bool(t.mean.isfinite().all())
    assert float(t.mean[4]) == 0
    if dead == "gate" or method != "cats":
        assert not bool(kept(g, t.threshold)[:, 4].any())


@pytest.mark.parametrize("method", METHODS)
def test_neurons_that_are_never_dropped_have_no_mean(method: str) -> None:
    g, u, _ = (t.clone() for t in uneven(500, 9))
    g[:, 2] = 1e4
    u[:, 2] = 1e4
    t = site_threshold(count((g, u, g * u)), method, 0.5, True)
    assert bool(kept(g, t.threshold)[:, 2].all())
    assert t.mean is not None
    assert float(t.mean[2]) == 0


@pytest.mark.parametrize("method", METHODS)
def test_zeros_are_free_to_drop(method: str) -> None:
    """A ReLU gate that is mostly 0: whatever is asked below that, at least the 0s are dropped."""
    g, u, h = activations(500, 16, relu=True)
    zeros = float((g == 0).float().mean())
    t = site_threshold(count((g, u, h)), method, zeros / 3, False)
    mask = kept(g, t.threshold)
    assert not bool(mask[g == 0].any())
    assert bool(mask[g > 0.05].all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("tokens", "neurons"), [(1, 1), (1, 7), (2, 3)])
def test_very_little_data(method: str, tokens: int, neurons: int) -> None:
    statistics = count(activations(tokens, neurons))
    for sparsity in (0.0, 0.5, 0.99):
        t = site_threshold(statistics, method, sparsity, True)
        assert bool(t.threshold.isfinite().all())
        assert 0 <= t.sparsity <= 1


def test_unknown_method() -> None:
    with pytest.raises(CatsparseError, match="cats, chess"):
        site_threshold(SiteStatistics.empty(3), "teal", 0.5, True)


# Compensation


def output_error(
    h: Tensor, g: Tensor, w_down: Tensor, threshold: Tensor, mean: Tensor | None
) -> float:
    """Mean squared error of the MLP's output against the dense one."""
    fill = torch.zeros_like(h) if mean is None else mean.expand_as(h)
    missing = torch.where(kept(g, threshold), 0.0, h - fill)
    return float((missing @ w_down.t()).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_compensation_lowers_the_output_error(method: str, sparsity: float) -> None:
    g, u, h = uneven()
    w_down = torch.randn(HIDDEN, NEURONS)
    t = site_threshold(count((g, u, h)), method, sparsity, True)
    plain = output_error(h, g, w_down, t.threshold, None)
    compensated = output_error(h, g, w_down, t.threshold, t.mean)
    assert compensated < 0.95 * plain


@pytest.mark.parametrize("method", METHODS)
def test_no_other_constant_does_better(method: str) -> None:
    """Each neuron's mean is where the squared error of its dropped products is least."""
    g, u, h = uneven()
    t = site_threshold(count((g, u, h)), method, 0.5, True)
    assert t.mean is not None
    dropped = ~kept(g, t.threshold)
    count_dropped = dropped.sum(0)
    spread = ((h**2 * dropped).sum(0) / count_dropped).sqrt()

    def error(fill: Tensor) -> Tensor:
        return ((h - fill).square() * dropped).sum(0) / count_dropped / spread.square()

    at_mean = error(t.mean)
    for step in (-0.4, -0.2, 0.2, 0.4):
        assert bool((error(t.mean + step * spread) > at_mean)[often(dropped)].all())


@pytest.mark.parametrize("method", METHODS)
def test_means_are_over_dropped_tokens_only(method: str) -> None:
    g, u, h = uneven()
    t: SiteThreshold = site_threshold(count((g, u, h)), method, 0.5, True)
    assert t.mean is not None
    dropped = ~kept(g, t.threshold)
    direct = (h.double() * dropped).sum(0) / dropped.sum(0)
    typical = ((h.double() ** 2 * dropped).sum(0) / dropped.sum(0)).sqrt()
    # Interpolation within half-octaves: a percent of the squared error at the most.
    off = ((t.mean - direct) / typical).square()[often(dropped)]
    assert float(off.max()) < 0.01
    assert float(off.mean()) < 0.001
    everywhere = F.mse_loss(h.double().mean(0) / typical, direct / typical)
    assert float(everywhere) > 0.1  # the mean over all tokens is something else


# Method product: decided on what a preview foretells


def foretelling(tokens: int = TOKENS, neurons: int = NEURONS) -> tuple[Tensor, ...]:
    """h, what a preview makes of it, the norms of W_down's rows, and the statistics."""
    h = uneven(tokens, neurons)[2]
    noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(5))
    foretold, norm = 1.1 * h + 0.1 * h.std() * noise, torch.linspace(2.0, 0.3, neurons)
    return h, foretold, norm


def statistics_of(h: Tensor, foretold: Tensor, norm: Tensor) -> ProductStatistics:
    statistics = ProductStatistics.empty(norm)
    for piece in range(0, len(h), 977):
        statistics.update(foretold[piece : piece + 977], h[piece : piece + 977])
    return statistics


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.51, 0.7, 0.95])
def test_product_cuts_the_foretold_scores_at_their_quantile(sparsity: float) -> None:
    _, foretold, norm = data = foretelling()
    t = product_threshold(statistics_of(*data), sparsity, False)
    scores = (foretold.double().abs() * norm).flatten().sort().values
    assert t.scalar == pytest.approx(float(scores[round(sparsity * len(scores)) - 1]), rel=2**-7)
    torch.testing.assert_close(
        t.threshold * norm, torch.full_like(norm, t.scalar), rtol=2**-7, atol=0
    )
    assert (t.threshold.shape, t.threshold.dtype) == ((NEURONS,), torch.float32)
    dropped = float((foretold.abs() <= t.threshold).double().mean())
    assert t.sparsity == pytest.approx(sparsity, abs=2e-3)
    assert dropped == pytest.approx(sparsity, abs=4e-3)
    assert (t.mean, t.product, t.product_scalar, t.down_sparsity) == (None, None, None, None)


@pytest.mark.parametrize("sparsity", [0.3, 0.51, 0.7])
def test_means_of_product_are_of_the_exact_products(sparsity: float) -> None:
    h, foretold, _ = data = foretelling()
    t = product_threshold(statistics_of(*data), sparsity, True)
    assert t.mean is not None
    dropped = foretold.abs() <= t.threshold
    typical = ((h.double() ** 2 * dropped).sum(0) / dropped.sum(0)).sqrt()

    def off(of: Tensor) -> Tensor:
        direct = (of.double() * dropped).sum(0) / dropped.sum(0)
        return ((t.mean - direct) / typical).square()[often(dropped)]

    # Interpolation within octaves, coarser than the gate's half-octaves.
    assert float(off(h).max()) < 0.01
    assert float(off(h).mean()) < 0.001
    assert float(off(foretold).max()) > float(off(h).max())


def test_product_at_0_and_with_dead_neurons() -> None:
    h, foretold, norm = foretelling(300, 9)
    t = product_threshold(statistics_of(h, foretold, norm), 0.0, True)
    assert bool((t.threshold == -1).all())
    assert (t.sparsity, t.scalar) == (0, -1)
    assert t.mean is not None
    assert not bool(t.mean.any())
    norm[4] = 0  # a row of W_down that adds nothing
    t = product_threshold(statistics_of(h, foretold, norm), 0.5, True)
    assert bool(t.threshold.isfinite().all())
    assert not bool((foretold[:, 4].abs() > t.threshold[4]).any())
    assert t.mean is not None
    assert float(t.mean[4]) == pytest.approx(float(h[:, 4].mean()), rel=1e-4)
