"""Statistics of sites as tensors of ``calibration.safetensors``: their names, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import CatsparseError
from .inputs import InputSite
from .products import ProductStatistics
from .sites import Site
from .statistics import BINS, BUCKETS, InputStatistics, SiteStatistics
from .strict_json import shorten

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
_INPUT_FIELDS: _Fields = {  # as ``input_...``
    "histogram": _FIELDS["histogram"],
    "bucket_count": _FIELDS["bucket_count"],
    "bucket_sum": _FIELDS["bucket_sum"],
    "weight_norm": (torch.float32, lambda inputs: (inputs,)),
}


def statistics_tensors(
    statistics: Mapping[str, SiteStatistics],
    products: Mapping[str, ProductStatistics],
    foretold: Mapping[str, ProductStatistics],
    inputs: Mapping[str, InputStatistics],
) -> dict[str, Tensor]:
    """Every statistic under ``<site>.<field>``."""
    tensors = {
        f"{name}.{field}": getattr(part, field)
        for name, part in statistics.items()
        for field in _FIELDS
    }
    for kind, by_site in (("product", products), ("foretold", foretold)):
        tensors |= {
            f"{name}.{_product_key(kind, field)}": getattr(part, field)
            for name, part in by_site.items()
            for field in _PRODUCT_FIELDS
        }
    return tensors | {
        f"{name}.input_{field}": getattr(part, field)
        for name, part in inputs.items()
        for field in _INPUT_FIELDS
    }


def _product_key(kind: str, field: str) -> str:
    return field if field == "down_norm" else f"{kind}_{field}"


def read_statistics(file: Any, site: Site, tokens: object) -> SiteStatistics:
    name = shorten(site.name)
    values = _read_fields(file, site.name, site.intermediate_size, _FIELDS, lambda field: field)
    finite = all(bool(value.isfinite().all()) for value in values.values())
    counts = [value for field, value in values.items() if field != "bucket_sum"]
    if not isinstance(tokens, int) or tokens < 1 or not finite:
        raise CatsparseError(f"the statistics of {name} are damaged")
    total = int(values["histogram"].sum())
    if total != tokens * site.intermediate_size or any(bool((c < 0).any()) for c in counts):
        raise CatsparseError(f"the counts of {name} contradict each other")
    return SiteStatistics(tokens, **values)


def read_products(file: Any, site: Site, tokens: int, kind: str) -> ProductStatistics:
    name = shorten(site.name)
    values = _read_fields(
        file, site.name, site.intermediate_size, _PRODUCT_FIELDS, partial(_product_key, kind)
    )
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
    file: Any, site: str, size: int, fields: _Fields, key: Callable[[str], str]
) -> dict[str, Tensor]:
    values = {}
    for name, (dtype, shape) in fields.items():
        value = file.get_tensor(f"{site}.{key(name)}")
        if value.dtype != dtype or tuple(value.shape) != shape(size):
            raise CatsparseError(
                f"{key(name)} of {shorten(site)} is {value.dtype} {list(value.shape)}"
            )
        values[name] = value
    return values


def read_inputs(file: Any, site: InputSite, tokens: object) -> InputStatistics:
    """The statistics of shared inputs, checked.

    Raises:
        CatsparseError: they are damaged or contradict each other.
    """
    name = shorten(site.name)
    values = _read_fields(
        file, site.name, site.in_features, _INPUT_FIELDS, lambda field: f"input_{field}"
    )
    finite = all(bool(value.isfinite().all()) for value in values.values())
    counts = [value for field, value in values.items() if field != "bucket_sum"]
    if type(tokens) is not int or tokens < 1 or not finite:
        raise CatsparseError(f"the statistics of {name} are damaged")
    seen = values["bucket_count"].sum(0)
    if (
        int(values["histogram"].sum()) != tokens * site.in_features
        or bool((seen != tokens).any())
        or any(bool((c < 0).any()) for c in counts)
    ):
        raise CatsparseError(f"the counts of {name} contradict each other")
    return InputStatistics(tokens, **values)
