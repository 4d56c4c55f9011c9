"""Achieved sparsity while a model trains: counted on the device, read where a row is logged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..modules import SparseMLP


class SparsityLog:
    """Counts neurons that sparse modules drop in forward passes, those on padding left out.

    Attributes:
        rows: ``[B, L]`` bool, the tokens of the batch under way that count; None for all.
    """

    def __init__(self, modules: dict[str, SparseMLP]) -> None:
        self.modules = modules
        self.rows: Tensor | None = None
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the ``with`` block."""
        try:
            for name, module in self.modules.items():
                module.catsparse_counter = partial(self._count, name)
            yield
        finally:
            for module in self.modules.values():
                module.catsparse_counter = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Count what runs inside the ``with`` block by itself, and forget it at the end."""
        before, self._counts = self._counts, {}
        try:
            yield
        finally:
            self._counts = before

    @torch.no_grad()
    def _count(self, name: str, keep: Tensor, kept: Tensor) -> None:
        if self.rows is not None and self.rows.shape == keep.shape[:-1]:
            keep, kept = keep[self.rows], kept[self.rows]
        seen = torch.stack(
            [keep.sum(), kept.sum(), torch.tensor(keep.numel(), device=keep.device)]
        ).double()
        before = self._counts.get(name)
        self._counts[name] = seen if before is None else before + seen

    def take(self) -> Tensor | None:
        """``[sites, 3]`` fp64: pairs of token and neuron that the first decision kept, that were
        kept in all, and that were seen since the last call; None if nothing was."""
        if len(self._counts) < len(self.modules):
            return None
        rows = torch.stack([self._counts[name] for name in self.modules])
        self._counts = {}
        return rows
