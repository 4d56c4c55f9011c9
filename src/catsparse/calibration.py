"""Calibration: what was counted at every site, its file, and thresholds for any sparsity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import (
    ACTIVATIONS,
    DEFAULT_METHOD,
    GATE_METHODS,
    INPUT_METHODS,
    METHODS,
    PRODUCT,
    SCOPES,
    Provenance,
    check_choice,
    check_down_sparsity,
    check_method,
    check_preview,
    check_sparsity,
)
from .errors import CatsparseError
from .files import write_atomic
from .inputs import InputSite, inputs_needed, select_parts
from .methods import SiteThreshold, input_threshold, product_threshold, site_threshold
from .products import ProductStatistics
from .sensitivities import Sensitivities, read_sensitivities
from .shards import sum_counts
from .sites import Site
from .statistics import InputStatistics, SiteStatistics
from .statistics_file import (
    read_inputs,
    read_products,
    read_statistics,
    statistics_tensors,
)
from .strict_json import build, parse_json, shorten


@dataclass(frozen=True)
class GateDecision:
    """The decision of the gate behind which products were gathered."""

    sparsity: float
    method: str


@dataclass
class Calibration:
    """Statistics of every site, from which thresholds for any sparsity follow at once.

    Attributes:
        sites: what was found in the model, by module name.
        statistics: what was counted there, on the CPU.
        provenance: data, tokens, sequence length, seed and dtype.
        preview: bits of the preview whose activations were counted; None for the gate's own.
        foretold: by site, the products that the preview foretells, for method ``product``; empty
            without a preview.
        products_at: the decision of the gate that ``products`` were gathered behind, or None.
        products: by site, what a second decision needs; empty without ``products_at``.
        sensitivities: what the sparsity of each site alone costs, if it was measured.
        inputs: what inputs of linear layers were counted, too, by name; see
            :func:`catsparse.inputs.find_inputs`.
        input_statistics: what was counted there, on the CPU.
    """

    sites: dict[str, Site]
    statistics: dict[str, SiteStatistics]
    provenance: Provenance
    preview: int | None = None
    products_at: GateDecision | None = None
    products: dict[str, ProductStatistics] = field(default_factory=dict)
    foretold: dict[str, ProductStatistics] = field(default_factory=dict)
    sensitivities: Sensitivities | None = None
    inputs: dict[str, InputSite] = field(default_factory=dict)
    input_statistics: dict[str, InputStatistics] = field(default_factory=dict)

    def parts(self, method: str, scope: str = "mlp") -> dict[str, Site | InputSite]:
        """What ``method`` decides on in ``scope``, by name: gated MLPs, inputs of linear layers.

        Raises:
            CatsparseError: the inputs it needs were not counted.
        """
        check_choice("method", method, METHODS)
        check_choice("scope", scope, SCOPES)
        wanted = inputs_needed(method, scope)
        needs = {"mlp": {True}, "attention": {False}, "all": {True, False}, None: set()}[wanted]
        if not needs <= {site.of_mlp for site in self.inputs.values()}:
            raise CatsparseError(
                f"the calibration has no statistics of inputs that method {method} needs with "
                f"scope {scope}; calibrate again with inputs={wanted!r}"
            )
        return select_parts(self.sites, self.inputs, method, scope)

    def preview_of(self, method: str) -> int | None:
        """Bits of the preview by which ``method`` decides: methods of inputs by none."""
        return None if method in INPUT_METHODS else self.preview

    def default_method(self, down_sparsity: float | None = None) -> str:
        """``product`` if a preview was calibrated and no second decision is wanted, else
        ``energy``."""
        return PRODUCT if self.foretold and down_sparsity is None else DEFAULT_METHOD

    def thresholds(
        self,
        sparsity: float | Mapping[str, float],
        method: str | None = None,
        compensate: bool = True,
        down_sparsity: float | None = None,
        scope: str = "mlp",
    ) -> dict[str, SiteThreshold]:
        """Thresholds and means for each site, without touching the model.

        Args:
            sparsity: fraction of neurons that the (first) decision drops, and of inputs, or one for
                each of :meth:`parts` by name.
            method: ``cats``, ``chess``, ``energy``, or ``product``, which needs a preview; or
                ``teal`` or ``wina``, which decide on the inputs of linear layers; None for
                :meth:`default_method`.
            compensate: whether to give means.
            down_sparsity: fraction of W_down's rows not read, at least ``sparsity``: a second
                decision, from products gathered at this very sparsity (the same at every site) and
                method. None for none.
            scope: ``mlp``, or ``all``: also the inputs of the other linear layers of the MLPs'
                blocks, attention's; by ``teal``, unless the method is one of inputs.

        Raises:
            CatsparseError: a sparsity is out of range or missing, the method unknown, or the
                calibration has not what it or ``down_sparsity`` needs.
        """
        method = self.default_method(down_sparsity) if method is None else method
        check_method(method, self.preview_of(method), down_sparsity)
        parts = self.parts(method, scope)
        wanted = _by_site(sparsity, parts)
        if down_sparsity is not None:
            self._check_products(sparsity, method, down_sparsity)
        return {
            name: self._input_threshold(name, method, wanted[name], compensate)
            if isinstance(part, InputSite)
            else self._site_threshold(name, method, wanted[name], compensate, down_sparsity)
            for name, part in parts.items()
        }

    def _input_threshold(
        self, name: str, method: str, sparsity: float, compensate: bool
    ) -> SiteThreshold:
        if method not in INPUT_METHODS:  # attention's, beside neurons
            # Means of inputs cost quality (docs/quality.md), so they are given only if asked for.
            method, compensate = INPUT_METHODS[0], False
        return input_threshold(self.input_statistics[name], method, sparsity, compensate)

    def _site_threshold(
        self,
        name: str,
        method: str,
        sparsity: float,
        compensate: bool,
        down_sparsity: float | None,
    ) -> SiteThreshold:
        if method == PRODUCT:
            if not self.foretold:
                raise CatsparseError(
                    "the calibration was made before there was method product; calibrate again "
                    f"with preview={self.preview}"
                )
            return product_threshold(self.foretold[name], sparsity, compensate)
        products = None if down_sparsity is None else self.products[name]
        return site_threshold(
            self.statistics[name], method, sparsity, compensate, products, down_sparsity or 0.0
        )

    def _check_products(
        self, sparsity: float | Mapping[str, float], method: str, down_sparsity: float
    ) -> None:
        if isinstance(sparsity, Mapping):
            raise CatsparseError(
                "down_sparsity needs products gathered at one sparsity; give the same for all sites"
            )
        check_down_sparsity(down_sparsity, sparsity)
        if self.products_at != GateDecision(sparsity, method):
            there = self.products_at
            has = f"behind {there.method} at {there.sparsity}" if there else "none"
            raise CatsparseError(
                f"down_sparsity needs the calibration's products behind {method} at {sparsity} (it "
                f"has {has}); calibrate again with products_at={sparsity}, method={method!r}"
            )

    def __add__(self, other: Calibration) -> Calibration:
        """As if both runs' tokens had been seen in one; sites, preview and what the products were
        gathered behind must be the same. (Each run's products are behind its own thresholds.) The
        sum has no sensitivities: its thresholds are others."""
        if (self.sites, self.inputs) != (other.sites, other.inputs):
            raise CatsparseError("calibrations of different models cannot be added")
        first, second = (
            (c.preview, c.products_at, c.foretold.keys() == c.sites.keys()) for c in (self, other)
        )
        if first != second:
            raise CatsparseError(
                "calibrations cannot be added unless preview, products_at and its method are the "
                "same; calibrate one of them again"
            )
        merged = {name: s + other.statistics[name] for name, s in self.statistics.items()}
        products = {name: p + other.products[name] for name, p in self.products.items()}
        foretold = {name: p + other.foretold[name] for name, p in self.foretold.items()}
        inputs = {
            name: s + other.input_statistics[name] for name, s in self.input_statistics.items()
        }
        one, two = self.provenance, other.provenance
        data = one.data if one.data == two.data else f"{one.data} + {two.data}"
        provenance = replace(one, data=data, tokens=one.tokens + two.tokens)
        return replace(
            self,
            sites=dict(self.sites),
            statistics=merged,
            provenance=provenance,
            products=products,
            foretold=foretold,
            sensitivities=None,
            inputs=dict(self.inputs),
            input_statistics=inputs,
        )

    def sum_over_processes(self, group: Any = None) -> Calibration:
        """Add up, as ``+`` does, what the processes of ``group`` (None for all) counted, each on
        its own data with a whole copy of the model. Each must call it, and all get the sum.

        Raises:
            CatsparseError: they cannot be added; every process raises it.
        """
        kind = self.sites, self.inputs, self.preview, self.products_at, [*self.foretold]
        others: list[Any] = [None] * torch.distributed.get_world_size(group)
        mine = repr(kind), self.provenance.data, self.provenance.tokens
        torch.distributed.all_gather_object(others, mine, group=group)
        if len({seen for seen, _, _ in others}) > 1:
            raise CatsparseError(
                "the processes' calibrations are not of the same model, preview and products_at; "
                "calibrate all of them alike"
            )
        data = " + ".join(dict.fromkeys(name for _, name, _ in others))
        tokens = sum(count for _, _, count in others)
        return replace(
            self,
            statistics=sum_counts(self.statistics, group),
            provenance=replace(self.provenance, data=data, tokens=tokens),
            products=sum_counts(self.products, group),
            foretold=sum_counts(self.foretold, group),
            sensitivities=None,
            input_statistics=sum_counts(self.input_statistics, group),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every statistic under ``<site>.<field>``, as stored in ``calibration.safetensors``."""
        tensors = statistics_tensors(
            self.statistics, self.products, self.foretold, self.input_statistics
        )
        return tensors | (self.sensitivities.tensors() if self.sensitivities else {})

    def metadata(self) -> dict[str, str]:
        """Header of ``calibration.safetensors``: sites, token counts and provenance as JSON, and
        preview, foretold, products_at, inputs and sensitivities where there are any."""
        extra: dict[str, str] = self.sensitivities.metadata() if self.sensitivities else {}
        if self.preview is not None:
            extra["catsparse.preview"] = json.dumps(self.preview)
        if self.foretold:
            extra["catsparse.foretold"] = json.dumps(True)
        if self.products_at is not None:
            extra["catsparse.products_at"] = json.dumps(asdict(self.products_at))
        if self.inputs:
            extra["catsparse.inputs"] = json.dumps([asdict(site) for site in self.inputs.values()])
            counted = {name: s.tokens for name, s in self.input_statistics.items()}
            extra["catsparse.input_tokens"] = json.dumps(counted)
        return extra | {
            "catsparse.sites": json.dumps([asdict(site) for site in self.sites.values()]),
            "catsparse.tokens": json.dumps({n: s.tokens for n, s in self.statistics.items()}),
            "catsparse.provenance": json.dumps(asdict(self.provenance)),
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors, metadata = self.tensors(), self.metadata()
        write_atomic(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read and check what :meth:`save` wrote.

        Raises:
            CatsparseError: not a calibration, or a tensor is missing or of the wrong shape.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                part = {
                    key: parse_json(metadata[f"catsparse.{key}"], key)
                    for key in ("sites", "tokens", "provenance")
                }
                if not isinstance(part["sites"], list) or not isinstance(part["tokens"], dict):
                    raise CatsparseError("its header is that of another file")
                sites = [build(Site, raw, "site") for raw in part["sites"]]
                for site in sites:
                    check_choice(f"act of {shorten(site.name)}", site.act, ACTIVATIONS)
                of = part["provenance"]
                if isinstance(of, dict):  # older ones do not say
                    of = {"weights": None, **of}
                provenance = build(Provenance, of, "provenance")
                preview, foretells = _read_preview(metadata), _read_foretold(metadata)
                products_at = _read_products_at(metadata)
                statistics = {
                    site.name: read_statistics(file, site, part["tokens"][site.name])
                    for site in sites
                }
                products, foretold = (
                    {
                        site.name: read_products(file, site, part["tokens"][site.name], kind)
                        for site in sites
                        if there
                    }
                    for kind, there in (
                        ("product", products_at is not None),
                        ("foretold", foretells),
                    )
                )
                found = {site.name: site for site in sites}
                parts = (preview, products_at, products, foretold, None)
                calibration = cls(
                    *(found, statistics, provenance, *parts), *_read_inputs(file, metadata)
                )
                calibration.sensitivities = read_sensitivities(
                    metadata, file.get_tensor, calibration.parts, calibration.preview_of
                )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CatsparseError(
                f"{path} is not a readable calibration ({shorten(error, 300)}); calibrate again"
            ) from error
        if not sites:
            raise CatsparseError(f"{path} holds no site; calibrate again")
        return calibration


def _by_site(
    sparsity: float | Mapping[str, float], parts: Mapping[str, Site | InputSite]
) -> Mapping[str, float]:
    if not isinstance(sparsity, Mapping):
        check_sparsity(sparsity)
        return dict.fromkeys(parts, sparsity)
    if odd := sorted(sparsity.keys() ^ parts.keys()):
        raise CatsparseError(
            "sparsity by site must name the calibration's sites, each once; "
            f"{shorten(odd[0])} is {'not one' if odd[0] in sparsity else 'missing'}"
        )
    for value in sparsity.values():
        check_sparsity(value)
    return sparsity


def _read_preview(metadata: dict[str, str]) -> int | None:
    preview = parse_json(metadata.get("catsparse.preview", "null"), "preview")
    check_preview(preview)  # type: ignore[arg-type]
    return preview  # type: ignore[return-value]


def _read_foretold(metadata: dict[str, str]) -> bool:
    """Whether there are products foretold; a file older than method ``product`` has none."""
    value = parse_json(metadata.get("catsparse.foretold", "false"), "foretold")
    if not isinstance(value, bool) or (value and "catsparse.preview" not in metadata):
        raise CatsparseError("its header says nothing sensible of products foretold")
    return value


def _read_products_at(metadata: dict[str, str]) -> GateDecision | None:
    if "catsparse.products_at" not in metadata:
        return None
    raw = parse_json(metadata["catsparse.products_at"], "products_at")
    decision: GateDecision = build(GateDecision, raw, "products_at")
    check_sparsity(decision.sparsity)
    check_choice("method", decision.method, GATE_METHODS)
    return decision


def _read_inputs(
    file: Any, metadata: dict[str, str]
) -> tuple[dict[str, InputSite], dict[str, InputStatistics]]:
    raw = parse_json(metadata.get("catsparse.inputs", "[]"), "inputs")
    tokens = parse_json(metadata.get("catsparse.input_tokens", "{}"), "input_tokens")
    if not isinstance(raw, list) or not isinstance(tokens, dict):
        raise CatsparseError("its header says nothing sensible of inputs")
    sites: list[InputSite] = [build(InputSite, part, "input") for part in raw]
    found = {site.name: site for site in sites}
    return found, {name: read_inputs(file, site, tokens[name]) for name, site in found.items()}
