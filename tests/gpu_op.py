"""What the tests of the GPU kernels share: random problems with their truth in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from catsparse.kernels import ACTIVATIONS, gated_mlp

# Relative, of the whole output: sums in fp32, the result rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
INFINITY = float("inf")


class Case:
    """Random weights in a fused gate_up and a W_down^T with strided rows; truth in fp64."""

    def __init__(
        self, dtype: torch.dtype, hidden: int, neurons: int, columns: int, act: str, tokens: int
    ) -> None:
        torch.manual_seed(hidden + neurons)
        self.dtype, self.act, self.neurons = dtype, act, neurons
        both = torch.randn(2 * neurons, hidden, device="cuda", dtype=dtype) * hidden**-0.5
        wide = torch.randn(neurons, columns + 8, device="cuda", dtype=dtype) * neurons**-0.5
        self.weights = (both[:neurons], both[neurons:], wide[:, :columns])
        self.x = torch.randn(tokens, hidden, device="cuda", dtype=dtype)
        self.mean = 0.1 * torch.randn(neurons, device="cuda")
        self.bias = torch.randn(columns, device="cuda")
        gate, up, _ = (w.double() for w in self.weights)
        self.g = ACTIVATIONS[act](self.x.double() @ gate.T)
        self.h = self.g * (self.x.double() @ up.T)

    def cut(self, share: float) -> Tensor:
        """A threshold between two neighbours, so that no rounding flips a decision."""
        ordered = self.g.abs().flatten().sort().values
        at = max(1, int(share * len(ordered)))
        return ((ordered[at - 1] + ordered[at]) / 2).float()

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
        return gated_mlp(self.x, *self.weights, threshold, self.act, *extra, **options)

    def truth(self, threshold: Tensor, compensated: bool) -> Tensor:
        h = self.h - (self.mean.double() if compensated else 0.0)
        y = torch.where(self.g.abs() > threshold, h, 0.0) @ self.weights[2].double()
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
        return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-9))
