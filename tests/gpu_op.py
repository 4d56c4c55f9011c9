"""What the tests of the GPU kernels share: random problems with their truth in fp64.

A case may have a preview of the gate or of products, which then decides, and a second decision.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from catsparse.kernels import (
    ACTIVATIONS,
    cuda,
    dequantize,
    dequantize_weight,
    gated_mlp,
    make_preview,
    quantize,
)

# Relative, of the whole output: sums in fp32, the result rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
INFINITY = float("inf")
HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and cuda.why_not_cuda(torch.device("cuda", 0)) is not None,
        reason="needs compute capability 9.0",
    ),
]


def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other implementation is an error."""

    def never(*_: object) -> Tensor:
        raise AssertionError("another implementation ran")

    monkeypatch.setattr(cuda, "gated_mlp_reference", never)
    monkeypatch.setattr(cuda, "gated_mlp_triton", never)


class Case:
    """Random weights in a fused gate_up and a W_down^T with strided rows, or packed; truth in
    fp64."""

    def __init__(
        self,
        dtype: torch.dtype,
        hidden: int,
        neurons: int,
        columns: int,
        act: str,
        tokens: int,
        bits: int = 0,
        second: str = "",
        products: bool = False,
        packed: str | None = None,
    ) -> None:
        torch.manual_seed(hidden + neurons)
        self.dtype, self.act, self.neurons = dtype, act, neurons
        both = torch.randn(2 * neurons, hidden, device="cuda", dtype=dtype) * hidden**-0.5
        wide = torch.randn(neurons, columns + 8, device="cuda", dtype=dtype) * neurons**-0.5
        self.weights = (both[:neurons], both[neurons:], wide[:, :columns])
        self.x = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
        self.mean = 0.1 * torch.randn(neurons, device="cuda")
        self.bias = torch.randn(columns, device="cuda")
        self.exact, self.extra = tuple(w.double() for w in self.weights), {}
        if packed is not None:
            pairs = [quantize(w, packed) for w in self.weights]
            self.weights = tuple(w for w, _ in pairs)
            names = ("gate_scale", "up_scale", "down_scale")
            self.extra = dict(zip(names, (scale for _, scale in pairs), strict=True))
            self.exact = tuple(dequantize_weight(*pair, torch.float64) for pair in pairs)
        gate, up, _ = self.exact
        self.g = ACTIVATIONS[act](self.x.double() @ gate.T)
        self.h = self.g * (self.x.double() @ up.T)
        self.decided = self.g
        if bits:
            preview, scale = make_preview(gate, bits, up if products else None)
            foretold = self.x.double() @ dequantize(preview, scale, hidden, torch.float64).T
            self.decided = ACTIVATIONS[act](foretold[:, :neurons])
            if products:
                self.decided = self.decided * foretold[:, neurons:]
            self.extra |= {"preview": preview, "preview_scale": scale}
        self.stays = torch.ones_like(self.h, dtype=torch.bool)
        if second:
            cut = _between(self.h, 0.4)
            limits = cut * (0.5 + torch.rand(neurons, device="cuda")) if second == "vector" else cut
            # Far enough from every product that no rounding flips a decision.
            near = ((self.h.abs() / limits.double() - 1).abs() < 1e-3).any(dim=0)
            if second == "vector":
                limits[near] = INFINITY
            self.extra["product_threshold"] = limits
            self.stays = self.h.abs() > limits

    def cut(self, share: float) -> Tensor:
        """A threshold between two neighbours, so that no rounding flips a decision."""
        return _between(self.decided, share)

    def thresholds(self) -> dict[str, Tensor]:
        def vector(kept: slice) -> Tensor:
            values = torch.full((self.neurons,), INFINITY, device="cuda")
            values[kept] = -1.0
            return values

        return {
            "all": torch.tensor(-1.0, device="cuda"),
            "half": self.cut(0.5),
            "0.97": self.cut(0.97),
            "0.999": self.cut(0.999),
            "none": torch.tensor(INFINITY, device="cuda"),
            "one block": vector(slice(self.neurons // 2, self.neurons // 2 + 40)),
            "alternating": vector(slice(None, None, 2)),
            "last": vector(slice(-1, None)),
        }

    def call(self, threshold: Tensor, compensated: bool, **options: Any) -> Tensor:
        extra = (self.mean, self.bias) if compensated else (None, None)
        options |= self.extra
        return gated_mlp(self.x, *self.weights, threshold, self.act, *extra, **options)

    def truth(self, threshold: Tensor, compensated: bool) -> Tensor:
        h = self.h - (self.mean.double() if compensated else 0.0)
        kept = (self.decided.abs() > threshold) & self.stays
        y = torch.where(kept, h, 0.0) @ self.exact[2]
        return y + (self.bias.double() if compensated else 0.0)

    def check(self, backend: str) -> None:
        """Right at every threshold, and the same bits in a graph over a poisoned output."""
        for (name, threshold), compensated in itertools.product(
            self.thresholds().items(), (False, True)
        ):
            y = self.call(threshold, compensated, backend=backend)
            assert y.dtype == self.dtype
            assert self.error(y, threshold, compensated) < TOLERANCE[self.dtype], name
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self.call(threshold, compensated, backend=backend)
            for _ in range(3):
                captured.fill_(float("nan"))
                graph.replay()
                assert torch.equal(captured, y), name

    def error(self, y: Tensor, threshold: Tensor, compensated: bool) -> float:
        truth = self.truth(threshold, compensated)
        if not truth.any():
            return INFINITY if y.any() else 0.0
        # Of one neuron with next to no activation little is left to be right about.
        ordinary = self.h.pow(2).mean().sqrt() * self.exact[2].norm(dim=1).mean()
        return float((y.double() - truth).norm() / truth.norm().clamp(min=float(ordinary)))


def _between(values: Tensor, share: float) -> Tensor:
    """The middle of the widest gap, in ratio, near that quantile of the magnitudes."""
    ordered = values.abs().flatten().sort().values
    at = min(max(1, int(share * len(ordered))), len(ordered) - 1)
    low = max(1, at - len(ordered) // 2000)
    near = ordered[low - 1 : at + 1 + len(ordered) // 2000]
    gap = int((near[1:] / near[:-1].clamp(min=1e-30)).argmax())
    return ((near[gap] + near[gap + 1]) / 2).float()
