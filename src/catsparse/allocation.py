"""Allocation: the sparsity of each gated MLP, for a budget of weight bytes that are not read.

``uniform`` gives all the same. The two others work from the measured table of
:mod:`catsparse.sensitivities`, on a fine grid of sparsities between 0 and the table's last:

* ``greedy`` (as TEAL, arXiv 2408.14690, algorithm 1, does within a block): from 0, raise the
  sparsity of the MLP that then costs least a byte, step by step;
* ``optimal``: the least sum of losses of all allocations that skip the bytes, by dynamic
  programming over MLPs and bytes. Where every curve is convex, greedy comes to the same.

Both take the loss of the whole model to be the sum of what each MLP costs alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import footprint
from .calibration import Calibration
from .config import ALLOCATIONS, PRODUCT, check_choice
from .errors import CatsparseError
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
) -> dict[str, float]:
    """The sparsity of each gated MLP such that together they skip ``bytes_skipped``.

    Needs no model, and about a second. (Where an activation is exactly zero, a ReLU's say, more is
    dropped than asked for, and more bytes are skipped.)

    Args:
        calibration: for ``greedy`` and ``optimal`` with ``sensitivities``, see
            :func:`catsparse.measure_sensitivities`.
        bytes_skipped: fraction of the MLPs' weight bytes that a decoded token is not to read; a
            preview's own bytes count as read.
        allocation: ``uniform``, ``greedy`` or ``optimal``.
        method, compensate: that the model is to be made sparse with; method None for
            :meth:`Calibration.default_method`.

    Returns:
        Sparsity by site, for :func:`catsparse.sparsify`.

    Raises:
        CatsparseError: the bytes cannot be skipped, or the sensitivities are missing or were
            measured with something else.
    """
    sites = calibration.sites
    method = calibration.default_method() if method is None else method
    read = Read(calibration.preview, method == PRODUCT, item_size(calibration.provenance.dtype))
    check_choice("allocation", allocation, ALLOCATIONS)
    table = calibration.sensitivities
    if allocation == "uniform":
        sparsity = check_reachable(sites, read, bytes_skipped)
        return dict.fromkeys(sites, sparsity)
    if table is None:
        raise CatsparseError(
            f"the allocation {allocation} needs sensitivities; set calibration.sensitivities = "
            "catsparse.measure_sensitivities(model, calibration, windows)"
        )
    table.require(method, compensate, read.preview, sites)
    most = table.sparsities[-1]
    mean = check_reachable(sites, read, bytes_skipped, most)
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, _UNITS // len(sites)))
    grid = torch.linspace(0.0, most, steps + 1, dtype=torch.float64)
    losses = torch.stack([table.curve(name, grid) for name in sites])
    sizes = [_weights(site) for site in sites.values()]
    # Bytes rise by the same with the sparsity of every weight, so a budget is a mean of sparsities.
    wanted = mean / most * steps * sum(sizes)
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


def item_size(dtype: str) -> int:
    """Bytes of a weight, as ``SparsityConfig.bytes_skipped`` counts them."""
    return 4 if dtype.endswith("float32") else 2


@dataclass(frozen=True)
class Read:
    """What a decoded token reads but kept rows: a preview of so many bits, of the gate or of
    products, if one decides; and the bytes of a weight."""

    preview: int | None
    of_products: bool
    itemsize: int


def check_reachable(
    sites: Mapping[str, Site],
    read: Read,
    bytes_skipped: float,
    most: float = 1.0,
) -> float:
    """The sparsity that, the same in all ``sites``, skips ``bytes_skipped`` of their weight bytes.

    Args:
        sites: the gated MLPs.
        read: what is read besides kept rows.
        bytes_skipped: the budget.
        most: the highest sparsity that may be given; at 1 itself nothing would be left to keep.

    Raises:
        CatsparseError: no sparsity from 0 to ``most`` does.
    """
    size = sum(_weights(site) for site in sites.values())

    def skipped(sparsity: float) -> float:
        shares = (
            _weights(site)
            * footprint.bytes_skipped(
                *(sparsity, None, read.preview, site.hidden_size, read.itemsize),
                of_products=read.of_products,
            )
            for site in sites.values()
        )
        return sum(shares) / size

    low, high = skipped(0.0), skipped(most)
    sparsity = (bytes_skipped - low) / (high - low) * most
    if not 0.0 <= sparsity <= most or sparsity == 1.0:
        decided = "the exact gate" if read.preview is None else f"a {read.preview}-bit preview"
        raise CatsparseError(
            f"bytes_skipped is {bytes_skipped}; with {decided} deciding it can be {low:.3f} to "
            f"{'below ' if most == 1 else ''}{high:.3f}"
        )
    return sparsity


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


def _weights(site: Site) -> int:
    """A third of the MLP's weights."""
    return site.hidden_size * site.intermediate_size


def _whole_units(sizes: list[int], steps: int) -> list[int]:
    """Sizes as whole numbers, small enough that all MLPs at their last level are ``_UNITS``."""
    divisor = math.gcd(*sizes)
    if (whole := sum(sizes) // divisor * steps) <= max(_UNITS, len(sizes) * steps):
        return [size // divisor for size in sizes]
    scale = max(_UNITS, len(sizes) * steps) / whole
    return [max(1, round(size // divisor * scale)) for size in sizes]
