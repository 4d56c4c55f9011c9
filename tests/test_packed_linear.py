"""``catsparse::packed_linear`` on a CPU: against fp64, as an op, and what it leaves to torch."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from cases import TOLERANCE, unpacked
from catsparse.kernels import FORMATS, cpu, packed_linear, packed_linear_reference, quantize


def problem(
    weights: str, hidden: int, rows: int, tokens: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(hidden + rows)
    w = torch.randn(rows, hidden, generator=generator) * hidden**-0.5
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return x, *quantize(w, weights)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("hidden", "rows", "tokens"), [(64, 1, 1), (320, 33, 1), (192, 67, 5), (640, 96, 16)]
)
@pytest.mark.parametrize("weights", FORMATS)
def test_against_fp64(
    weights: str, hidden: int, rows: int, tokens: int, dtype: torch.dtype
) -> None:
    x, packed, scale = problem(weights, hidden, rows, tokens, dtype)
    truth = x.double() @ unpacked(packed, scale).T
    for y in (packed_linear(x, packed, scale), packed_linear_reference(x, packed, scale)):
        assert y.dtype == dtype
        assert float((y.double() - truth).norm() / truth.norm()) < TOLERANCE[dtype]
    shaped = x.view(1, tokens, 1, hidden)
    assert torch.equal(
        packed_linear(shaped, packed, scale)[0, :, 0], packed_linear(x, packed, scale)
    )


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_odd_sizes(weights: str) -> None:
    x, packed, scale = problem(weights, 37, 5, 3, torch.float32)
    truth = x.double() @ unpacked(packed, scale).T
    assert torch.allclose(packed_linear(x, packed, scale).double(), truth, rtol=1e-4, atol=1e-5)


def test_many_tokens_and_what_does_not_fit_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[packed_linear.__module__], "packed_linear_cpu", None)
    x, packed, scale = problem("int8", 64, 8, 17, torch.float32)
    assert torch.equal(packed_linear(x, packed, scale), packed_linear_reference(x, packed, scale))
    assert packed_linear(x[:0], packed, scale).shape == (0, 8)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed, scale = problem("int8", 64, 8, 2, torch.float32)
    assert torch.equal(
        packed_linear(x.double(), packed, scale).float(),
        packed_linear_reference(x.double(), packed, scale).float(),
    )
    monkeypatch.setattr(cpu, "cpu_library", lambda: type("None", (), {"handle": None}))
    assert torch.equal(packed_linear(x, packed, scale), packed_linear_reference(x, packed, scale))


def test_as_an_op() -> None:
    x, packed, scale = problem("int8", 64, 8, 2, torch.float32)
    torch.library.opcheck(torch.ops.catsparse.packed_linear.default, (x, packed, scale))
