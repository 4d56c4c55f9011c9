"""What is compared: methods, compensation, allocations and budgets, and whether they can be met."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..allocation import Read, check_reachable, item_size
from ..config import ALLOCATIONS, METHODS, PRODUCT, check_choice, check_method, check_preview
from ..errors import CatsparseError
from ..observation import require_sites
from ..probing import GRID

# What the exact gate skips when it drops 50, 70 and 90% of the neurons.
BYTES_SKIPPED = (0.333, 0.467, 0.6)


@dataclass(frozen=True)
class Setting:
    """One way to make the model sparse; ``preview`` is None where the exact gate decides."""

    method: str
    compensate: bool
    preview: int | None
    allocation: str
    bytes_skipped: float


def make_settings(
    methods: Sequence[str] = METHODS,
    compensate: Sequence[bool] = (False, True),
    allocations: Sequence[str] = ("uniform",),
    bytes_skipped: Sequence[float] = BYTES_SKIPPED,
    preview: int = 4,
) -> list[Setting]:
    """Every combination, each once.

    Args:
        methods: of ``cats``, ``chess``, ``energy`` and ``product``.
        compensate: with means in the dropped neurons' place, without, or both.
        allocations: of ``uniform``, ``greedy`` and ``optimal``.
        bytes_skipped: budgets, fractions of the MLPs' weight bytes.
        preview: bits of the preview by which ``product`` decides.

    Raises:
        CatsparseError: an unknown method or allocation, another number of bits, or nothing at all.
    """
    check_preview(preview)
    for method in methods:
        check_method(method, preview, None)
    for allocation in allocations:
        check_choice("allocation", allocation, ALLOCATIONS)
    settings = [
        Setting(method, compensated, preview if method == PRODUCT else None, allocation, budget)
        for method, compensated, allocation, budget in itertools.product(
            methods, compensate, allocations, bytes_skipped
        )
    ]
    if not settings:
        raise CatsparseError("there is nothing to compare; name a method and a budget at least")
    return list(dict.fromkeys(settings))


def check_settings(model: Any, settings: Sequence[Setting]) -> None:
    """Refuse, before any work, a budget that one of the settings cannot reach on ``model``.

    Raises:
        CatsparseError: there is one, or the model has no gated MLP or is sparse already.
    """
    sites = {site.name: site for site in require_sites(model)}
    itemsize = item_size(str(model.dtype))
    for s in settings:
        most = 1.0 if s.allocation == "uniform" else GRID[-1]
        try:
            check_reachable(
                sites, Read(s.preview, s.method == PRODUCT, itemsize), s.bytes_skipped, most
            )
        except CatsparseError as error:
            spread = "" if s.allocation == "uniform" else f", {s.allocation}"
            raise CatsparseError(f"method {s.method}{spread}: {error}") from error
