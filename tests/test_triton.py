"""The Triton kernels, on a GPU against fp64; run there with ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
from cases import same
from catsparse import hub
from catsparse.data import load_windows
from catsparse.kernels import FORMATS, backend, cuda, gated_mlp_reference, keep_mask
from catsparse.modules import sparse_modules
from gpu_op import TOLERANCE, Case
from test_triton_formats import every_number
from test_triton_preview import decided_by_reference, exact_call, masks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SHAPES = [
    (torch.bfloat16, 4096, 14336, 4096, "silu", 1),
    (torch.bfloat16, 3000, 5003, 3000, "gelu_tanh", 1),
    (torch.bfloat16, 8192, 999, 8192, "silu", 1),
    (torch.bfloat16, 8192, 999, 8192, "silu", 2),
    (torch.float16, 896, 4864, 896, "silu", 1),
    (torch.float16, 2560, 1001, 2560, "gelu", 4),
    (torch.float32, 321, 864, 317, "silu", 1),
    (torch.float32, 1000, 333, 1200, "gelu", 2),
    (torch.float32, 4096, 700, 4096, "silu", 3),
    (torch.bfloat16, 5120, 1111, 5120, "relu", 1),
    (torch.bfloat16, 64, 7, 64, "silu", 3),
    (torch.bfloat16, 63, 70, 61, "silu", 16),
    (torch.bfloat16, 1, 2, 1, "silu", 1),
]


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other implementation is an error."""

    def never(*_: object) -> Tensor:
        raise AssertionError("another implementation ran")

    monkeypatch.setattr(cuda, "gated_mlp_reference", never)
    monkeypatch.setattr(cuda, "launch", never)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64_and_repeatable_in_a_graph(shape: tuple[Any, ...]) -> None:
    Case(*shape).check("triton")


# Bits, the second decision, and whether the preview is of products.
KINDS = [
    (4, "", False),
    (8, "", True),
    (0, "vector", False),
    (4, "vector", True),
    (8, "scalar", False),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_previews_and_second_decisions(shape: tuple[Any, ...], kind: tuple[Any, ...]) -> None:
    Case(*shape, *kind).check("triton")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", FORMATS)
def test_packed_weights(packed: str, shape: tuple[Any, ...]) -> None:
    """Plain, with a second decision, and with previews of other numbers than theirs."""
    if packed == "int4" and (shape[1] % 64 or shape[3] % 64):
        pytest.skip("rows are not whole groups")
    for kind in ((0, "", False), (0, "vector", False), (4, "", False), (8, "scalar", True)):
        Case(*shape, *kind, packed).check("triton")


@pytest.mark.parametrize("packed", FORMATS)
def test_every_number_of_a_format(packed: str) -> None:
    assert same(*every_number(packed, "cuda"))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("packed", FORMATS)
def test_dropped_packed_rows_are_not_read(packed: str, tokens: int) -> None:
    for bits, second in ((0, ""), (0, "vector"), (4, "vector")):
        case = Case(torch.bfloat16, 1024, 3000, 1024, "silu", tokens, bits, second, packed=packed)
        threshold = case.cut(0.6)
        expected = case.call(threshold, True, backend="triton")
        gated = (case.decided.abs() > threshold).any(dim=0)
        down = ((case.decided.abs() > threshold) & case.stays).any(dim=0)
        if bits:
            case.extra["gate_scale"][~gated] = float("nan")
        case.extra["up_scale"][~gated] = float("nan")
        case.extra["down_scale"][~down] = float("nan")
        assert torch.equal(case.call(threshold, True, backend="triton"), expected)


@pytest.mark.parametrize("hostile", [0.0, float("nan"), 1e-40])
@pytest.mark.parametrize("packed", FORMATS)
def test_hostile_scales_of_packed_weights(packed: str, hostile: float) -> None:
    """Such a gate is below any threshold, and no other neuron's changes."""
    case = Case(torch.bfloat16, 512, 900, 512, "silu", 1, packed=packed)
    threshold = case.cut(0.5)
    case.extra["gate_scale"].view(900, -1)[17] = hostile
    case.decided[:, 17] = 0
    y = case.call(threshold, False, backend="triton")
    assert case.error(y, threshold, False) < TOLERANCE[case.dtype]


def test_packed_weights_that_the_cuda_kernel_does_not_take_run_here() -> None:
    odd = Case(torch.bfloat16, 250, 300, 250, "silu", 3, packed="int8")
    previewed = Case(torch.bfloat16, 512, 300, 512, "silu", 1, 8, packed="int4")
    for case in (odd, previewed):
        threshold = case.cut(0.5)
        assert torch.equal(case.call(threshold, True), case.call(threshold, True, backend="triton"))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_masks_are_the_references_bit_for_bit(bits: int, products: bool) -> None:
    for tokens, hidden in ((1, 1100), (2, 4096), (3, 700), (4, 2048)):
        call = exact_call(bits, tokens, products, hidden)
        decided = decided_by_reference(call)
        expected = keep_mask(decided, decided, call.threshold)
        on_gpu = {k: v.cuda() for k, v in call._asdict().items() if isinstance(v, Tensor)}
        assert torch.equal(masks(call._replace(**on_gpu)).cpu(), expected)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_dropped_rows_are_not_read(tokens: int, products: bool) -> None:
    case = Case(torch.bfloat16, 1024, 3000, 1024, "silu", tokens, 4, "vector", products)
    threshold = case.cut(0.6)
    expected = case.call(threshold, True, backend="triton")
    gated = (case.decided.abs() > threshold).any(dim=0)
    down = ((case.decided.abs() > threshold) & case.stays).any(dim=0)
    for weight, kept in zip(case.weights, (gated, gated, down), strict=True):
        weight[~kept] = float("nan")
    assert torch.equal(case.call(threshold, True, backend="triton"), expected)


@pytest.mark.parametrize("hostile", [0.0, float("inf"), float("nan"), 1e38, 1e-40])
def test_hostile_scales(hostile: float) -> None:
    """They touch the neuron they belong to, and no other."""
    case = Case(torch.bfloat16, 512, 900, 512, "silu", 1, bits=4, products=True)
    threshold = case.cut(0.5)
    case.extra["preview_scale"][17, 3] = hostile
    case.extra["preview_scale"][917, 3] = hostile
    case.weights[2][17] = 0  # whatever is decided there
    y = case.call(threshold, False, backend="triton")
    assert case.error(y, threshold, False) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_an_input_that_is_not_finite(bad: float) -> None:
    case = Case(torch.bfloat16, 512, 900, 512, "silu", 1, bits=4)
    threshold = case.cut(0.5)
    case.x[0, 77] = bad
    arguments = (case.x, *case.weights, threshold, case.act, None, None, None)
    expected = gated_mlp_reference(*arguments, *case.extra.values())
    assert torch.equal(case.call(threshold, False, backend="triton").isnan(), expected.isnan())


@pytest.mark.parametrize("method", ["energy", "product"])
def test_auto_takes_it_for_previews_where_cuda_does_not_serve(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (backend, cuda):
        monkeypatch.setattr(module, "why_not_cuda", lambda device: "an older GPU")
    tokenizer = hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=4096, seq_len=256)
    model = hub.load_dense_model("default").float().cuda()
    calibration = catsparse.calibrate(model, windows, preview=4, progress=False)
    catsparse.sparsify(model, calibration, 0.5, method)
    words = "the triton kernel (an older GPU; torch would read all for a preview"
    assert catsparse.explain(model).count(words) == len(sparse_modules(model))
    ids = windows[:1, :4].cuda()
    with torch.no_grad():
        logits = model(ids).logits
        catsparse.set_backend(model, "torch")
        expected = model(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-3


def test_what_the_cuda_kernel_does_not_take_runs_here() -> None:
    case = Case(torch.bfloat16, 250, 300, 250, "silu", 3)
    threshold = case.cut(0.5)
    assert torch.equal(case.call(threshold, True), case.call(threshold, True, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_decodes_by_the_kernel_as_by_torch(dtype: torch.dtype) -> None:
    tokenizer = hub.load_tokenizer("default")
    windows = load_windows(hub.bundled_text("calibration"), tokenizer, tokens=4096, seq_len=256)
    model = hub.load_dense_model("default", dtype=dtype).cuda()
    catsparse.sparsify(model, catsparse.calibrate(model, windows, progress=False))
    ids = windows[:1, :1].cuda()
    with torch.no_grad():
        catsparse.set_backend(model, "torch")
        torch_logits = model(ids).logits
        catsparse.set_backend(model, "triton")
        assert "the triton kernel (asked for)" in catsparse.explain(model)
        logits = model(ids).logits
    error = (logits - torch_logits).norm() / torch_logits.norm()
    assert float(error) < (1e-3 if dtype == torch.float32 else 5e-2)
