"""The CUDA kernel with previews and a second decision, on a GPU: against fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from catsparse.kernels import (
    Backend,
    Call,
    Decisions,
    PreviewKind,
    choose_backend,
    cuda,
    gated_mlp_reference,
)
from gpu_op import HOPPER, TOLERANCE, Case, only

pytestmark = HOPPER

# With rows in one, two and four parts, groups that do not fill a warp's share, and a last group
# that is not whole.
SHAPES = [
    (torch.bfloat16, 4096, 14336, 4096, "silu", 1),
    (torch.bfloat16, 4096, 3001, 4096, "silu", 4),
    (torch.bfloat16, 8192, 5003, 8192, "silu", 1),
    (torch.bfloat16, 8192, 999, 8192, "gelu", 3),
    (torch.bfloat16, 14336, 1500, 14336, "silu", 1),
    (torch.bfloat16, 2048, 8191, 2048, "silu", 2),
    (torch.bfloat16, 2880, 2003, 2880, "gelu_tanh", 1),
    (torch.bfloat16, 584, 1001, 600, "silu", 3),
    (torch.bfloat16, 64, 7, 64, "silu", 3),
    (torch.bfloat16, 8, 2, 16, "silu", 1),
    (torch.float16, 4096, 2003, 4096, "relu", 1),
    (torch.float16, 896, 4864, 896, "silu", 4),
    (torch.float32, 4096, 1501, 4096, "silu", 1),
    (torch.float32, 1000, 333, 1200, "gelu", 4),
    (torch.float32, 8192, 301, 8192, "silu", 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_preview_and_second_decision(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    for bits, second in ((4, ""), (8, ""), (0, "vector"), (4, "scalar"), (4, "vector")):
        if bits == 8 and shape[1] == 14336:
            continue  # see test_a_tile_must_fit_into_the_ring
        Case(*shape, bits=bits, second=second).check("cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_preview_of_products(shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    for bits, second in ((4, ""), (8, ""), (4, "vector")):
        if bits == 8 and shape[1] == 14336:
            continue
        Case(*shape, bits=bits, second=second, products=True).check("cuda")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_many_tokens(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    kinds = ((0, False), (4, False), (8, False), (4, True))
    for (bits, products), second in itertools.product(kinds, ("", "scalar", "vector")):
        case = Case(dtype, 512, 701, 520, "silu", 11, bits, second, products)
        for threshold in (case.cut(0.5), case.cut(0.97)):
            for backend in ("auto", "cuda"):
                y = case.call(threshold, True, backend=backend)
                assert case.error(y, threshold, True) < TOLERANCE[dtype], (bits, second, backend)


@pytest.mark.parametrize("products", [False, True])
def test_dropped_rows_are_not_read(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    case = Case(torch.bfloat16, 1024, 3000, 1024, "silu", 2, 4, "vector", products)
    threshold = case.cut(0.6)
    expected = case.call(threshold, True)
    gated = (case.decided.abs() > threshold).any(dim=0)
    down = ((case.decided.abs() > threshold) & case.stays).any(dim=0)
    for weight, kept in zip(case.weights, (gated, gated, down), strict=True):
        weight[~kept] = float("nan")
    assert torch.equal(case.call(threshold, True), expected)


@pytest.mark.parametrize("hostile", [0.0, float("inf"), float("nan"), 1e38, 1e-40])
def test_hostile_scales(hostile: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They touch the neuron they belong to, and no other."""
    only(monkeypatch)
    case = Case(torch.bfloat16, 512, 900, 512, "silu", 1, bits=4, products=True)
    case.extra["preview_scale"][17, 3] = hostile
    case.extra["preview_scale"][917, 3] = hostile
    case.weights[2][17] = 0  # whatever is decided there
    y = case.call(case.cut(0.5), False)
    assert case.error(y, case.cut(0.5), False) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_input_that_is_not_finite(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never taken for a number: the neurons that the reference keeps are kept."""
    only(monkeypatch)
    case = Case(torch.bfloat16, 512, 900, 512, "silu", 1, bits=4)
    case.x[0, 77] = bad
    threshold = case.cut(0.5)
    decided = case.call(threshold, False)
    arguments = (case.x, *case.weights, threshold, case.act, None, None, None)
    expected = gated_mlp_reference(*arguments, *case.extra.values())
    assert torch.equal(decided.isnan(), expected.isnan())


def test_what_does_not_fit_runs_elsewhere() -> None:
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1, bits=4)
    assert cuda._fits(Call(case.x, *case.weights, case.cut(0.5), case.act, **case.extra))
    rows = case.extra["preview"]
    odd = torch.zeros(rows.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(rows)
    case.extra["preview"] = odd.copy_(rows)
    assert not cuda._fits(Call(case.x, *case.weights, case.cut(0.5), case.act, **case.extra))
    y = case.call(case.cut(0.5), True)
    assert case.error(y, case.cut(0.5), True) < TOLERANCE[case.dtype]


def test_a_tile_must_fit_into_the_ring() -> None:
    """Else its dots would wait for rows that there is no room for. A layer leaves such a preview
    out; a bare call goes elsewhere."""
    case = Case(torch.bfloat16, 16384, 300, 16384, "silu", 1, bits=8)
    assert not cuda._fits(Call(case.x, *case.weights, case.cut(0.5), case.act, **case.extra))
    y = case.call(case.cut(0.5), True)
    assert case.error(y, case.cut(0.5), True) < TOLERANCE[case.dtype]
    device, decisions = case.x.device, Decisions(PreviewKind(8, products=False))
    choice = choose_backend(Backend.AUTO, device, case.dtype, (16384, 300, 16384), decisions)
    assert choice.backend is Backend.CUDA
    reason = "8-bit previews of 300 neurons of 16384 do not fit in shared memory"
    assert choice.without_preview == reason
