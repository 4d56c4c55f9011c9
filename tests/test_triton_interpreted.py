"""The Triton kernels on a CPU, by Triton's interpreter, against fp64.

Triton decides at its import whether it interprets, so the tests run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from catsparse.kernels import ACTIVATIONS
from catsparse.kernels import triton as kernels

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INFINITY = float("inf")
# Relative, of the whole output: sums in fp32, the result rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

inside = pytest.mark.skipif(not INTERPRETING, reason="runs in the process with TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETING, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_a_process_that_interprets() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-rfE", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


class Case:
    """A small problem in a fused gate_up and a W_down^T with strided rows; truth in fp64."""

    def __init__(
        self, dtype: torch.dtype, hidden: int, neurons: int, columns: int, act: str, tokens: int
    ) -> None:
        torch.manual_seed(hidden + neurons)
        self.act, self.neurons = act, neurons
        both = torch.randn(2 * neurons, hidden).to(dtype) * hidden**-0.5
        wide = torch.randn(neurons, columns + 3).to(dtype) * neurons**-0.5
        self.weights = (both[:neurons], both[neurons:], wide[:, :columns])
        self.x = torch.randn(tokens, hidden).to(dtype)
        self.mean, self.bias = 0.1 * torch.randn(neurons), torch.randn(columns)
        gate, up, _ = (w.double() for w in self.weights)
        self.g = ACTIVATIONS[act](self.x.double() @ gate.T)
        self.h = self.g * (self.x.double() @ up.T)

    def thresholds(self) -> list[Tensor]:
        """All, half and none kept; alternating, in one block, only the last neuron."""
        ordered = self.g.abs().flatten().sort().values
        middle = len(ordered) // 2
        chosen = [torch.full((self.neurons,), INFINITY) for _ in range(3)]
        chosen[0][::2] = -1.0
        chosen[1][: self.neurons // 3 + 1] = -1.0
        chosen[2][-1] = -1.0
        between = ((ordered[middle - 1] + ordered[middle]) / 2).float()
        return [torch.tensor(-1.0), between, torch.tensor(INFINITY), *chosen]

    def truth(self, threshold: Tensor, compensated: bool) -> Tensor:
        h = self.h - (self.mean.double() if compensated else 0.0)
        y = torch.where(self.g.abs() > threshold, h, 0.0) @ self.weights[2].double()
        return y + (self.bias.double() if compensated else 0.0)


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not written is not a number."""

    def empty(*sizes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype.is_floating_point:
            return torch.full(sizes, float("nan"), dtype=dtype, device=device)
        return torch.full(sizes, 2**31 - 1, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


@inside
@pytest.mark.parametrize(
    ("dtype", "hidden", "neurons", "columns", "act", "tokens"),
    [
        (torch.float32, 24, 7, 24, "silu", 1),
        (torch.float32, 40, 53, 24, "gelu_tanh", 2),
        (torch.float32, 33, 21, 65, "gelu", 3),
        (torch.float32, 16, 13, 16, "relu", 4),
        (torch.float32, 1, 2, 1, "silu", 1),
        (torch.float16, 64, 19, 64, "silu", 4),
        (torch.bfloat16, 64, 19, 48, "silu", 1),
        (torch.bfloat16, 20, 31, 20, "gelu_tanh", 2),
    ],
    ids=str,
)
def test_stream_and_sum(
    dtype: torch.dtype,
    hidden: int,
    neurons: int,
    columns: int,
    act: str,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(dtype, hidden, neurons, columns, act, tokens)
    poisoned(monkeypatch)
    for number, threshold in enumerate(case.thresholds()):
        compensated = (number + tokens) % 2 == 0
        extra = (case.mean, case.bias) if compensated else (None, None)
        arguments = (case.x, *case.weights, threshold, act, *extra)
        assert kernels.fits_triton(*arguments)
        y = kernels.gated_mlp_triton(*arguments)
        truth = case.truth(threshold, compensated)
        assert y.dtype == dtype
        assert float((y - truth).norm() / truth.norm().clamp(min=1e-3)) < TOLERANCE[dtype]


@inside
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mask(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    z, u = (torch.randn(5, 213).to(dtype) for _ in range(2))
    mean, each = torch.randn(213), torch.rand(213)
    g = ACTIVATIONS[act](z.double())
    for threshold in (torch.tensor(-1.0), torch.tensor(0.31), torch.tensor(INFINITY), each):
        for subtracted in (None, mean):
            h = kernels.mask_triton(z.clone(), u.clone(), threshold, act, subtracted)
            less = 0.0 if subtracted is None else subtracted.double()
            truth = torch.where(g.abs() > threshold, g * u.double() - less, 0.0)
            torch.testing.assert_close(h, truth.to(dtype), rtol=2e-2, atol=1e-5)


@inside
def test_a_gate_that_is_not_a_number_is_dropped() -> None:
    z = torch.tensor([[float("nan"), 1.0]])
    h = kernels.mask_triton(z, torch.ones(1, 2), torch.tensor(0.1), "relu", torch.ones(2))
    assert h.tolist() == [[0.0, 0.0]]
