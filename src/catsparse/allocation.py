"""Allocation: the sparsity of each site, for a budget of weight bytes that are not read.

A site is a gated MLP or the input of linear layers. With ``uniform`` each skips the same share of
its bytes. The two others work from the measured table of
:mod:`catsparse.sensitivities`, on a fine grid of sparsities between 0 and the table's last:

* ``greedy`` (as TEAL, arXiv 2408.14690, algorithm 1, does within a block): from 0, raise the
  sparsity of the site that then costs least a byte, step by step;
* ``optimal``: the least sum of losses of all allocations that skip the bytes, by dynamic
  programming over sites and bytes. Where every curve is convex, greedy comes to the same.

Both take the loss of the whole model to be the sum of what each site costs alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import footprint
from .calibration import Calibration
from .config import ALLOCATIONS, PRODUCT, check_choice
from .errors import CatsparseError
from .inputs import InputSite
from .sites import Site

# Steps of sparsity an MLP may take, so many that none matters; fewer where there are many MLPs.
_MOST_STEPS, _FEWEST_STEPS = 200, 20
# Units that the skipped bytes are counted in by dynamic programming, at most.
_UNITS = 2**14


def allocate(
    calibration: Calibration,
    bytes_skipped: float,
    allocation: str = "optimal",
    method: str | None = None,
    compensate: bool = True,
    scope: str = "mlp",
) -> dict[str, float]:
    """The sparsity of each site such that together they skip ``bytes_skipped``.

    Needs no model, and about a second. (Where an activation is exactly zero, a ReLU's say, more is
    dropped than asked for, and more bytes are skipped.)

    Args:
        calibration: for ``greedy`` and ``optimal`` with ``sensitivities``, see
            :func:`catsparse.measure_sensitivities`.
        bytes_skipped: fraction of the sites' weight bytes that a decoded token is not to read; a
            preview's own bytes count as read.
        allocation: ``uniform``, ``greedy`` or ``optimal``.
        method, compensate: that the model is to be made sparse with; method None for
            :meth:`Calibration.default_method`.
        scope: ``mlp``, or ``all`` for all linear layers of the MLPs' blocks.

    Returns:
        Sparsity by site, for :func:`catsparse.sparsify`.

    Raises:
        CatsparseError: the bytes cannot be skipped, or the sensitivities are missing or were
            measured with something else.
    """
    method = calibration.default_method() if method is None else method
    of = calibration.provenance
    itemsize = footprint.weight_bytes(of.dtype, of.weights)
    read = Read(calibration.preview_of(method), method == PRODUCT, itemsize)
    check_choice("allocation", allocation, ALLOCATIONS)
    sites = calibration.parts(method, scope)
    table = calibration.sensitivities
    if allocation == "uniform":
        return check_reachable(sites, read, bytes_skipped)
    if table is None:
        raise CatsparseError(
            f"the allocation {allocation} needs sensitivities; set calibration.sensitivities = "
            "catsparse.measure_sensitivities(model, calibration, windows)"
        )
    table.require(method, compensate, read.preview, sites)
    most = table.sparsities[-1]
    check_reachable(sites, read, bytes_skipped, most)
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _UNITS // len(sites)))
    grid = torch.linspace(0.0, most, steps + 1, dtype=torch.float64)
    losses = torch.stack([table.curve(name, grid) for name in sites])
    sizes = [read.skippable(site) for site in sites.values()]
    total = sum(map(weights_of, sites.values()))
    wanted = (bytes_skipped - read.skipped(sites.values(), 0.0)) * total / most * steps
    solve = solve_greedily if allocation == "greedy" else solve_optimally
    levels = settle(losses, sizes, solve(losses, sizes, wanted), wanted)
    return {name: level / steps * most for name, level in zip(sites, levels, strict=True)}


def check_budget(
    sparsity: float | Mapping[str, float] | None,
    bytes_skipped: float | None,
    allocation: str,
    down_sparsity: float | None,
) -> None:
    """Refuse arguments of ``sparsify`` that contradict each other or would do nothing."""
    check_choice("allocation", allocation, ALLOCATIONS)
    if bytes_skipped is None:
        if allocation != "uniform":
            raise CatsparseError(f"the allocation {allocation} needs bytes_skipped, the budget")
    elif sparsity is not None:
        raise CatsparseError("give either sparsity or bytes_skipped, not both")
    elif down_sparsity is not None:
        raise CatsparseError(
            "bytes_skipped does not count a second decision; give sparsity with down_sparsity"
        )


@dataclass(frozen=True)
class Read:
    """What a decoded token reads but kept rows: a preview of so many bits, of the gate or of
    products, if one decides, else the gate itself; and the bytes of a weight."""

    preview: int | None
    of_products: bool
    itemsize: float

    def skippable(self, site: Site | InputSite) -> int:
        """Weights of the site that a sparsity of 1 would not read."""
        if isinstance(site, InputSite):
            return weights_of(site)
        return (2 if self.preview is None else 3) * site.hidden_size * site.intermediate_size

    def skipped(self, sites: Iterable[Site | InputSite], sparsity: float) -> float:
        """Fraction of the sites' weight bytes not read, at the same sparsity in all of them."""
        parts = [(weights_of(site), self._of(site, sparsity)) for site in sites]
        return sum(size * share for size, share in parts) / sum(size for size, _ in parts)

    def _of(self, site: Site | InputSite, sparsity: float) -> float:
        if isinstance(site, InputSite):
            return sparsity
        return footprint.bytes_skipped(
            *(sparsity, None, self.preview, site.hidden_size, self.itemsize),
            of_products=self.of_products,
        )


def check_reachable(
    sites: Mapping[str, Site | InputSite],
    read: Read,
    bytes_skipped: float,
    most: float = 1.0,
) -> dict[str, float]:
    """The sparsity of each site with which it skips ``bytes_skipped`` of its own weight bytes.

    Args:
        sites: gated MLPs and inputs.
        read: what is read besides kept rows.
        bytes_skipped: the budget.
        most: the highest sparsity that may be given; at 1 itself nothing would be left to keep.
            Below 1 the budget is that of all sites together, and sparsities above it stand for
            those that an allocation spreads otherwise.

    Raises:
        CatsparseError: no sparsities from 0 to ``most`` do.
    """
    each = [[site] for site in sites.values()] if most == 1.0 else [list(sites.values())]
    low = max(read.skipped(part, 0.0) for part in each)
    high = min(read.skipped(part, most) for part in each)
    if not low <= bytes_skipped <= high or (most == 1.0 and bytes_skipped == high):
        decided = "the exact gate" if read.preview is None else f"a {read.preview}-bit preview"
        mlps = any(isinstance(site, Site) for site in sites.values())
        by = f"with {decided} deciding it" if mlps else "it"
        raise CatsparseError(
            f"bytes_skipped is {bytes_skipped}; {by} can be {low:.3f} to "
            f"{'below ' if most == 1 else ''}{high:.3f}"
        )
    found = {}
    for name, site in sites.items():
        none, whole = (read.skipped([site], sparsity) for sparsity in (0.0, 1.0))
        found[name] = (bytes_skipped - none) / (whole - none)
    return found


def solve_greedily(losses: Tensor, sizes: list[int], wanted: float) -> list[int]:
    """Levels reached by raising, one step at a time, the MLP whose step costs least a byte.

    Args:
        losses: fp64 ``[L, K]``, never falling: each MLP's loss at each level.
        sizes: weights of each MLP.
        wanted: sum of level times size to reach, at most that of all at level K - 1.

    Returns:
        The level of each MLP; together they skip ``wanted`` or up to a step more.
    """
    rises = (losses.diff(dim=1) / torch.tensor(sizes, dtype=torch.float64)[:, None]).tolist()
    levels, reached = [0] * len(sizes), 0
    cheapest = [(rise[0], i) for i, rise in enumerate(rises)]
    heapq.heapify(cheapest)
    while reached < wanted * (1 - 1e-12) and cheapest:
        _, i = heapq.heappop(cheapest)
        levels[i] += 1
        reached += sizes[i]
        if levels[i] < len(rises[i]):
            heapq.heappush(cheapest, (rises[i][levels[i]], i))
    return levels


def solve_optimally(losses: Tensor, sizes: list[int], wanted: float) -> list[int]:
    """The levels of least total loss of all that reach ``wanted``; arguments as for the greedy.

    A knapsack to be filled at least: best[b], the least loss of the first MLPs that skip at least b
    units of bytes, from best[] without the last of them. Exact if the sizes' greatest common
    divisor is a good unit (always if they are equal); else sizes count in rounded units.
    """
    units = _whole_units(sizes, losses.shape[1] - 1)
    total = wanted / sum(sizes) * sum(units)
    target = max(0, math.ceil(total - 1e-9 * max(total, 1.0)))
    levels = torch.arange(losses.shape[1])
    budgets = torch.arange(target + 1)
    best = torch.full((target + 1,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for loss, unit in zip(losses, units, strict=True):
        before = (budgets - levels[:, None] * unit).clamp(min=0)
        best, chosen = (best[before] + loss[:, None]).min(dim=0)
        choices.append(chosen.tolist())
    found, left = [], target
    for chosen, unit in zip(reversed(choices), reversed(units), strict=True):
        found.append(chosen[left])
        left = max(0, left - chosen[left] * unit)
    return found[::-1]


def settle(losses: Tensor, sizes: list[int], levels: list[int], wanted: float) -> list[float]:
    """Move levels by fractions until ``wanted`` is met exactly, where that saves most or costs
    least; losses between levels are taken to be straight."""
    settled = [float(level) for level in levels]
    top = losses.shape[1] - 1
    for _ in range(len(sizes) * top):
        missing = wanted - sum(x * size for x, size in zip(settled, sizes, strict=True))
        up = missing > 0
        movable = [i for i, x in enumerate(settled) if (x < top if up else x > 0)]
        if abs(missing) <= 1e-9 * max(wanted, 1.0) or not movable:
            break

        def cost(i: int, up: bool = up) -> float:
            low = math.floor(settled[i]) if up else math.ceil(settled[i]) - 1
            rise = float(losses[i, low + 1] - losses[i, low]) / sizes[i]
            return rise if up else -rise

        i = min(movable, key=cost)
        room = (
            math.floor(settled[i]) + 1 - settled[i]
            if up
            else settled[i] - math.ceil(settled[i]) + 1
        )
        move = min(room, abs(missing) / sizes[i])
        settled[i] += move if up else -move
    return settled


def weights_of(site: Site | InputSite) -> int:
    """How many weights it has."""
    if isinstance(site, InputSite):
        return site.in_features * site.out_features
    return 3 * site.hidden_size * site.intermediate_size


def _whole_units(sizes: list[int], steps: int) -> list[int]:
    """Sizes as whole numbers, small enough that all MLPs at their last level are ``_UNITS``."""
    divisor = math.gcd(*sizes)
    if (whole := sum(sizes) // divisor * steps) <= max(_UNITS, len(sizes) * steps):
        return [size // divisor for size in sizes]
    scale = max(_UNITS, len(sizes) * steps) / whole
    return [max(1, round(size // divisor * scale)) for size in sizes]
