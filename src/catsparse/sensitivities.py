"""The table of sensitivities: what the sparsity of each gated MLP alone costs the whole model.

Measured by :mod:`catsparse.probing`, kept in the calibration's file, and all that
:mod:`catsparse.allocation` needs to solve any budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .config import METHODS, check_choice, check_preview
from .errors import CatsparseError
from .strict_json import build, parse_json, shorten

KEY = "catsparse.sensitivities"  # of the file's metadata


@dataclass(frozen=True)
class Sensitivities:
    """Loss of the whole model with one site, gated MLP or input, sparse and all others dense.

    Attributes:
        method, compensate, preview, scope: how that site was made sparse, and what sites there are.
            The table says nothing of others.
        tokens: tokens that each loss is a mean over.
        sparsities: the grid, rising, between 0 and 1 (G numbers).
        losses: by site ``[G]`` fp64, KL(dense || sparse) in nats a token at each of them.

    Raises:
        CatsparseError: a field is out of its range or does not fit the others.
    """

    method: str
    compensate: bool
    preview: int | None
    tokens: int
    sparsities: tuple[float, ...]
    losses: dict[str, Tensor]
    scope: str = "mlp"

    def __post_init__(self) -> None:
        check_choice("the sensitivities' method", self.method, METHODS)
        check_preview(self.preview)
        check_grid(self.sparsities)
        if self.tokens < 1:
            raise CatsparseError("sensitivities must be means over at least one token")
        for name, loss in self.losses.items():
            if loss.dtype != torch.float64 or tuple(loss.shape) != (len(self.sparsities),):
                raise CatsparseError(
                    f"the sensitivities of {shorten(name)} are {loss.dtype} {list(loss.shape)}, "
                    f"not float64 [{len(self.sparsities)}]"
                )
            if not bool(loss.isfinite().all()) or bool((loss < 0).any()):
                raise CatsparseError(
                    f"the sensitivities of {shorten(name)} must be finite and not negative"
                )

    def curve(self, name: str, at: Tensor) -> Tensor:
        """The site's loss at any sparsity up to the grid's last.

        Between the points of the grid, and (0, 0), by a cubic that rises wherever they do; where
        noise makes a loss smaller than one at a lower sparsity, it counts as equal. What is no loss
        of sparsity is taken off: in bf16 any change, however small, alters the rounding of all that
        follows. A loss rises at least with the square of a small sparsity, so of the first point's
        what goes beyond that is such a floor.

        Args:
            name: the site.
            at: sparsities, 1-d fp64.

        Returns:
            fp64, as ``at``; never falling in it.
        """
        zero = torch.zeros(1, dtype=torch.float64)
        x = torch.cat([zero, torch.tensor(self.sparsities, dtype=torch.float64)])
        y = torch.cat([zero, self.losses[name].cummax(0).values])
        if len(x) > 2:
            floor = y[1] - y[2] * (x[1] / x[2]) ** 2
            y = (y - floor.clamp(min=0)).clamp(min=0)
        return interpolate(x, y, at)

    def require(
        self, method: str, compensate: bool, preview: int | None, sites: Iterable[str]
    ) -> None:
        """Refuse to be used for what was not measured.

        Raises:
            CatsparseError: another method, compensation or preview, or other sites.
        """
        here, wanted = (self.method, self.compensate, self.preview), (method, compensate, preview)
        if here != wanted:
            raise CatsparseError(
                f"the sensitivities were measured with {_described(*here)}, not with "
                f"{_described(*wanted)}; measure them again"
            )
        if missing := [name for name in sites if name not in self.losses]:
            raise CatsparseError(
                f"the sensitivities lack {shorten(missing[0])}; measure them on this model"
            )

    def tensors(self) -> dict[str, Tensor]:
        """``<site>.sensitivity``, as stored in ``calibration.safetensors``."""
        return {f"{name}.sensitivity": loss for name, loss in self.losses.items()}

    def metadata(self) -> dict[str, str]:
        """The rest, as JSON; the preview is the calibration's own."""
        header = {
            "method": self.method,
            "compensate": self.compensate,
            "scope": self.scope,
            "tokens": self.tokens,
            "sparsities": list(self.sparsities),
        }
        return {KEY: json.dumps(header)}


@dataclass(frozen=True)
class _Header:
    method: str
    compensate: bool
    scope: str
    tokens: int


def read_sensitivities(
    metadata: dict[str, str],
    tensor: Callable[[str], Tensor],
    sites: Callable[[str, str], Iterable[str]],
    preview: Callable[[str], int | None],
) -> Sensitivities | None:
    """What a calibration's file holds; None if it was saved without.

    Args:
        metadata: of the file.
        tensor: gives a tensor of the file by its key.
        sites, preview: the calibration's, by method and scope, and by method.

    Raises:
        CatsparseError: the table is damaged.
    """
    if KEY not in metadata:
        return None
    raw = parse_json(metadata[KEY], "sensitivities")
    grid = raw.pop("sparsities", None) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(grid, list):
        raise CatsparseError("the sensitivities lack their sparsities")
    # The oldest files know of no scope.
    header: _Header = build(_Header, {"scope": "mlp"} | raw, "sensitivities")
    return Sensitivities(
        header.method,
        header.compensate,
        preview(header.method),
        header.tokens,
        tuple(grid),
        {name: tensor(f"{name}.sensitivity") for name in sites(header.method, header.scope)},
        header.scope,
    )


def check_grid(sparsities: tuple[float, ...]) -> None:
    """
    Raises:
        CatsparseError: not rising numbers between 0 and 1.
    """
    numbers = all(type(s) in (int, float) for s in sparsities)
    if not sparsities or not numbers or not all(a < b for a, b in pairwise((0, *sparsities, 1))):
        raise CatsparseError(
            "the sparsities to measure at must rise and lie between 0 and 1, not "
            f"{shorten(list(sparsities))}"
        )


def interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Monotone cubic Hermite interpolation.

    Slopes are those of PCHIP: at an inner point the weighted harmonic mean of its two secants
    (Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5, 1984), at an end that of the parabola
    through three points. None is negative or above three times a secant beside it, so the curve
    falls nowhere (Fritsch and Carlson, SIAM J. Numer. Anal. 17, 1980).

    Args:
        x: fp64 ``[N]``, rising, N >= 2.
        y: fp64 ``[N]``, never falling.
        at: fp64 ``[M]`` within ``x``.

    Returns:
        fp64 ``[M]``.
    """
    step = x.diff()
    secant = y.diff() / step
    before, after = secant[:-1], secant[1:]
    one, two = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    inner = (one + two) / (one / before + two / after)  # 0 beside a flat piece: 1 / inf
    first, last = _end_slope(step, secant), _end_slope(step.flip(0), secant.flip(0))
    slope = torch.cat([first, inner, last])
    i = (torch.searchsorted(x, at.contiguous(), right=True) - 1).clamp(0, len(step) - 1)
    h, t = step[i], (at - x[i]) / step[i]
    rest = 1 - t
    ends = y[i] * (1 + 2 * t) * rest**2 + y[i + 1] * (3 - 2 * t) * t**2
    return ends + h * t * rest * (slope[i] * rest - slope[i + 1] * t)


def _end_slope(step: Tensor, secant: Tensor) -> Tensor:
    if len(step) == 1:
        return secant
    parabola = secant[0] + (secant[0] - secant[1]) * step[0] / (step[0] + step[1])
    # Below twice the secant, as the next one is not negative.
    return parabola.clamp(min=0.0).view(1)


def _described(method: str, compensate: bool, preview: int | None) -> str:
    words = [method, "compensated" if compensate else "uncompensated"]
    words += [] if preview is None else [f"{preview}-bit preview"]
    return ", ".join(words)
