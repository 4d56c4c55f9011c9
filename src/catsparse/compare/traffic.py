"""Bytes of linear layers that a decoded token reads of a model under comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..footprint import weight_bytes
from ..quantized import linears_to_quantize
from ..quantized_linear import weights_of_model
from ..sites import require_sites


@dataclass(frozen=True)
class Traffic:
    """Of one dense token: bytes of all linear layers, of those in the MLPs' blocks, of gated
    MLPs."""

    total: float
    of_scope: dict[str, float]

    @classmethod
    def of(cls, model: Any) -> Traffic | None:
        """Of a dense model, packed or not; None for one with experts, of which a token reads a few
        only."""
        if any(p.dim() > 2 and p.shape[0] > 1 for p in model.parameters()):
            return None
        each = weight_bytes(str(model.dtype), weights_of_model(model))
        linears = [model.get_submodule(name) for name in linears_to_quantize(model)]
        total = each * sum(map(_elements, linears))
        head = model.get_output_embeddings()
        blocks = total - (each * _elements(head) if isinstance(head, nn.Linear) else 0)
        mlps = sum(3 * site.hidden_size * site.intermediate_size for site in require_sites(model))
        return cls(total, {"mlp": each * mlps, "all": blocks})

    def read(self, skipped: float, scope: str) -> float:
        """Bytes that are left if the fraction ``skipped`` of the scope's is not read."""
        return self.total - skipped * self.of_scope[scope]


def _elements(linear: Any) -> int:
    elements: int = linear.in_features * linear.out_features
    return elements
