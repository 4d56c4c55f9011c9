"""The Triton kernels compile to machine code for several GPUs, where there is none."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from catsparse.kernels import triton as kernels

triton = pytest.importorskip("triton")

GPUS = (80, 89, 90)


def build(kernel: Any, capability: int, constants: dict[str, Any], **options: Any) -> bytes:
    """Every argument that is no constant by its name: weights bf16, lists int32, sizes int32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {
        **dict.fromkeys(("x", "w_gate", "w_up", "w_down_t", "y", "z", "u", "h"), "*bf16"),
        **dict.fromkeys(("threshold", "mean", "bias", "kept_gate", "partial"), "*fp32"),
        "kept_index": "*i32",
    }
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name != "T"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code: bytes = compiled.asm["cubin"]
    return code


@pytest.mark.parametrize("capability", GPUS)
def test_stream_and_sum(capability: int) -> None:
    from catsparse.kernels.triton.stream import stream_kernel, sum_kernel

    early = capability >= 90
    for hidden, tokens in ((4096, 1), (512, 4)):
        plan = kernels.find_plan(hidden, tokens, kernels.DTYPES[0])
        constants = {
            "ACT": "silu",
            "PER_NEURON": True,
            "HAS_MEAN": True,
            "TOKENS": tokens,
            "BLOCK_H": hidden,
            "EVEN": True,
            "ROWS": plan.rows,
            "PDL": early,
            "PREFETCH_KB": kernels.PREFETCH_KB,
            "THREADS": plan.warps * 32,
        }
        options = {"num_warps": plan.warps, "maxnreg": plan.registers}
        assert build(stream_kernel, capability, constants, **options)[:4] == b"\x7fELF"
    constants = {"HAS_BIAS": True, "BLOCK_P": 512, "BLOCK_N": kernels.SUM_COLUMNS, "PDL": early}
    assert build(sum_kernel, capability, constants, num_warps=kernels.SUM_WARPS)[:4] == b"\x7fELF"


@pytest.mark.parametrize("capability", GPUS)
def test_mask(capability: int) -> None:
    from catsparse.kernels.triton.mask import mask_kernel

    acts = ("silu", "gelu_tanh", "gelu", "relu")
    for (number, act), compensated in itertools.product(enumerate(acts), (False, True)):
        constants: dict[str, Any] = {
            "ACT": act,
            "PER_NEURON": number % 2 == 0,
            "HAS_MEAN": compensated,
            "BLOCK": kernels.MASK_BLOCK,
        }
        if not compensated:
            constants["mean"] = None
        assert build(mask_kernel, capability, constants)[:4] == b"\x7fELF"
