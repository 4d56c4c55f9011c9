"""What is compared: methods, compensation, allocations, budgets and formats of weights, and whether
the budgets can be met."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..allocation import Read, check_reachable
from ..config import (
    ALLOCATIONS,
    INPUT_METHODS,
    METHODS,
    PRODUCT,
    SCOPES,
    WEIGHTS,
    check_choice,
    check_method,
    check_preview,
)
from ..errors import CatsparseError
from ..footprint import weight_bytes
from ..inputs import find_inputs, inputs_needed, select_parts
from ..probing import GRID
from ..quantized_linear import weights_of_model
from ..sites import require_sites

# The method of a setting that drops nothing: what packed weights cost by themselves.
DENSE = "dense"
# What the exact gate skips when it drops 50, 70 and 90% of the neurons.
BYTES_SKIPPED = (0.333, 0.467, 0.6)


@dataclass(frozen=True)
class Setting:
    """One way to run the model: ``preview`` is None where the exact gate decides, ``weights`` where
    the model's own are read, ``method`` ``dense`` where every neuron is kept."""

    method: str
    compensate: bool
    preview: int | None
    allocation: str
    bytes_skipped: float
    scope: str = "mlp"
    weights: str | None = None


def make_settings(
    methods: Sequence[str] = METHODS,
    compensate: Sequence[bool] = (False, True),
    allocations: Sequence[str] = ("uniform",),
    bytes_skipped: Sequence[float] = BYTES_SKIPPED,
    preview: int = 4,
    scope: str = "mlp",
    weights: Sequence[str] = (),
) -> list[Setting]:
    """Every combination, each once.

    With packed ``weights`` all is repeated on these, dense beside it; left out is what they cannot
    run: methods of inputs and, on int4, which is its own preview, ``product``.

    Args:
        methods: of ``cats``, ``chess``, ``energy``, ``product``, ``teal`` and ``wina``.
        compensate: with means in the dropped neurons' (or inputs') place, without, or both.
        allocations: of ``uniform``, ``greedy`` and ``optimal``.
        bytes_skipped: budgets, fractions of the scope's weight bytes.
        preview: bits of the preview by which ``product`` decides.
        scope: ``mlp`` or ``all`` linear layers.
        weights: formats beside the model's own weights: of ``int8``, ``fp8`` and ``int4``.

    Raises:
        CatsparseError: an unknown method, allocation or format, another number of bits, nothing at
            all, or packed weights with scope ``all``.
    """
    check_preview(preview)
    check_choice("scope", scope, SCOPES)
    for method in methods:
        check_method(method, preview if method == PRODUCT else None, None)
    for allocation in allocations:
        check_choice("allocation", allocation, ALLOCATIONS)
    for name in weights:
        check_choice("weights", name, WEIGHTS)
    if weights and scope != "mlp":
        raise CatsparseError(
            "on packed weights the gated MLPs alone are made sparse; compare with scope mlp"
        )
    sparse = [
        Setting(
            *(method, compensated, preview if method == PRODUCT else None, allocation, budget),
            scope=scope,
        )
        for method, compensated, allocation, budget in itertools.product(
            methods, compensate, allocations, bytes_skipped
        )
    ]
    if not sparse:
        raise CatsparseError("there is nothing to compare; name a method and a budget at least")
    settings = list(dict.fromkeys(sparse))
    if weights:
        dense = Setting(DENSE, False, None, "uniform", 0.0)
        settings = [
            replace(s, weights=of)
            for of in dict.fromkeys((None, *weights))
            for s in (dense, *settings)
            if of is None or _runs_packed(s, of)
        ]
    return settings


def _runs_packed(s: Setting, weights: str) -> bool:
    return s.method not in INPUT_METHODS and not (weights == "int4" and s.preview is not None)


def check_settings(model: Any, settings: Sequence[Setting]) -> None:
    """Refuse, before any work, a budget that one of the settings cannot reach on ``model``.

    Raises:
        CatsparseError: there is one, or the model has no gated MLP, is sparse already, or is packed
            and to be packed.
    """
    sites = {site.name: site for site in require_sites(model)}
    needed = any(inputs_needed(s.method, s.scope) for s in settings)
    inputs = find_inputs(model, list(sites.values())) if needed else []
    shared = {site.name: site for site in inputs}
    own = weights_of_model(model)
    if own is not None and any(s.weights for s in settings):
        raise CatsparseError(
            f"the model's weights are packed in {own} already; compare formats on the float model"
        )
    for s in settings:
        if s.method == DENSE:
            continue
        itemsize = weight_bytes(str(model.dtype), s.weights or own)
        most = 1.0 if s.allocation == "uniform" else GRID[-1]
        parts = select_parts(sites, shared, s.method, s.scope)
        read = Read(s.preview, s.method == PRODUCT, itemsize)
        try:
            check_reachable(parts, read, s.bytes_skipped, most)
        except CatsparseError as error:
            spread = "" if s.allocation == "uniform" else f", {s.allocation}"
            raise CatsparseError(f"method {s.method}{spread}: {error}") from error
