"""Calibration: what was counted at every site, its file, and thresholds for any sparsity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import (
    ACTIVATIONS,
    DEFAULT_METHOD,
    Provenance,
    build,
    check_choice,
    check_sparsity,
    parse_json,
    shorten,
    write_atomic,
)
from .errors import CatsparseError
from .methods import SiteThreshold, site_threshold
from .sites import Site
from .statistics import BINS, BUCKETS, SiteStatistics

# A statistics field: (dtype, shape as a function of the number of neurons).
_FIELDS: dict[str, tuple[torch.dtype, Callable[[int], tuple[int, ...]]]] = {
    "histogram": (torch.int64, lambda neurons: (BINS,)),
    "gate_square": (torch.float64, lambda neurons: (neurons,)),
    "up_square": (torch.float64, lambda neurons: (neurons,)),
    "bucket_count": (torch.int32, lambda neurons: (BUCKETS, neurons)),
    "bucket_sum": (torch.float32, lambda neurons: (BUCKETS, neurons)),
}


@dataclass
class Calibration:
    """Statistics of every site, from which thresholds for any sparsity follow at once.

    Attributes:
        sites: what was found in the model, by module name.
        statistics: what was counted there, on the CPU.
        provenance: data, tokens, sequence length, seed and dtype.
    """

    sites: dict[str, Site]
    statistics: dict[str, SiteStatistics]
    provenance: Provenance

    def thresholds(
        self, sparsity: float, method: str = DEFAULT_METHOD, compensate: bool = True
    ) -> dict[str, SiteThreshold]:
        """Thresholds and means for each site, without touching the model.

        Raises:
            CatsparseError: the sparsity is outside [0, 1) or the method unknown.
        """
        check_sparsity(sparsity)
        return {
            name: site_threshold(statistics, method, sparsity, compensate)
            for name, statistics in self.statistics.items()
        }

    def __add__(self, other: Calibration) -> Calibration:
        """As if both runs' tokens had been seen in one; the sites must be the same."""
        if self.sites != other.sites:
            raise CatsparseError("calibrations of different models cannot be added")
        merged = {name: s + other.statistics[name] for name, s in self.statistics.items()}
        first, second = self.provenance, other.provenance
        data = first.data if first.data == second.data else f"{first.data} + {second.data}"
        provenance = replace(first, data=data, tokens=first.tokens + second.tokens)
        return Calibration(dict(self.sites), merged, provenance)

    def tensors(self) -> dict[str, Tensor]:
        """Every statistic under ``<site>.<field>``, as stored in ``calibration.safetensors``."""
        return {
            f"{name}.{field}": getattr(statistics, field)
            for name, statistics in self.statistics.items()
            for field in _FIELDS
        }

    def metadata(self) -> dict[str, str]:
        """Header of ``calibration.safetensors``: sites, token counts and provenance as JSON."""
        return {
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
                statistics = {
                    site.name: _read_statistics(file, site, part["tokens"][site.name])
                    for site in sites
                }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CatsparseError(
                f"{path} is not a readable calibration ({shorten(error, 300)}); calibrate again"
            ) from error
        if not sites:
            raise CatsparseError(f"{path} holds no site; calibrate again")
        return cls({site.name: site for site in sites}, statistics, provenance)


def _read_statistics(file: Any, site: Site, tokens: object) -> SiteStatistics:
    name, values = shorten(site.name), {}
    for field, (dtype, shape) in _FIELDS.items():
        value = file.get_tensor(f"{site.name}.{field}")
        if value.dtype != dtype or tuple(value.shape) != shape(site.intermediate_size):
            raise CatsparseError(f"{field} of {name} is {value.dtype} {list(value.shape)}")
        values[field] = value
    finite = all(bool(value.isfinite().all()) for value in values.values())
    counts = [value for field, value in values.items() if field != "bucket_sum"]
    if not isinstance(tokens, int) or tokens < 1 or not finite:
        raise CatsparseError(f"the statistics of {name} are damaged")
    total = int(values["histogram"].sum())
    if total != tokens * site.intermediate_size or any(bool((c < 0).any()) for c in counts):
        raise CatsparseError(f"the counts of {name} contradict each other")
    return SiteStatistics(tokens, **values)
