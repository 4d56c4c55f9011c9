"""What is compared: methods, compensation, allocations and budgets, and whether they can be met."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..allocation import Read, check_reachable
from ..config import (
    ALLOCATIONS,
    METHODS,
    PRODUCT,
    SCOPES,
    check_choice,
    check_method,
    check_preview,
)
from ..errors import CatsparseError
from ..footprint import weight_bytes
from ..inputs import find_inputs, inputs_needed, select_parts
from ..probing import GRID
from ..quantized import weights_of_model
from ..sites import require_sites

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
    scope: str = "mlp"


def make_settings(
    methods: Sequence[str] = METHODS,
    compensate: Sequence[bool] = (False, True),
    allocations: Sequence[str] = ("uniform",),
    bytes_skipped: Sequence[float] = BYTES_SKIPPED,
    preview: int = 4,
    scope: str = "mlp",
) -> list[Setting]:
    """Every combination, each once.

    Args:
        methods: of ``cats``, ``chess``, ``energy``, ``product``, ``teal`` and ``wina``.
        compensate: with means in the dropped neurons' (or inputs') place, without, or both.
        allocations: of ``uniform``, ``greedy`` and ``optimal``.
        bytes_skipped: budgets, fractions of the scope's weight bytes.
        preview: bits of the preview by which ``product`` decides.
        scope: ``mlp`` or ``all`` linear layers.

    Raises:
        CatsparseError: an unknown method or allocation, another number of bits, or nothing at all.
    """
    check_preview(preview)
    check_choice("scope", scope, SCOPES)
    for method in methods:
        check_method(method, preview if method == PRODUCT else None, None)
    for allocation in allocations:
        check_choice("allocation", allocation, ALLOCATIONS)
    settings = [
        Setting(
            *(method, compensated, preview if method == PRODUCT else None, allocation, budget),
            scope=scope,
        )
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
    needed = any(inputs_needed(s.method, s.scope) for s in settings)
    inputs = find_inputs(model, list(sites.values())) if needed else []
    shared = {site.name: site for site in inputs}
    itemsize = weight_bytes(str(model.dtype), weights_of_model(model))
    for s in settings:
        most = 1.0 if s.allocation == "uniform" else GRID[-1]
        parts = select_parts(sites, shared, s.method, s.scope)
        read = Read(s.preview, s.method == PRODUCT, itemsize)
        try:
            check_reachable(parts, read, s.bytes_skipped, most)
        except CatsparseError as error:
            spread = "" if s.allocation == "uniform" else f", {s.allocation}"
            raise CatsparseError(f"method {s.method}{spread}: {error}") from error
