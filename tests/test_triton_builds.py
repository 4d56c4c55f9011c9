"""The Triton kernels compile to machine code for several GPUs, where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from catsparse.kernels import triton as kernels
from catsparse.kernels.preview import groups_of
from catsparse.kernels.triton import plans

triton = pytest.importorskip("triton")

# Architectures, of NVIDIA by compute capability, of AMD by name, and the threads of a warp.
GPUS = {"sm80": (80, 32), "sm89": (89, 32), "sm90": (90, 32)}
GPUS |= {"gfx942": ("gfx942", 64), "gfx1100": ("gfx1100", 32)}

FLOATS = ("threshold", "product_threshold", "mean", "bias", "kept_gate", "partial", "gate")
TYPES = {
    **dict.fromkeys(("x", "w_gate", "w_up", "w_down_t", "y", "z", "u", "h", "scale"), "*bf16"),
    **dict.fromkeys((*FLOATS, "hidden"), "*fp32"),
    **dict.fromkeys(("kept_index", "kept", "index", "preview"), "*i32"),
}


def build(gpu: str, kernel: Any, constants: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Every argument that is no constant by its name: weights bf16, lists int32, sizes int32.

    Returns the code by kind; ``cubin`` or ``hsaco`` is the machine's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = TYPES | ({"x": "*fp32"} if "preview" in names else {})
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name != "T"
    }
    arch, warp = GPUS[gpu]
    if amd(gpu):
        options.pop("maxnreg", None)
    target = GPUTarget("hip" if amd(gpu) else "cuda", arch, warp)
    source = ASTSource(kernel, signature, dict(constants), aligned)
    compiled = triton.compile(source, target=target, options=options)
    code: dict[str, Any] = compiled.asm
    assert code["hsaco" if amd(gpu) else "cubin"][:4] == b"\x7fELF"
    return code


def amd(gpu: str) -> bool:
    return gpu.startswith("gfx")


def early(gpu: str) -> bool:
    return gpu == "sm90"


@pytest.mark.parametrize("gpu", GPUS)
def test_stream_and_sum(gpu: str) -> None:
    from catsparse.kernels.triton.stream import stream_kernel, sum_kernel

    for hidden, tokens in ((4096, 1), (512, 4)):
        plan = plans.find_plan(hidden, tokens, kernels.DTYPES[0])
        constants = {
            "ACT": "silu",
            "PER_NEURON": True,
            "HAS_MEAN": True,
            "TOKENS": tokens,
            "BLOCK_H": hidden,
            "EVEN": True,
            "ROWS": plan.rows,
            "PDL": early(gpu),
            "PREFETCH_KB": plans.PREFETCH_KB,
            "THREADS": plan.warps * 32,
        }
        build(gpu, stream_kernel, constants, num_warps=plan.warps, maxnreg=plan.registers)
    constants = {
        "HAS_BIAS": True,
        "BLOCK_P": 512,
        "BLOCK_N": plans.SUM_COLUMNS,
        "PDL": early(gpu),
    }
    build(gpu, sum_kernel, constants, num_warps=plans.SUM_WARPS)


@pytest.mark.parametrize("gpu", GPUS)
def test_mask(gpu: str) -> None:
    from catsparse.kernels.triton.mask import mask_kernel

    acts = ("silu", "gelu_tanh", "gelu", "relu")
    for (number, act), compensated in itertools.product(enumerate(acts), (False, True)):
        constants: dict[str, Any] = {
            "ACT": act,
            "PER_NEURON": number % 2 == 0,
            "HAS_MEAN": compensated,
            "BLOCK": plans.MASK_BLOCK,
        }
        if not compensated:
            constants["mean"] = None
        build(gpu, mask_kernel, constants)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("bits", [4, 8])
def test_preview(gpu: str, bits: int) -> None:
    """Rows are read in pieces of 16 bytes: the swapped runs do not hide that they are in order."""
    from catsparse.kernels.triton.decide import preview_kernel

    for (hidden, tokens), products in itertools.product(((4096, 1), (2880, 4)), (False, True)):
        constants = {
            "ACT": "silu",
            "PER_NEURON": True,
            "PRODUCTS": products,
            "GROUPS": groups_of(hidden),
            "BITS": bits,
            "TOKENS": tokens,
            "BLOCK_N": plans.preview_rows(tokens),
            "BLOCK_W": plans.WORDS,
            "PDL": early(gpu),
        }
        code = build(gpu, preview_kernel, constants, num_warps=plans.DECIDE_WARPS)
        if amd(gpu):
            assert "_load_b128" in code["amdgcn"] or "load_dwordx4" in code["amdgcn"]
            continue
        lines = [line for line in code["ptx"].split("\n") if "ld.global.L1::evict_first" in line]
        assert lines
        assert all("v4.b32" in line for line in lines)


@pytest.mark.parametrize("gpu", GPUS)
def test_second_decision(gpu: str) -> None:
    from catsparse.kernels.triton.decide import gate_kernel
    from catsparse.kernels.triton.kept import kept_kernel

    for hidden, tokens in ((4096, 1), (512, 4)):
        plan = plans.find_plan(hidden, tokens, kernels.DTYPES[0])
        constants: dict[str, Any] = {
            "ACT": "silu",
            "PER_NEURON": True,
            "H": hidden,
            "TOKENS": tokens,
            "BLOCK_N": plans.GATE_ROWS,
            "BLOCK_K": plans.GATE_COLUMNS,
            "PDL": early(gpu),
        }
        build(gpu, gate_kernel, constants, num_warps=plans.DECIDE_WARPS)
        for preview, second in ((True, False), (True, True), (False, True)):
            constants = {
                "ACT": "silu",
                "PREVIEW": preview,
                "SECOND": second,
                "PER_NEURON": second,
                "HAS_MEAN": True,
                "TOKENS": tokens,
                "BLOCK_H": hidden,
                "BLOCK_L": plans.LIST_BLOCK,
                "EVEN": True,
                "ROWS": plans.kept_rows(plan, kernels.DTYPES[0]),
                "PDL": early(gpu),
            }
            constants |= {"gate": None} if preview else {}
            constants |= {} if second else {"product_threshold": None}
            options = {"num_warps": plan.warps, "maxnreg": plan.registers}
            build(gpu, kept_kernel, constants, **options)
