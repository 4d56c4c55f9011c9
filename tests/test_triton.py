"""The Triton kernels, on a GPU against fp64; run there with ``pytest -m gpu``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import hub
from catsparse.data import load_windows
from catsparse.kernels import ACTIVATIONS, gated_mlp
from catsparse.kernels import triton as module_under_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
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
            "none": torch.tensor(INFINITY, device="cuda"),
            "one block": vector(slice(self.neurons // 2, self.neurons // 2 + 40)),
            "alternating": vector(slice(None, None, 2)),
            "last": vector(slice(-1, None)),
        }

    def call(self, threshold: Tensor, compensated: bool) -> Tensor:
        extra = (self.mean, self.bias) if compensated else (None, None)
        return gated_mlp(self.x, *self.weights, threshold, self.act, *extra)

    def truth(self, threshold: Tensor, compensated: bool) -> Tensor:
        h = self.h - (self.mean.double() if compensated else 0.0)
        y = torch.where(self.g.abs() > threshold, h, 0.0) @ self.weights[2].double()
        return y + (self.bias.double() if compensated else 0.0)


SHAPES = [
    (torch.bfloat16, 4096, 14336, 4096, "silu", 1),
    (torch.bfloat16, 3000, 5003, 3000, "gelu_tanh", 1),
    (torch.bfloat16, 8192, 999, 8192, "silu", 1),
    (torch.bfloat16, 8192, 999, 8192, "silu", 2),
    (torch.float16, 896, 4864, 896, "silu", 1),
    (torch.float16, 2560, 1001, 2560, "gelu", 4),
    (torch.float32, 320, 864, 320, "silu", 1),
    (torch.float32, 1000, 333, 1200, "gelu", 2),
    (torch.float32, 4096, 700, 4096, "silu", 3),
    (torch.bfloat16, 5120, 1111, 5120, "relu", 1),
    (torch.bfloat16, 64, 7, 64, "silu", 3),
    (torch.bfloat16, 1, 2, 1, "silu", 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64_and_repeatable_in_a_graph(shape: tuple[Any, ...]) -> None:
    case = Case(*shape)
    for (name, threshold), compensated in itertools.product(
        case.thresholds().items(), (False, True)
    ):
        y, truth = case.call(threshold, compensated), case.truth(threshold, compensated)
        assert y.dtype == case.dtype
        error = (y.double() - truth).norm() / truth.norm().clamp(min=1e-9)
        assert float(error) < TOLERANCE[case.dtype], (name, compensated)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = case.call(threshold, compensated)
        for _ in range(3):
            captured.fill_(float("nan"))
            graph.replay()
            assert torch.equal(captured, y), (name, compensated)


def test_the_kernels_ran_and_not_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module_under_test, "gated_mlp_reference", never)
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1)
    case.call(case.cut(0.5), True)
    with pytest.raises(AssertionError, match="the reference ran"):
        Case(torch.bfloat16, 256, 300, 256, "silu", 5).call(case.cut(0.5), True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_decodes_by_the_kernel_as_by_torch(dtype: torch.dtype) -> None:
    tokenizer = hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=4096, seq_len=256)
    model = hub.load_dense_model("default", dtype=dtype).cuda()
    catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False))
    assert "experimental" in catsparse.explain(model)
    ids = windows[:1, :1].cuda()
    with torch.no_grad():
        torch_logits = model(ids).logits
        catsparse.set_backend(model, "triton")
        assert "the triton kernel (asked for)" in catsparse.explain(model)
        logits = model(ids).logits
    error = (logits - torch_logits).norm() / torch_logits.norm()
    assert float(error) < (1e-3 if dtype == torch.float32 else 5e-2)
