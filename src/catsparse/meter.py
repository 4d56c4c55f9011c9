"""Achieved sparsity: what fraction of neurons a sparse model really drops while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import CatsparseError
from .modules import SparseMLP, sparse_modules


class SparsityMeter:
    """Counts of kept neurons by site; read it inside or after :func:`achieved_sparsity`."""

    def __init__(self, modules: dict[str, SparseMLP]) -> None:
        self._counts = {name: _Count(_weight_elements(m)) for name, m in modules.items()}

    @property
    def sites(self) -> dict[str, float]:
        """Fraction of neurons dropped at each site that saw a token."""
        return {name: 1 - c.kept_share for name, c in self._counts.items() if c.total}

    @property
    def sparsity(self) -> float:
        """Fraction of neurons dropped over all sites and tokens."""
        total = sum(c.total for c in self._counts.values())
        if not total:
            raise CatsparseError("no token has passed through a sparse MLP yet; run the model")
        return 1 - sum(float(c.kept) for c in self._counts.values()) / total

    @property
    def bytes_skipped(self) -> float:
        """Fraction of the MLPs' weight bytes that one-token decode need not read (2s/3 a site)."""
        seen = {n: c for n, c in self._counts.items() if c.total}
        if not seen:
            raise CatsparseError("no token has passed through a sparse MLP yet; run the model")
        skipped = sum(2 / 3 * (1 - c.kept_share) * c.weights for c in seen.values())
        return skipped / sum(c.weights for c in seen.values())

    def counter(self, name: str) -> Any:
        return self._counts[name]


class _Count:
    def __init__(self, weights: int) -> None:
        self.weights = weights
        self.total = 0
        self.kept: Tensor | int = 0  # stays on the device: reading it is the only sync

    def __call__(self, keep: Tensor) -> None:
        self.total += keep.numel()
        self.kept = self.kept + keep.sum(dtype=torch.int64)

    @property
    def kept_share(self) -> float:
        return float(self.kept) / self.total


@contextmanager
def achieved_sparsity(model: Any) -> Iterator[SparsityMeter]:
    """Measure the sparsity of everything the model computes inside the ``with`` block.

    Outside the block nothing is counted and nothing is paid.

    Example::

        with catsparse.achieved_sparsity(model) as meter:
            model.generate(**inputs)
        print(meter.sparsity, meter.sites)

    Raises:
        CatsparseError: the model is dense, or being measured already.
    """
    modules = sparse_modules(model)
    if not modules:
        raise CatsparseError("the model is not sparse; call catsparse.sparsify(model, ...) first")
    if any(module.catsparse_counter is not None for module in modules.values()):
        raise CatsparseError("the model is being measured already; use the outer meter")
    meter = SparsityMeter(modules)
    try:
        for name, module in modules.items():
            module.catsparse_counter = meter.counter(name)
        yield meter
    finally:
        for module in modules.values():
            module.catsparse_counter = None


def _weight_elements(module: SparseMLP) -> int:
    names = [module.site_gate, module.site_up, module.site_down]
    children = [getattr(module, name) for name in names if name is not None]
    return sum(child.in_features * child.out_features for child in children)
