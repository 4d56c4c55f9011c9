"""Achieved sparsity: what fraction of neurons a sparse model really drops while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CatsparseError
from .footprint import bytes_skipped
from .linears import SparseLinear, sparse_linears
from .modules import SparseMLP, sparse_modules
from .shards import Sharded

# By length L of the sequences: (token, neuron) pairs seen at each position, and kept ones [L].
_Places = dict[int, tuple[int, Tensor]]


@dataclass(frozen=True)
class PositionSparsity:
    """Fraction of neurons dropped by the first decision, by a token's position in its text.

    Attributes:
        starts: first position of each bucket (0, 1, 2, 4, 8, ...); it goes up to the next one's.
        length: positions there are; the last bucket's end.
        sparsity: in each bucket, over all sites that saw whole sequences.
        sites: the same for each of them, by name.
    """

    starts: list[int]
    length: int
    sparsity: list[float]
    sites: dict[str, list[float]]


class SparsityMeter:
    """Counts of kept neurons by site, and of kept inputs by linear layer; read it inside or after
    :func:`achieved_sparsity`."""

    def __init__(
        self,
        modules: dict[str, SparseMLP],
        linears: dict[str, SparseLinear] | None = None,
        positions: bool = False,
    ) -> None:
        self._counts = {name: _Count(module, positions) for name, module in modules.items()}
        self._inputs = {name: _InputCount(layer) for name, layer in (linears or {}).items()}

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
    def inputs(self) -> dict[str, float]:
        """Fraction of inputs dropped at each sparse linear layer that saw a token."""
        return {name: c.sparsity for name, c in self._inputs.items() if c.total}

    @property
    def input_sparsity(self) -> float | None:
        """Fraction of inputs dropped over all sparse linear layers, by weight; None without any."""
        counts = [c for c in self._inputs.values() if c.total]
        if not counts:
            return None
        return sum(c.sparsity * c.weights for c in counts) / sum(c.weights for c in counts)

    @property
    def sparsity(self) -> float:
        """Fraction of neurons dropped by the first decision over all sites and tokens; of inputs
        where no gated MLP is sparse."""
        if not self._counts and (of_inputs := self.input_sparsity) is not None:
            return of_inputs
        counts = self._seen()
        return 1 - sum(float(c.kept) for c in counts) / sum(c.total for c in counts)

    @property
    def down_sparsity(self) -> float:
        """Fraction of W_down's rows not read over all sites and tokens; without a second decision
        :attr:`sparsity`."""
        if not self._counts:
            return self.sparsity
        counts = self._seen()
        return 1 - sum(float(c.kept_down) for c in counts) / sum(c.total for c in counts)

    @property
    def bytes_skipped(self) -> float:
        """Fraction of the sparse layers' weight bytes that one-token decode need not read.

        2s/3 a gated MLP, with a second decision or a preview see
        :func:`catsparse.footprint.bytes_skipped`; s a linear layer.
        """
        counts: list[_Count | _InputCount] = [c for c in self._inputs.values() if c.total]
        counts += self._seen() if self._counts or not counts else []
        return sum(c.bytes_skipped() * c.weights for c in counts) / sum(c.weights for c in counts)

    def site_bytes_skipped(self, name: str, down: bool = True) -> float:
        """Fraction of one layer's weight bytes; ``down`` False if all of W_down is read, or of a
        linear layer's weight."""
        if (linear := self._inputs.get(name)) is not None:
            return linear.bytes_skipped() if down else 0.0
        return self._counts[name].bytes_skipped(down)

    def sum_over_ranks(self) -> None:
        """Add up what the ranks of a model spread over processes (tensor parallel) counted, each of
        its own neurons; every rank must call it, once. Not of token positions."""
        for count in self._counts.values():
            if isinstance(count.module, Sharded):
                count.sum_over(count.module.catsparse_shard.mesh.get_group())

    @property
    def positions(self) -> PositionSparsity | None:
        """Sparsity by token position; None if it was not asked for, or no site saw sequences (an
        expert's tokens, say, have no position)."""
        found = {name: c.places for name, c in self._counts.items() if c.places}
        return _by_position(found) if found else None

    def counter(self, name: str) -> Any:
        return self._counts.get(name) or self._inputs[name]

    def tokens(self, name: str) -> int:
        """Tokens that a layer counted."""
        count = self._counts.get(name) or self._inputs[name]
        return count.total // count.width

    def _seen(self) -> list[_Count]:
        counts = [c for c in self._counts.values() if c.total]
        if not counts:
            raise CatsparseError("no token has passed through a sparse layer yet; run the model")
        return counts


class _InputCount:
    def __init__(self, layer: SparseLinear) -> None:
        self.width, self.weights = layer.in_features, layer.in_features * layer.out_features
        self.total = 0
        self.kept: Tensor | int = 0

    def __call__(self, keep: Tensor) -> None:
        self.total += keep.numel()
        self.kept = self.kept + keep.sum(dtype=torch.int64)

    @property
    def sparsity(self) -> float:
        return 1 - float(self.kept) / self.total

    def bytes_skipped(self) -> float:
        return self.sparsity


class _Count:
    def __init__(self, module: SparseMLP, positions: bool) -> None:
        self.module, self.weights = module, _weight_elements(module)
        self.width = module.own_neurons
        self.total = 0
        # These stay on the device: reading them is the only sync.
        self.kept: Tensor | int = 0
        self.kept_down: Tensor | int = 0
        self.places: _Places | None = {} if positions else None

    def __call__(self, keep: Tensor, kept: Tensor) -> None:
        self.total += keep.numel()
        if self.places is None or keep.dim() < 3:
            number = keep.sum(dtype=torch.int64)
        else:
            by_place = keep.sum(-1, dtype=torch.int64).flatten(0, -2).sum(0)
            number, length = by_place.sum(), len(by_place)
            pairs, before = self.places.get(length, (0, torch.zeros_like(by_place)))
            self.places[length] = pairs + keep.numel() // length, before + by_place
        self.kept = self.kept + number
        self.kept_down = self.kept_down + (number if kept is keep else kept.sum(dtype=torch.int64))

    def sum_over(self, group: Any) -> None:
        numbers = self.total, int(self.kept), int(self.kept_down), self.width
        device = self.module.catsparse_threshold.device
        sums = torch.tensor(numbers, device=device)
        torch.distributed.all_reduce(sums, group=group)
        self.total, self.kept, self.kept_down, self.width = sums.tolist()

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
        bits, itemsize = module.catsparse_preview_bits, module.weight_bytes
        return bytes_skipped(self.sparsity, down_sparsity, bits, hidden, itemsize, of_products)


@contextmanager
def achieved_sparsity(model: Any, positions: bool = False) -> Iterator[SparsityMeter]:
    """Measure the sparsity of everything the model computes inside the ``with`` block.

    Outside the block nothing is counted and nothing is paid. Of a model spread over processes each
    rank counts its own neurons, until all of them call ``meter.sum_over_ranks()``.

    Example::

        with catsparse.achieved_sparsity(model) as meter:
            model.generate(**inputs)
        print(meter.sparsity, meter.sites)

    Args:
        model: a sparse model.
        positions: count by token position, too (``meter.positions``). For calls that each hold
            whole texts from their first token on; in decode a token's position is not known here.

    Raises:
        CatsparseError: the model is dense, or being measured already.
    """
    modules, linears = sparse_modules(model), sparse_linears(model)
    layers: dict[str, SparseMLP | SparseLinear] = {**modules, **linears}
    if not layers:
        raise CatsparseError("the model is not sparse; call catsparse.sparsify(model, ...) first")
    if any(layer.catsparse_counter is not None for layer in layers.values()):
        raise CatsparseError("the model is being measured already; use the outer meter")
    meter = SparsityMeter(modules, linears, positions)
    try:
        for name, layer in layers.items():
            layer.catsparse_counter = meter.counter(name)
        yield meter
    finally:
        for layer in layers.values():
            layer.catsparse_counter = None


def _by_position(found: dict[str, _Places]) -> PositionSparsity:
    # Up to where every site has seen a token; shorter sequences count as far as they go.
    length = min(max(places) for places in found.values())
    starts = [0, *(2**k for k in range((length - 1).bit_length()))]
    ends = [*starts[1:], length]
    counts = {}
    for name, places in found.items():
        pairs, kept = torch.zeros(2, length, dtype=torch.float64)
        for end, (seen, number) in places.items():
            pairs[:end] += seen
            kept[:end] += number[:length].cpu()
        spans = [slice(a, b) for a, b in zip(starts, ends, strict=True)]
        counts[name] = torch.stack([torch.stack([pairs[s].sum(), kept[s].sum()]) for s in spans])
    total = torch.stack(list(counts.values())).sum(0)
    sites = {name: (1 - c[:, 1] / c[:, 0]).tolist() for name, c in counts.items()}
    return PositionSparsity(starts, length, (1 - total[:, 1] / total[:, 0]).tolist(), sites)


def _weight_elements(module: SparseMLP) -> int:
    names = [module.site_gate, module.site_up, module.site_down]
    children = [getattr(module, name) for name in names if name is not None]
    return sum(child.in_features * child.out_features for child in children)
