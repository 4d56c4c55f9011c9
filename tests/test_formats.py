"""Packed weights: rounded as torchao rounds, and the kernels on them against loops in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import KERNEL_TOLERANCE, Case, unpacked
from catsparse.kernels import (
    FORMATS,
    MAX_OP_TOKENS,
    cpu,
    dequantize_weight,
    format_of,
    gated_mlp,
    gated_mlp_reference,
    make_preview,
    quantize,
)
from catsparse.kernels.formats import columns_of, is_packed

DTYPES = list(KERNEL_TOLERANCE)
# Hidden size, neurons, columns, tokens: either side of vectors and blocks; int4 has whole groups.
ANY_SIZES = [(1, 1, 1, 1), (37, 101, 41, 1), (129, 65, 683, 3), (16, 300, 15, 16), (70, 43, 71, 6)]
WHOLE_GROUPS = [(64, 1, 64, 1), (192, 101, 64, 1), (512, 35, 576, 3), (256, 300, 704, 16)]


def sizes(weights: str) -> list[tuple[int, int, int, int]]:
    return WHOLE_GROUPS if weights == "int4" else ANY_SIZES


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# Rounding


@pytest.mark.parametrize("weights", FORMATS)
def test_each_weight_becomes_the_nearest_number(weights: str) -> None:
    w = normal(7, 192)
    packed, scale = quantize(w, weights)
    assert (format_of(packed), columns_of(packed)) == (weights, 192)
    assert is_packed(packed, scale)
    exact = unpacked(packed, scale)
    assert torch.equal(dequantize_weight(packed, scale, torch.float64).float(), exact.float())
    error = (exact - w).abs()
    most = w.abs().amax(dim=1, keepdim=True)
    steps = {"int8": most / 254, "fp8": torch.maximum(w.abs() / 16, most / 448 / 512 / 2)}
    if weights in steps:
        assert bool((error <= steps[weights] * 1.0001).all())
    assert float(error.norm() / w.norm()) < {"int8": 0.01, "fp8": 0.04, "int4": 0.11}[weights]


@pytest.mark.parametrize("weights", FORMATS)
def test_rows_of_zeros_stay_zeros_and_huge_ones_finite(weights: str) -> None:
    w = torch.stack([torch.zeros(64), torch.full((64,), 3e38), torch.full((64,), 1e-30)])
    exact = unpacked(*quantize(w, weights))
    assert not exact[0].any()
    assert bool(exact.isfinite().all())
    # Scales of int4 have five significant bits, rounded up.
    assert float((exact[1] / w[1] - 1).abs().max()) < (1 / 32 if weights == "int4" else 0.01)


def test_int8_is_that_of_torchaos_primitives() -> None:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = normal(40, 96)
    scale, zero = ao.choose_qparams_affine(
        *(w, ao.MappingType.SYMMETRIC, (1, 96), torch.int8),
        quant_min=-127,
        quant_max=127,
        eps=1e-30,
        zero_point_dtype=torch.int32,
    )
    theirs = ao.quantize_affine(w, (1, 96), scale, zero, torch.int8, -127, 127)
    packed, mine = quantize(w, "int8")
    torch.testing.assert_close(mine, scale.flatten(), rtol=1e-6, atol=0)
    assert float((packed == theirs).float().mean()) > 0.999  # ties, and the scale's last bit
    assert int((packed.int() - theirs.int()).abs().max()) <= 1


def test_fp8_is_torchaos() -> None:
    ao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(96, 40, bias=False)
    exact = unpacked(*quantize(layer.weight, "fp8"))
    ao.quantize_(layer, ao.Float8WeightOnlyConfig())
    theirs = layer.weight.dequantize().double()
    assert float((exact - theirs).abs().max() / theirs.abs().max()) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="none of int8, fp8, int4"):
        quantize(normal(2, 64), "int3")
    with pytest.raises(ValueError, match="not whole groups of 64"):
        quantize(normal(2, 65), "int4")
    packed, scale = quantize(normal(4, 64), "int8")
    assert not is_packed(packed, None)
    assert not is_packed(normal(4, 64), scale)
    assert not is_packed(packed, scale[:3])
    assert not is_packed(packed, scale.bfloat16())
    packed, scale = quantize(normal(4, 64), "int4")
    assert not is_packed(packed, scale[:, :4])
    assert not is_packed(packed, scale.float())


# The CPU kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The op, with no reference to fall back on."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("the reference ran in the kernel's place")

    if cpu.cpu_library().handle is None:
        pytest.skip(f"no kernel: {cpu.cpu_library().reason}")
    monkeypatch.setattr(cpu, "gated_mlp_reference", refuse)
    return gated_mlp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
def test_against_loops(kernel: Any, weights: str, dtype: torch.dtype) -> None:
    pack = partial(quantize, weights=weights)
    for seed, (hidden, neurons, columns, tokens) in enumerate(sizes(weights)):
        act = ("silu", "gelu_tanh", "gelu", "relu")[seed % 4]
        for compensated, second in ((False, False), (True, seed % 2 == 1)):
            case = Case(
                *(hidden, neurons, tokens, act, dtype, seed % 2 == 0, compensated, seed, columns),
                second=second,
                pack=pack,
            )
            case.check(kernel(*case.arguments), 2e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("products", [False, True])
def test_a_preview_decides_for_packed_weights(
    kernel: Any, weights: str, bits: int, products: bool
) -> None:
    """The preview is of the weights as they were before, so it is not the packed gate."""
    case = Case(
        *(130, 65, 3, "silu", torch.float32, False, True, 3),
        quantize=make_preview,
        bits=bits,
        products=products,
        pack=partial(quantize, weights=weights),
    )
    case.check(kernel(*case.arguments))


@pytest.mark.parametrize("weights", FORMATS)
def test_the_reference(weights: str) -> None:
    case = Case(64, 33, 2, "silu", compensated=True, pack=partial(quantize, weights=weights))
    case.check(gated_mlp_reference(*case.arguments))


@pytest.mark.parametrize("weights", FORMATS)
def test_results_repeat_whatever_the_threads(kernel: Any, weights: str) -> None:
    case = Case(512, 300, 3, pack=partial(quantize, weights=weights), dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(kernel(*case.arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_every_number_of_a_format(kernel: Any, weights: str) -> None:
    """All 256 codes as rows of W_down, read one at a time; NaN is NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 19).contiguous()
    down, scale = codes.view(FORMATS[weights]), torch.full((256,), 0.5)
    gate, ones = quantize(torch.ones(256, 4), weights)
    for i in (0, 1, 7, 8, 126, 127, 128, 129, 200, 255):
        threshold = torch.full((256,), float("inf"))
        threshold[i] = -1.0
        x = torch.ones(1, 4)
        y = kernel(
            *(x, gate, gate, down, threshold, "relu"),
            gate_scale=ones,
            up_scale=ones,
            down_scale=scale,
        )
        expected = unpacked(down[i : i + 1], scale[i : i + 1]).expand(1, 19) * 16
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("weights", FORMATS)
def test_dropped_rows_are_not_read(kernel: Any, weights: str) -> None:
    """Scales that are not numbers, of neurons that are dropped, change nothing."""
    case = Case(64, 40, 1, pack=partial(quantize, weights=weights))
    g = abs(case.gate_by_hand()[0])
    dropped = torch.from_numpy(g <= float(case.threshold))
    assert 0 < int(dropped.sum()) < 40
    expected = kernel(*case.arguments)
    for scale in case.scales[1:]:
        scale[dropped] = float("nan")
    assert torch.equal(kernel(*case.arguments), expected)


@pytest.mark.parametrize("weights", FORMATS)
def test_what_the_kernel_does_not_take_runs_in_torch(weights: str) -> None:
    pack = partial(quantize, weights=weights)
    many = Case(64, 40, MAX_OP_TOKENS + 1, pack=pack)
    many.check(gated_mlp(*many.arguments))
    case = Case(64, 40, 2, pack=pack)
    x, gate, up, down, *rest = case.arguments
    mixed = dequantize_weight(up, case.scales[1], torch.float32)
    gate_scale, _, down_scale = case.scales
    y = gated_mlp(x, gate, mixed, down, *rest[:3], gate_scale=gate_scale, down_scale=down_scale)
    case.check(y)


@pytest.mark.parametrize("weights", FORMATS)
def test_the_op_keeps_its_contract(weights: str) -> None:
    case = Case(64, 40, 2, pack=partial(quantize, weights=weights))
    names = ("test_schema", "test_faketensor")[weights == "fp8" :]  # torch cannot multiply fp8
    torch.library.opcheck(torch.ops.catsparse.gated_mlp.default, case.arguments, test_utils=names)
