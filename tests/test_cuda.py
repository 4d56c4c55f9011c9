"""The CUDA kernel, on a GPU against fp64; run there with ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import hub
from catsparse.data import load_windows
from catsparse.kernels import Call, cuda, gated_mlp
from catsparse.kernels.stream import whole_pieces
from gpu_op import HOPPER, TOLERANCE, Case, only

pytestmark = HOPPER

SHAPES = [
    (torch.bfloat16, 4096, 14336, 4096, "silu", 1),
    (torch.bfloat16, 4096, 14336, 4096, "silu", 2),
    (torch.bfloat16, 2048, 8191, 2048, "silu", 4),
    (torch.bfloat16, 3000, 5003, 3000, "gelu_tanh", 1),
    (torch.bfloat16, 8192, 28672, 8192, "silu", 1),
    (torch.bfloat16, 8192, 999, 8192, "silu", 3),
    (torch.bfloat16, 16384, 1500, 16384, "silu", 3),
    (torch.bfloat16, 32768, 700, 32768, "relu", 2),
    (torch.float16, 896, 4864, 896, "silu", 1),
    (torch.float16, 2560, 1001, 2560, "gelu", 4),
    (torch.float16, 576, 1536, 576, "silu", 16),
    (torch.float32, 320, 864, 320, "silu", 1),
    (torch.float32, 1000, 333, 1200, "gelu", 2),
    (torch.float32, 4096, 11008, 4096, "silu", 3),
    (torch.float32, 16384, 300, 16384, "silu", 1),
    (torch.bfloat16, 5120, 1111, 2560, "relu", 1),
    (torch.bfloat16, 64, 7, 64, "silu", 3),
    (torch.bfloat16, 8, 2, 16, "silu", 1),
    (torch.float32, 4, 2, 4, "gelu_tanh", 1),
    (torch.bfloat16, 256, 100_000, 256, "silu", 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64_and_repeatable_in_a_graph(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    Case(*shape).check("cuda")


@pytest.mark.parametrize("tokens", [9, 16])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_many_tokens_run_masked_matmuls(
    dtype: torch.dtype, act: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    monkeypatch.setattr(cuda, "launch", None)
    case = Case(dtype, 512, 701, 520, act, tokens)
    for name, threshold in case.thresholds().items():
        for compensated in (False, True):
            y = case.call(threshold, compensated)
            assert y.dtype == dtype
            assert case.error(y, threshold, compensated) < TOLERANCE[dtype], name


@pytest.mark.parametrize(
    "shape",
    [(torch.bfloat16, 100, 300, 100, "silu", 1), (torch.float32, 30, 333, 31, "silu", 2)],
    ids=str,
)
def test_rows_that_are_not_whole_pieces_run_elsewhere(shape: tuple[Any, ...]) -> None:
    case = Case(*shape)
    assert not cuda._fits(Call(case.x, *case.weights, case.cut(0.5), case.act))
    y = case.call(case.cut(0.5), True)
    assert case.error(y, case.cut(0.5), True) < TOLERANCE[case.dtype]


def test_views_that_start_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 2)
    wide = torch.zeros(1 + case.x.numel(), device="cuda", dtype=case.dtype)
    wide[1:] = case.x.flatten()
    expected = case.call(case.cut(0.5), True)
    case.x = wide[1:].view_as(case.x)
    assert torch.equal(case.call(case.cut(0.5), True), expected)


def test_weights_between_pieces_run_elsewhere() -> None:
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1)
    odd = torch.zeros(1 + 300 * 256, device="cuda", dtype=case.dtype)[1:].view(300, 256)
    odd.copy_(case.weights[1])
    assert not whole_pieces(odd)
    case.weights = (case.weights[0], odd, case.weights[2])
    assert case.error(case.call(case.cut(0.5), False), case.cut(0.5), False) < 8e-3


def test_an_expert_is_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1)
    gate, up, down = (
        torch.stack([torch.full_like(w, float("nan")), w, torch.full_like(w, float("nan"))])
        for w in case.weights
    )
    expected = case.call(case.cut(0.5), False)
    y = gated_mlp(case.x, gate[1], up[1], down[1], case.cut(0.5), "silu")
    assert torch.equal(y, expected)


def test_dropped_rows_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite weights of neurons that a token drops change nothing for it."""
    only(monkeypatch)
    case = Case(torch.bfloat16, 512, 700, 512, "silu", 3)
    threshold = case.cut(0.6)
    kept = case.g.abs() > threshold
    expected = case.call(threshold, False)
    for token in range(3):
        case.weights[2][~kept[token] & kept[(token + 1) % 3]] = float("inf")
        case.weights[2][~kept.any(0)] = float("nan")
        y = case.call(threshold, False)
        assert torch.equal(y[token], expected[token])
        case = Case(torch.bfloat16, 512, 700, 512, "silu", 3)


def test_a_gate_that_is_not_a_number_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    for act in ("silu", "relu"):
        case = Case(torch.bfloat16, 256, 300, 256, act, 1)
        case.weights[0][5] = float("nan")
        assert torch.isfinite(case.call(torch.tensor(-1.0, device="cuda"), False)).all()


def test_on_any_stream_and_in_threads_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that overlap on several streams do not disturb each other."""
    only(monkeypatch)
    cases = [Case(torch.bfloat16, 2048, 4096 + i, 2048, "silu", 1 + i % 4) for i in range(6)]
    expected = [case.call(case.cut(0.5), True) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.call(case.cut(0.5), True))
        torch.cuda.synchronize()
        assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


def test_the_first_call_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    case = Case(torch.float16, 1048, 517, 1048, "gelu", 1)  # compiled nowhere else
    threshold = case.cut(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.call(threshold, True)
    graph.replay()
    assert case.error(captured, threshold, True) < TOLERANCE[case.dtype]


def test_results_of_a_call_feed_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels start early but wait for what they read: a chain equals calls one by one."""
    only(monkeypatch)
    case = Case(torch.float32, 512, 1024, 512, "silu", 1)
    x = case.x

    def chain(wait: bool) -> Tensor:
        case.x = x
        for _ in range(50):
            y = case.call(case_threshold, True)
            case.x = y / y.norm() * 20
            if wait:
                torch.cuda.synchronize()
        return case.x

    case_threshold = case.cut(0.5)
    alone = chain(True)
    assert all(torch.equal(chain(False), alone) for _ in range(5))


def test_compiled_whole() -> None:
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1)
    threshold = case.cut(0.5)

    def double(x: Tensor) -> Tensor:
        return 2 * gated_mlp(x, *case.weights, threshold, "silu", case.mean, case.bias)

    compiled = torch.compile(double, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        y = compiled(case.x).clone()
    torch.testing.assert_close(y, 2 * case.call(threshold, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_decodes_by_the_kernel_as_by_torch(dtype: torch.dtype) -> None:
    tokenizer = hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=4096, seq_len=256)
    model = hub.load_dense_model("default", dtype=dtype).cuda()
    catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False))
    ids = windows[:1, :1].cuda()
    with torch.no_grad():
        assert "the cuda kernel (faster than torch" in catsparse.explain(model)
        logits = model(ids).logits
        catsparse.set_backend(model, "torch")
        torch_logits = model(ids).logits
        catsparse.set_backend(model, "triton")
        triton_logits = model(ids).logits
    bound = 1e-3 if dtype == torch.float32 else 5e-2
    for other in (torch_logits, triton_logits):
        assert float((logits - other).norm() / other.norm()) < bound


def test_a_graph_captured_before_any_call_leaves_no_copy_behind() -> None:
    tokenizer = hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=2048, seq_len=256)
    model = hub.load_dense_model("default", dtype=torch.float32).cuda()
    catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False))
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, 320, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            captured = mlp(x)
        eager = mlp(x)  # before the graph ever ran
        graph.replay()
        torch.testing.assert_close(captured, eager, rtol=1e-4, atol=1e-5)


def test_only_triton_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(torch.bfloat16, 256, 300, 256, "silu", 1)
    monkeypatch.setattr(cuda, "launch", None)
    y = case.call(case.cut(0.5), True, backend="triton")
    assert case.error(y, case.cut(0.5), True) < 8e-3
