"""Achieved sparsity: what fraction of neurons a sparse model really drops while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import CatsparseError
from .footprint import bytes_skipped
from .modules import SparseMLP, sparse_modules


class SparsityMeter:
    """Counts of kept neurons by site; read it inside or after :func:`achieved_sparsity`."""

    def __init__(self, modules: dict[str, SparseMLP]) -> None:
        self._counts = {name: _Count(module) for name, module in modules.items()}

    @property
    def sites(self) -> dict[str, float]:
        """Fraction of neurons dropped by the first decision at each site that saw a token."""
        return {name: c.sparsity for name, c in self._counts.items() if c.total}

    @property
    def down_sites(self) -> dict[str, float]:
        """Fraction of W_down's rows not read, by site: more than :attr:`sites` where there is a
        second decision."""
        return {name: c.down_sparsity for name, c in self._counts.items() if c.total}

    @property
    def sparsity(self) -> float:
        """Fraction of neurons dropped by the first decision over all sites and tokens."""
        counts = self._seen()
        return 1 - sum(float(c.kept) for c in counts) / sum(c.total for c in counts)

    @property
    def down_sparsity(self) -> float:
        """Fraction of W_down's rows not read over all sites and tokens; without a second decision
        :attr:`sparsity`."""
        counts = self._seen()
        return 1 - sum(float(c.kept_down) for c in counts) / sum(c.total for c in counts)

    @property
    def bytes_skipped(self) -> float:
        """Fraction of the MLPs' weight bytes that one-token decode need not read.

        2s/3 a site; with a second decision or a preview see
        :func:`catsparse.footprint.bytes_skipped`.
        """
        counts = self._seen()
        return sum(c.bytes_skipped() * c.weights for c in counts) / sum(c.weights for c in counts)

    def site_bytes_skipped(self, name: str, down: bool = True) -> float:
        """Fraction of one site's weight bytes; ``down`` False if all of W_down is read."""
        return self._counts[name].bytes_skipped(down)

    def counter(self, name: str) -> Any:
        return self._counts[name]

    def _seen(self) -> list[_Count]:
        counts = [c for c in self._counts.values() if c.total]
        if not counts:
            raise CatsparseError("no token has passed through a sparse MLP yet; run the model")
        return counts


class _Count:
    def __init__(self, module: SparseMLP) -> None:
        self.module, self.weights = module, _weight_elements(module)
        self.total = 0
        # These stay on the device: reading them is the only sync.
        self.kept: Tensor | int = 0
        self.kept_down: Tensor | int = 0

    def __call__(self, keep: Tensor, kept: Tensor) -> None:
        self.total += keep.numel()
        number = keep.sum(dtype=torch.int64)
        self.kept = self.kept + number
        self.kept_down = self.kept_down + (number if kept is keep else kept.sum(dtype=torch.int64))

    @property
    def sparsity(self) -> float:
        return 1 - float(self.kept) / self.total

    @property
    def down_sparsity(self) -> float:
        return 1 - float(self.kept_down) / self.total

    def bytes_skipped(self, down: bool = True) -> float:
        module, hidden = self.module, getattr(self.module, self.module.site_gate).in_features
        down_sparsity = self.down_sparsity if down else 0.0
        of_products = module.catsparse_of_products
        if module.why_not_preview() is not None:  # also where the weight cannot be read
            sparsity = 0.0 if of_products else self.sparsity  # the exact product needs all of up
            return bytes_skipped(sparsity, down_sparsity, None, hidden, 1)
        bits, itemsize = module.catsparse_preview_bits, module.raw_gate_up()[0].dtype.itemsize
        return bytes_skipped(self.sparsity, down_sparsity, bits, hidden, itemsize, of_products)


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
