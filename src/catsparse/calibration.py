"""Calibration: what was counted at every site, its file, and thresholds for any sparsity."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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
    PRODUCT,
    Provenance,
    check_choice,
    check_down_sparsity,
    check_method,
    check_preview,
    check_sparsity,
)
from .errors import CatsparseError
from .files import write_atomic
from .methods import SiteThreshold, product_threshold, site_threshold
from .products import ProductStatistics
from .sensitivities import Sensitivities, read_sensitivities
from .sites import Site
from .statistics import BINS, BUCKETS, SiteStatistics
from .strict_json import build, parse_json, shorten

# A statistics field: (dtype, shape as a function of the number of neurons).
_Fields = dict[str, tuple[torch.dtype, Callable[[int], tuple[int, ...]]]]
_FIELDS: _Fields = {
    "histogram": (torch.int64, lambda neurons: (BINS,)),
    "gate_square": (torch.float64, lambda neurons: (neurons,)),
    "up_square": (torch.float64, lambda neurons: (neurons,)),
    "bucket_count": (torch.int32, lambda neurons: (BUCKETS, neurons)),
    "bucket_sum": (torch.float32, lambda neurons: (BUCKETS, neurons)),
}
_PRODUCT_FIELDS: _Fields = {  # as ``product_...`` and ``foretold_...``, but for the norm
    "histogram": _FIELDS["histogram"],
    "bucket_count": _FIELDS["bucket_count"],
    "bucket_sum": _FIELDS["bucket_sum"],
    "down_norm": (torch.float32, lambda neurons: (neurons,)),
}


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
    """

    sites: dict[str, Site]
    statistics: dict[str, SiteStatistics]
    provenance: Provenance
    preview: int | None = None
    products_at: GateDecision | None = None
    products: dict[str, ProductStatistics] = field(default_factory=dict)
    foretold: dict[str, ProductStatistics] = field(default_factory=dict)
    sensitivities: Sensitivities | None = None

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
    ) -> dict[str, SiteThreshold]:
        """Thresholds and means for each site, without touching the model.

        Args:
            sparsity: fraction of neurons that the (first) decision drops, or one for each site by
                name.
            method: ``cats``, ``chess``, ``energy``, or ``product``, which needs a preview; None for
                :meth:`default_method`.
            compensate: whether to give means.
            down_sparsity: fraction of W_down's rows not read, at least ``sparsity``: a second
                decision, from products gathered at this very sparsity (the same at every site) and
                method. None for none.

        Raises:
            CatsparseError: a sparsity is out of range or missing, the method unknown, or the
                calibration has not what it or ``down_sparsity`` needs.
        """
        wanted = self._by_site(sparsity)
        method = self.default_method(down_sparsity) if method is None else method
        check_method(method, self.preview, down_sparsity)
        if method == PRODUCT:
            if not self.foretold:
                raise CatsparseError(
                    "the calibration was made before there was method product; calibrate again "
                    f"with preview={self.preview}"
                )
            return {
                name: product_threshold(foretold, wanted[name], compensate)
                for name, foretold in self.foretold.items()
            }
        if down_sparsity is None:
            return {
                name: site_threshold(statistics, method, wanted[name], compensate)
                for name, statistics in self.statistics.items()
            }
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
        return {
            name: site_threshold(
                statistics, method, sparsity, compensate, self.products[name], down_sparsity
            )
            for name, statistics in self.statistics.items()
        }

    def _by_site(self, sparsity: float | Mapping[str, float]) -> Mapping[str, float]:
        if not isinstance(sparsity, Mapping):
            check_sparsity(sparsity)
            return dict.fromkeys(self.sites, sparsity)
        if odd := sorted(sparsity.keys() ^ self.sites.keys()):
            raise CatsparseError(
                "sparsity by site must name the calibration's sites, each once; "
                f"{shorten(odd[0])} is {'not one' if odd[0] in sparsity else 'missing'}"
            )
        for value in sparsity.values():
            check_sparsity(value)
        return sparsity

    def __add__(self, other: Calibration) -> Calibration:
        """As if both runs' tokens had been seen in one; sites, preview and what the products were
        gathered behind must be the same. (Each run's products are behind its own thresholds.) The
        sum has no sensitivities: its thresholds are others."""
        if self.sites != other.sites:
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
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every statistic under ``<site>.<field>``, as stored in ``calibration.safetensors``."""
        tensors = {
            f"{name}.{field}": getattr(statistics, field)
            for name, statistics in self.statistics.items()
            for field in _FIELDS
        }
        for kind, by_site in (("product", self.products), ("foretold", self.foretold)):
            tensors |= {
                f"{name}.{_product_key(kind, field)}": getattr(products, field)
                for name, products in by_site.items()
                for field in _PRODUCT_FIELDS
            }
        return tensors | (self.sensitivities.tensors() if self.sensitivities else {})

    def metadata(self) -> dict[str, str]:
        """Header of ``calibration.safetensors``: sites, token counts and provenance as JSON, and
        preview, foretold, products_at and sensitivities where there are any."""
        extra: dict[str, str] = self.sensitivities.metadata() if self.sensitivities else {}
        if self.preview is not None:
            extra["catsparse.preview"] = json.dumps(self.preview)
        if self.foretold:
            extra["catsparse.foretold"] = json.dumps(True)
        if self.products_at is not None:
            extra["catsparse.products_at"] = json.dumps(asdict(self.products_at))
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
                provenance = build(Provenance, part["provenance"], "provenance")
                preview, foretells = _read_preview(metadata), _read_foretold(metadata)
                products_at = _read_products_at(metadata)
                statistics = {
                    site.name: _read_statistics(file, site, part["tokens"][site.name])
                    for site in sites
                }
                products, foretold = (
                    {
                        site.name: _read_products(file, site, part["tokens"][site.name], kind)
                        for site in sites
                        if there
                    }
                    for kind, there in (
                        ("product", products_at is not None),
                        ("foretold", foretells),
                    )
                )
                names = list(statistics)
                sensitivities = read_sensitivities(metadata, file.get_tensor, names, preview)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CatsparseError(
                f"{path} is not a readable calibration ({shorten(error, 300)}); calibrate again"
            ) from error
        if not sites:
            raise CatsparseError(f"{path} holds no site; calibrate again")
        found = {site.name: site for site in sites}
        parts = (preview, products_at, products, foretold, sensitivities)
        return cls(found, statistics, provenance, *parts)


def _product_key(kind: str, field: str) -> str:
    return field if field == "down_norm" else f"{kind}_{field}"


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


def _read_statistics(file: Any, site: Site, tokens: object) -> SiteStatistics:
    name, values = shorten(site.name), _read_fields(file, site, _FIELDS, lambda field: field)
    finite = all(bool(value.isfinite().all()) for value in values.values())
    counts = [value for field, value in values.items() if field != "bucket_sum"]
    if not isinstance(tokens, int) or tokens < 1 or not finite:
        raise CatsparseError(f"the statistics of {name} are damaged")
    total = int(values["histogram"].sum())
    if total != tokens * site.intermediate_size or any(bool((c < 0).any()) for c in counts):
        raise CatsparseError(f"the counts of {name} contradict each other")
    return SiteStatistics(tokens, **values)


def _read_products(file: Any, site: Site, tokens: int, kind: str) -> ProductStatistics:
    name = shorten(site.name)
    values = _read_fields(file, site, _PRODUCT_FIELDS, partial(_product_key, kind))
    if not all(bool(value.isfinite().all()) for value in values.values()):
        raise CatsparseError(f"the products of {name} are damaged")
    counts = [value for field, value in values.items() if field != "bucket_sum"]
    seen = values["bucket_count"].sum(0)
    if (
        any(bool((count < 0).any()) for count in counts)
        or bool((seen > tokens if kind == "product" else seen != tokens).any())
        or int(values["histogram"].sum()) != int(seen.sum())
    ):
        raise CatsparseError(f"the counts of products of {name} contradict each other")
    return ProductStatistics(**values)


def _read_fields(
    file: Any, site: Site, fields: _Fields, key: Callable[[str], str]
) -> dict[str, Tensor]:
    values = {}
    for name, (dtype, shape) in fields.items():
        value = file.get_tensor(f"{site.name}.{key(name)}")
        if value.dtype != dtype or tuple(value.shape) != shape(site.intermediate_size):
            raise CatsparseError(
                f"{key(name)} of {shorten(site.name)} is {value.dtype} {list(value.shape)}"
            )
        values[name] = value
    return values
