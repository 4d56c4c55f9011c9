"""Allocation: budgets met, the exact solution against all there are, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import Calibration, CatsparseError, Sensitivities, SparsityConfig, allocate
from catsparse.allocation import Read, check_reachable, settle, solve_greedily, solve_optimally
from catsparse.config import ALLOCATIONS, SiteConfig, bytes_skipped
from catsparse.sites import Site

GRID = (0.3, 0.6, 0.95)


def with_table(
    calibration: Calibration, losses: dict[str, list[float]] | None = None, **changes: Any
) -> Calibration:
    """The calibration with a made-up table: the later the site, the more it costs."""
    rows = losses or {n: [0.1 * i, 0.4 * i, 2.0 * i] for i, n in enumerate(calibration.sites, 1)}
    tensors = {name: torch.tensor(row, dtype=torch.float64) for name, row in rows.items()}
    fields = {"method": "energy", "compensate": True, "preview": calibration.preview}
    table = Sensitivities(
        **(fields | {"tokens": 64, "sparsities": GRID, "losses": tensors} | changes)
    )
    return replace(calibration, sensitivities=table)


def of_sizes(*neurons: int, preview: int | None = None, hidden: int = 128) -> Calibration:
    """No statistics: what allocation reads of a calibration, with MLPs of these sizes."""
    names = [f"mlp{i}" for i in range(len(neurons))]
    sites = {
        n: Site(n, "gate", "up", "silu", None, "down", hidden, size)
        for n, size in zip(names, neurons, strict=True)
    }
    provenance = catsparse.config.Provenance("none", 64, 32, 0, "bfloat16")
    return Calibration(sites, {}, provenance, preview)


def skipped(calibration: Calibration, sparsities: dict[str, float]) -> float:
    """Of all weight bytes, counted as the config does."""
    assert list(sparsities) == list(calibration.sites)
    config = SparsityConfig(
        {
            name: SiteConfig(0.1, s, "silu", site.hidden_size, site.intermediate_size)
            for (name, site), s in zip(calibration.sites.items(), sparsities.values(), strict=True)
        },
        preview=calibration.preview,
        calibration=calibration.provenance,
    )
    return config.bytes_skipped


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("preview", [None, 4, 8])
@pytest.mark.parametrize("sizes", [(64, 64, 64), (64, 192, 33)])
@pytest.mark.parametrize("budget", [0.0, 0.1, 0.333, 0.6])
def test_budgets_are_met(allocation: str, preview: int | None, sizes: Any, budget: float) -> None:
    calibration = with_table(of_sizes(*sizes, preview=preview))
    sparsities = allocate(calibration, budget, allocation)
    assert skipped(calibration, sparsities) == pytest.approx(budget, abs=1e-6)
    assert all(0 <= s < 1 for s in sparsities.values())


def test_uniform_is_the_same_everywhere_and_needs_no_table() -> None:
    sparsities = allocate(of_sizes(64, 192, 33), 0.4, "uniform")
    assert list(sparsities.values()) == pytest.approx([0.6, 0.6, 0.6])


@pytest.mark.parametrize("allocation", ["greedy", "optimal"])
def test_what_costs_more_gets_less(allocation: str) -> None:
    sparsities = list(allocate(with_table(of_sizes(64, 64, 64)), 0.333, allocation).values())
    assert sparsities == sorted(sparsities, reverse=True)
    assert sparsities[0] > sparsities[2] + 0.1


def test_fp32_weights_count_twice() -> None:
    calibration = of_sizes(64, preview=4)
    wide = replace(calibration, provenance=replace(calibration.provenance, dtype="float32"))
    for one in (calibration, wide):
        assert skipped(one, allocate(one, 0.5, "uniform")) == pytest.approx(0.5)
    assert allocate(wide, 0.5, "uniform") != allocate(calibration, 0.5, "uniform")


# The solvers

Problem = tuple[Tensor, list[int], float]


@st.composite
def problems(draw: Any, equal: bool = False) -> Problem:
    """Never falling losses of up to 4 MLPs at up to 5 levels, sizes, and what is wanted."""
    mlps, levels = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    rises = st.lists(st.floats(0, 5), min_size=levels - 1, max_size=levels - 1)
    rows = [[0.0, *itertools.accumulate(draw(rises))] for _ in range(mlps)]
    size = st.integers(1, 9).map(lambda n: 16 * n)
    sizes = [draw(size)] * mlps if equal else [draw(size) for _ in range(mlps)]
    share = draw(st.floats(0, 1))
    wanted = share * (levels - 1) * sum(sizes)
    return torch.tensor(rows, dtype=torch.float64), sizes, wanted


def cost(losses: Tensor, levels: Any) -> float:
    return sum(float(losses[i, k]) for i, k in enumerate(levels))


def reach(sizes: list[int], levels: Any) -> float:
    return sum(k * size for k, size in zip(levels, sizes, strict=True))


@hypothesis.given(problems())
def test_optimal_is_the_best_of_all(problem: Problem) -> None:
    losses, sizes, wanted = problem
    every = itertools.product(range(losses.shape[1]), repeat=len(sizes))
    best = min(cost(losses, k) for k in every if reach(sizes, k) >= wanted - 1e-6)
    found = solve_optimally(losses, sizes, wanted)
    assert reach(sizes, found) >= wanted - 1e-6
    assert cost(losses, found) == pytest.approx(best, abs=1e-9)


@hypothesis.given(problems())
def test_greedy_reaches_the_budget_by_the_cheapest_steps(problem: Problem) -> None:
    losses, sizes, wanted = problem
    levels = [0] * len(sizes)
    while reach(sizes, levels) < wanted * (1 - 1e-12):  # by hand
        free = [i for i, k in enumerate(levels) if k + 1 < losses.shape[1]]
        rises = [float(losses[i, levels[i] + 1] - losses[i, levels[i]]) / sizes[i] for i in free]
        levels[free[rises.index(min(rises))]] += 1
    found = solve_greedily(losses, sizes, wanted)
    assert reach(sizes, found) >= wanted * (1 - 1e-9)
    assert cost(losses, found) == pytest.approx(cost(losses, levels), abs=1e-9)


def test_greedy_is_caught_where_optimal_is_not() -> None:
    """A first step that costs more, and then three for nothing."""
    losses = torch.tensor([[0, 1.1, 1.1, 1.1, 1.1], [0, 1, 2, 3, 4]], dtype=torch.float64)
    assert solve_greedily(losses, [1, 1], 3) == [0, 3]
    assert solve_optimally(losses, [1, 1], 3) == [3, 0]


@hypothesis.given(problems(equal=True))
def test_greedy_is_optimal_on_convex_curves(problem: Problem) -> None:
    losses, sizes, wanted = problem
    convex = torch.cat([losses[:, :1], losses.diff(dim=1).sort(dim=1).values.cumsum(1)], dim=1)
    one, other = (f(convex, sizes, wanted) for f in (solve_greedily, solve_optimally))
    assert cost(convex, one) == pytest.approx(cost(convex, other), abs=1e-9)


@hypothesis.given(problems(), st.randoms())
def test_settling_meets_the_budget_exactly(problem: Problem, random: Any) -> None:
    losses, sizes, wanted = problem
    start = [random.randrange(losses.shape[1]) for _ in sizes]  # over or under it, by any amount
    settled = settle(losses, sizes, start, wanted)
    assert reach(sizes, settled) == pytest.approx(wanted, abs=1e-6)
    assert all(0 <= k <= losses.shape[1] - 1 for k in settled)


def test_settling_takes_back_what_costs_most() -> None:
    losses = torch.tensor([[0, 1, 2], [0, 1, 5]], dtype=torch.float64)
    assert settle(losses, [10, 10], [2, 2], 35.0) == [2.0, 1.5]
    assert settle(losses, [10, 10], [1, 1], 25.0) == [1.5, 1.0]


def test_sizes_without_a_common_unit() -> None:
    """Units are rounded, and the budget is met all the same; no worse than uniform."""
    calibration = with_table(of_sizes(1009, 997, 14_336, 11, 4093))
    table = calibration.sensitivities
    assert table is not None
    found = {a: allocate(calibration, 0.4, a) for a in ALLOCATIONS}
    losses = {
        a: sum(
            float(table.curve(n, torch.tensor([s], dtype=torch.float64)))
            for n, s in sparsities.items()
        )
        for a, sparsities in found.items()
    }
    assert skipped(calibration, found["optimal"]) == pytest.approx(0.4, abs=1e-6)
    assert losses["optimal"] <= losses["greedy"] * (1 + 1e-3)
    assert losses["optimal"] < losses["uniform"]


def test_many_mlps() -> None:
    calibration = with_table(of_sizes(*[64] * 500))
    sparsities = allocate(calibration, 0.4, "optimal")
    assert skipped(calibration, sparsities) == pytest.approx(0.4, abs=1e-6)


# What is refused


@pytest.mark.parametrize("budget", [-0.1, 2 / 3, 0.7, 1.0, math.nan, math.inf])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_budgets_out_of_reach(budget: float, allocation: str) -> None:
    with pytest.raises(CatsparseError, match=r"it can be 0\.000 to"):
        allocate(with_table(of_sizes(64, 64)), budget, allocation)


def test_table_that_ends_before_the_budget() -> None:
    calibration = with_table(of_sizes(64, 64))
    assert allocate(calibration, 0.65, "uniform")["mlp0"] == pytest.approx(0.975)
    with pytest.raises(CatsparseError, match=r"it can be 0\.000 to 0\.633"):
        allocate(calibration, 0.65, "optimal")
    assert list(allocate(calibration, 2 / 3 * 0.95, "optimal").values()) == pytest.approx(
        [0.95] * 2
    )


def test_reach_with_a_preview() -> None:
    sites = of_sizes(64, preview=4).sites
    low = bytes_skipped(0.0, None, 4, 128, 2)
    assert low < 0
    assert check_reachable(sites, Read(4, False, 2), low) == {"mlp0": 0.0}
    assert check_reachable(sites, Read(4, False, 2), 0.8)["mlp0"] > 0.8
    with pytest.raises(CatsparseError, match="with a 4-bit preview deciding it can be"):
        check_reachable(sites, Read(4, False, 2), 1.0)


def test_unknown_allocation() -> None:
    with pytest.raises(CatsparseError, match="allocation must be one of uniform, greedy, optimal"):
        allocate(with_table(of_sizes(64)), 0.3, "best")


@pytest.mark.parametrize("allocation", ["greedy", "optimal"])
def test_missing_and_other_tables(allocation: str) -> None:
    calibration = of_sizes(64, 64)
    with pytest.raises(CatsparseError, match="needs sensitivities; set"):
        allocate(calibration, 0.3, allocation)
    with pytest.raises(CatsparseError, match="not with chess"):
        allocate(with_table(calibration), 0.3, allocation, method="chess")
    with pytest.raises(CatsparseError, match="uncompensated"):
        allocate(with_table(calibration), 0.3, allocation, compensate=False)
    with pytest.raises(CatsparseError, match="8-bit preview"):
        allocate(with_table(calibration, preview=8), 0.3, allocation)
    with pytest.raises(CatsparseError, match="lack mlp1"):
        allocate(with_table(calibration, {"mlp0": [0, 1, 2]}), 0.3, allocation)
