"""The CUDA kernels on packed weights, on a GPU: against fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from catsparse.kernels import FORMATS, Call, cuda, dequantize_weight, gated_mlp_reference, quantize
from catsparse.kernels.linear import linear, why_not_linear
from catsparse.kernels.stream import Norm
from gpu_op import HOPPER, TOLERANCE, Case, only

pytestmark = HOPPER

# Sizes are multiples of 64, for int4.
SHAPES = [
    (torch.bfloat16, 4096, 14336, 4096, "silu", 1),
    (torch.bfloat16, 4096, 3001, 4096, "silu", 4),
    (torch.bfloat16, 2048, 8191, 2048, "silu", 2),
    (torch.bfloat16, 8192, 999, 8192, "gelu", 3),
    (torch.bfloat16, 14336, 700, 14336, "silu", 1),
    (torch.bfloat16, 576, 1001, 640, "gelu_tanh", 3),
    (torch.bfloat16, 64, 7, 64, "silu", 7),
    (torch.float16, 896, 4864, 896, "relu", 4),
    (torch.float32, 4096, 1501, 4096, "silu", 1),
    (torch.float32, 1024, 333, 1216, "gelu", 4),
    (torch.float32, 320, 864, 320, "silu", 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", FORMATS)
def test_against_fp64_and_repeatable_in_a_graph(
    packed: str, shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    for second in ("", "vector"):
        Case(*shape, second=second, packed=packed).check("cuda")


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[5:8] + SHAPES[9:10], ids=str)
@pytest.mark.parametrize("packed", ["int8", "fp8"])
def test_previews(packed: str, shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    for bits, products, second in ((4, False, ""), (8, False, "vector"), (4, True, "")):
        case = Case(*shape, bits=bits, products=products, second=second, packed=packed)
        case.check("cuda")


def test_int4_is_its_own_preview() -> None:
    case = Case(torch.bfloat16, 512, 700, 512, "silu", 1, bits=4, packed="int4")
    call = Call(case.x, *case.weights, case.cut(0.5), case.act, **case.extra)
    assert not cuda._fits(call)
    assert cuda._fits(call._replace(preview=None, preview_scale=None))


def test_scales_between_pieces_run_elsewhere() -> None:
    case = Case(torch.bfloat16, 512, 700, 512, "silu", 1, packed="int4")
    call = Call(case.x, *case.weights, case.cut(0.5), case.act, **case.extra)
    odd = torch.empty(700 * 8 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(700, 8)
    odd.copy_(case.extra["up_scale"])
    assert cuda._fits(call)
    assert not cuda._fits(call._replace(up_scale=odd))


@pytest.mark.parametrize("packed", FORMATS)
def test_many_tokens(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    for tokens in (9, 17, 40):
        case = Case(torch.bfloat16, 512, 701, 512, "silu", tokens, packed=packed)
        threshold = case.cut(0.5)
        for compensated in (False, True):
            error = case.error(case.call(threshold, compensated), threshold, compensated)
            # Above the op's tokens the weights are rounded to bf16, too.
            assert error < TOLERANCE[torch.bfloat16] * (1 if tokens <= 16 else 2), tokens


@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-38, 3e38])
def test_hostile_inputs(packed: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not finite in the reference is not finite here, and the other token is right."""
    only(monkeypatch)
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 2, packed=packed)
    x = case.x.clone()
    x[1, 17] = value
    keep_all = torch.tensor(-1.0, device="cuda")
    call = Call(x, *case.weights, keep_all, case.act, **case.extra)
    y, truth = cuda.gated_mlp_cuda(call, "cuda"), gated_mlp_reference(*call)
    assert y[0].isfinite().all()
    assert torch.equal(y[1].isfinite().any(), truth[1].isfinite().any())
    case.x[1] = case.x[0]
    assert torch.equal(y[0], case.call(keep_all, False, backend="cuda")[0])


@pytest.mark.parametrize("packed", ["int8", "fp8"])
def test_dropped_rows_are_not_used(packed: str) -> None:
    case = Case(torch.bfloat16, 512, 701, 512, "silu", 2, packed=packed)
    threshold = case.cut(0.5)
    dropped = ~(case.decided.abs() > threshold).any(0)
    y = case.call(threshold, False)
    case.extra["up_scale"][dropped] = float("nan")
    case.extra["down_scale"][dropped] = float("nan")
    assert torch.equal(case.call(threshold, False), y)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "rows"), [(576, (100, 7, 1)), (4096, (300, 200)), (256, (5,)), (1024, (130001,))]
)
def test_linear(
    packed: str, dtype: torch.dtype, tokens: int, hidden: int, rows: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    pairs = [quantize(torch.randn(n, hidden, device="cuda") * hidden**-0.5, packed) for n in rows]
    weights, scales = zip(*pairs, strict=True)
    assert why_not_linear(weights, dtype) is None
    x = (3 * torch.randn(tokens, hidden, device="cuda")).to(dtype)
    norm = Norm(torch.rand(hidden, device="cuda").to(dtype), 1e-5)
    residual = torch.randn(tokens, sum(rows), device="cuda").to(dtype)
    biases = [None, *(torch.randn(n, device="cuda").to(dtype) for n in rows[1:])]
    for used, added in itertools.product((None, norm), (None, residual)):
        y = linear(x, weights, biases, used, added, scales=scales)
        wide = x.double()
        if used is not None:
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
            wide = (wide.to(dtype) * norm.weight).double()
        exact = [dequantize_weight(*pair, torch.float64) for pair in pairs]
        parts = [
            wide @ w.T + (0 if b is None else b.double())
            for w, b in zip(exact, biases, strict=True)
        ]
        truth = torch.cat(parts, dim=1) + (0 if added is None else added.double())
        assert float((y.double() - truth).norm() / truth.norm()) < TOLERANCE[dtype]
        assert torch.equal(y, linear(x, weights, biases, used, added, scales=scales))
