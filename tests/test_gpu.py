"""The whole path on a CUDA device; run there with ``pytest -m gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from catsparse import achieved_sparsity, calibrate, densify, hub, kernels, sparsify
from catsparse.calibration import Calibration
from catsparse.data import load_windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    tokenizer = hub.load_tokenizer("default")
    return load_windows(hub.bundled_text("calibration"), tokenizer, tokens=8192, seq_len=256)


@pytest.fixture(scope="module")
def calibration(windows: torch.Tensor) -> Calibration:
    return calibrate(hub.load_dense_model("default").cuda(), windows, progress=False)


def _model(dtype: torch.dtype) -> Any:
    return hub.load_dense_model("default", dtype=dtype).cuda()


def test_calibration_agrees_with_the_cpu(windows: torch.Tensor, calibration: Calibration) -> None:
    on_cpu = calibrate(hub.load_dense_model("default"), windows, progress=False)
    for method in ("cats", "chess", "energy"):
        gpu, cpu = calibration.thresholds(0.5, method), on_cpu.thresholds(0.5, method)
        for name in gpu:
            assert gpu[name].sparsity == pytest.approx(cpu[name].sparsity, abs=2e-3)
            torch.testing.assert_close(gpu[name].threshold, cpu[name].threshold, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_logits_agree_with_the_cpu(
    dtype: torch.dtype, windows: torch.Tensor, calibration: Calibration
) -> None:
    gpu, cpu = (
        sparsify(m, calibration, 0.5) for m in (_model(dtype), hub.load_dense_model("default"))
    )
    with torch.no_grad():
        ours = gpu(input_ids=windows[:2].cuda()).logits.float().cpu()
        theirs = cpu.float()(input_ids=windows[:2]).logits
    # Devices round differently, which flips a decision here and there among three million.
    assert ((ours - theirs).norm() / theirs.norm()) < (1e-2 if dtype == torch.float32 else 5e-2)


def test_zero_sparsity_is_bitwise_dense(windows: torch.Tensor, calibration: Calibration) -> None:
    model = _model(torch.bfloat16)
    ids = windows[:2].cuda()
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        sparse = sparsify(model, calibration, 0.0)(input_ids=ids).logits
    assert torch.equal(dense, sparse)


def test_prefill_and_decode_masks_agree(windows: torch.Tensor, calibration: Calibration) -> None:
    model = sparsify(_model(torch.bfloat16), calibration, 0.5)
    ids = windows[:1].cuda()
    keeps: dict[str, list[torch.Tensor]] = {"prefill": [], "decode": []}
    module = model.model.layers[3].mlp
    with torch.no_grad():
        inputs: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        model(input_ids=ids)
        handle.remove()
        module.catsparse_counter = lambda keep, kept: keeps["prefill"].append(keep)
        module(inputs[0])
        module.catsparse_counter = None
        w_gate = module.gate_proj.weight.float()
        for x in inputs[0][0]:  # decode decides on the gate accumulated and activated in fp32
            g = kernels.ACTIVATIONS["silu"](w_gate @ x.float())
            keeps["decode"].append(g.abs() > module.catsparse_threshold)
    agreement = (keeps["prefill"][0][0] == torch.stack(keeps["decode"])).float().mean()
    assert agreement >= 0.999


def test_op_is_captured_in_a_cuda_graph(calibration: Calibration) -> None:
    model = sparsify(_model(torch.bfloat16), calibration, 0.5)
    module = model.model.layers[0].mlp
    x = torch.randn(1, 1, 320, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(x)
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(captured, module(x))


def test_generate_with_static_cache_and_compile(calibration: Calibration) -> None:
    model = sparsify(_model(torch.float32), calibration, 0.5)
    ids = hub.load_tokenizer("default")("The captain", return_tensors="pt").input_ids.cuda()
    options = {"max_new_tokens": 24, "do_sample": False, "repetition_penalty": 1.0}
    eager = model.generate(ids, **options)
    compiled = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(eager, compiled)


def test_meter_and_densify(windows: torch.Tensor, calibration: Calibration) -> None:
    model = sparsify(_model(torch.bfloat16), calibration, 0.7)
    with achieved_sparsity(model) as meter, torch.no_grad():
        model(input_ids=windows.cuda()[:8])
    assert meter.sparsity == pytest.approx(0.7, abs=0.03)
    densify(model)
    assert not hasattr(model, "catsparse")
