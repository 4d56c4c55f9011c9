"""The Triton kernels, on a GPU against fp64; run there with ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import hub
from catsparse.data import load_windows
from catsparse.kernels import cuda
from gpu_op import Case

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
