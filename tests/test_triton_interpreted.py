"""The Triton kernels on a CPU, by Triton's interpreter, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from catsparse.kernels import ACTIVATIONS, Call
from catsparse.kernels import triton as kernels
from catsparse.kernels.triton import plans
from interpreting import inside, outside, run_interpreted

INFINITY = float("inf")
# Relative, of the whole output: sums in fp32, the result rounded once.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@outside
def test_in_a_process_that_interprets() -> None:
    run_interpreted(__file__)


def spaced_rows(rows: int, columns: int, gap: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Random rows with NaN between them, which a read past a row's end brings in."""
    whole = torch.full((rows, columns + gap), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns) * scale
    return whole[:, :columns]


def spaced(values: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([values, torch.full_like(values, float("nan"))], dim=-1)[..., 0]


class Case:
    """A small problem, nothing in it contiguous; truth in fp64."""

    def __init__(
        self, dtype: torch.dtype, hidden: int, neurons: int, columns: int, act: str, tokens: int
    ) -> None:
        torch.manual_seed(hidden + neurons)
        self.dtype, self.act, self.neurons, self.tokens = dtype, act, neurons, tokens
        both = spaced_rows(2 * neurons, hidden, 4, hidden**-0.5, dtype)
        self.gate, self.up = both[:neurons], both[neurons:]
        if tokens % 2 == 0:  # not fused: a stride of its own
            self.up = spaced_rows(neurons, hidden, 1, hidden**-0.5, dtype)
        self.down = spaced_rows(neurons, columns, 3, neurons**-0.5, dtype)
        # Copies close gaps silently.
        assert self.gate.stride(0) > hidden
        assert self.down.stride(0) > columns
        self.x = spaced(torch.randn(tokens, hidden).to(dtype))
        self.mean, self.bias = spaced(0.1 * torch.randn(neurons)), spaced(torch.randn(columns))
        self.g = ACTIVATIONS[act](self.x.double() @ self.gate.double().T)
        self.h = self.g * (self.x.double() @ self.up.double().T)

    def thresholds(self) -> dict[str, Tensor]:
        ordered = self.g.abs().flatten().sort().values
        middle = len(ordered) // 2
        between = ((ordered[middle - 1] + ordered[middle]) / 2).float()

        def vector(kept: slice) -> Tensor:
            values = torch.full((self.neurons,), INFINITY)
            values[kept] = -1.0
            return spaced(values)

        return {
            "all": torch.tensor(-1.0),
            "half": between,
            "not zero": torch.tensor(0.0),  # relu: a tie is dropped
            "none": torch.tensor(INFINITY),
            "alternating": vector(slice(None, None, 2)),
            "one block": vector(slice(max(1, self.neurons // 6))),  # of at most six
            "last": vector(slice(-1, None)),
        }

    def check(self) -> None:
        """Right at every threshold, with and without mean and bias, from kept rows alone."""
        for number, (name, threshold) in enumerate(self.thresholds().items()):
            with_mean, with_bias = divmod((number + self.tokens) % 4, 2)
            mean, bias = self.mean if with_mean else None, self.bias if with_bias else None
            kept = self.g.abs() > threshold
            h = self.h if mean is None else self.h - mean.double()
            truth = torch.where(kept, h, 0.0) @ self.down.double()
            if bias is not None:
                truth = truth + bias.double()
            up, down = self.without(self.up, kept), self.without(self.down, kept)
            assert (up.stride(), down.stride()) == (self.up.stride(), self.down.stride())
            call = Call(self.x, self.gate, up, down, threshold, self.act, mean, bias)
            assert kernels.fits_triton(call)
            y = kernels.gated_mlp_triton(call)
            assert y.dtype == self.dtype
            error = float((y - truth).norm() / truth.norm().clamp(min=1e-3))
            assert error < TOLERANCE[self.dtype], name

    @staticmethod
    def without(weight: Tensor, kept: Tensor) -> Tensor:
        """The weight, strides and all, with NaN in the rows that no token keeps."""
        copy = weight.as_strided((weight.shape[0], weight.stride(0)), weight.stride()).clone()
        copy[~kept.any(dim=0)] = float("nan")
        return copy[:, : weight.shape[1]]


@inside
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape",
    [
        (torch.float32, 24, 7, 24, "silu", 1),
        (torch.float32, 30, 23, 21, "gelu_tanh", 2),
        (torch.float32, 15, 13, 33, "gelu", 3),
        (torch.float32, 16, 13, 16, "relu", 4),
        (torch.float32, 1, 2, 1, "silu", 1),
        (torch.float16, 32, 19, 32, "silu", 4),
        (torch.float16, 96, 53, 96, "relu", 1),
        (torch.bfloat16, 32, 11, 20, "silu", 1),
        (torch.bfloat16, 20, 19, 32, "gelu_tanh", 2),
    ],
    ids=str,
)
def test_stream_and_sum(shape: tuple[Any, ...]) -> None:
    Case(*shape).check()


@inside
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_the_plans_of_long_rows(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans.find_plan(4096, 1, dtype)
    assert plan.rows == rows
    monkeypatch.setattr(plans, "find_plan", lambda *_: plan)
    Case(dtype, 24, 23, 30, "silu", 1).check()


@inside
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_mask(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    z, u = torch.randn(5, 213), torch.randn(5, 213).to(dtype)
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


@inside
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_so_is_it_where_every_number_is_kept(act: str) -> None:
    case = Case(torch.float32, 24, 7, 24, act, 2)
    case.gate[3, 5] = float("nan")
    call = Call(case.x, case.gate, case.up, case.down, torch.tensor(-1.0), act, case.mean)
    h = torch.where(case.g.new_tensor(range(7)) == 3, 0.0, case.h - case.mean.double())
    torch.testing.assert_close(kernels.gated_mlp_triton(call).double(), h @ case.down.double())
