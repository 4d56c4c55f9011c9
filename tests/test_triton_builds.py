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

WEIGHTS = {"float": "*bf16", "int8": "*i32", "fp8": "*i32", "int4": "*i32", "bytes": "*u8"}
# What packed weights need is the same on every GPU of a kind.
BUILDS = [(gpu, "float") for gpu in GPUS]
BUILDS += list(itertools.product(("sm80", "gfx942"), list(WEIGHTS)[1:]))
SIZES = ((4096, 1), (512, 4))  # elements of a row, tokens

MATRICES = ("w_gate", "w_up", "w_down_t")
SCALES = ("gate_scale", "up_scale", "down_scale")
FLOATS = ("threshold", "product_threshold", "mean", "bias", "kept_gate", "partial", "gate")
TYPES = {
    **dict.fromkeys(("x", "w_gate", "w_up", "w_down_t", "y", "z", "u", "h", "scale"), "*bf16"),
    **dict.fromkeys((*FLOATS, "hidden"), "*fp32"),
    **dict.fromkeys(("kept_index", "kept", "index", "preview"), "*i32"),
}


def build(
    gpu: str, kernel: Any, constants: Mapping[str, Any], weights: str = "float", **options: Any
) -> dict[str, Any]:
    """Every argument that is no constant by its name: weights bf16, lists int32, sizes int32.

    Args:
        weights: the format, or ``bytes``: int8 in rows that are not whole words.

    Returns the code by kind; ``cubin`` or ``hsaco`` is the machine's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = TYPES | ({"x": "*fp32"} if "preview" in names else {})
    types |= dict.fromkeys(MATRICES, WEIGHTS[weights])
    if "preview" not in names:
        types |= dict.fromkeys((*SCALES, "scale"), "*bf16" if weights == "int4" else "*fp32")
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


def shape(weights: str, hidden: int, plan: plans.Plan, tokens: int) -> dict[str, Any]:
    """The constants of kernels that hold whole rows."""
    weights = {"bytes": "int8"}.get(weights, weights)
    words = hidden // plans.fields(weights)
    constants = {
        "FORMAT": weights,
        "TOKENS": tokens,
        "BLOCK": words,
        "RUN": plans.run_words(words, plan.warps),
        "EVEN": True,
    }
    return constants | (dict.fromkeys(SCALES) if weights == "float" else {})


def packed(weights: str) -> str | None:
    return None if weights == "float" else weights


def amd(gpu: str) -> bool:
    return gpu.startswith("gfx")


def early(gpu: str) -> bool:
    return gpu == "sm90"


@pytest.mark.parametrize(("gpu", "weights"), BUILDS)
def test_stream_and_sum(gpu: str, weights: str) -> None:
    """Rows are read in pieces of 16 bytes, or as many as there are for a thread."""
    from catsparse.kernels.triton.stream import stream_kernel, sum_kernel

    for hidden, tokens in SIZES if weights == "float" else SIZES[:1]:
        plan = plans.find_plan(hidden, tokens, kernels.DTYPES[0], packed(weights))
        constants = {
            "ACT": "silu",
            "PER_NEURON": True,
            "HAS_MEAN": True,
            "ROWS": plan.rows,
            "PDL": early(gpu),
            "PREFETCH_KB": plans.PREFETCH_KB,
            "THREADS": plan.warps * 32,
        }
        constants |= shape(weights, hidden, plan, tokens)
        options = {"num_warps": plan.warps, "maxnreg": plan.registers}
        code = build(gpu, stream_kernel, constants, weights, **options)
        if hidden == 4096 and weights != "bytes" and not amd(gpu):
            lines = [line for line in code["ptx"].split("\n") if "L1::evict_first" in line]
            assert lines
            assert all(f"v{2 if weights == 'int4' else 4}.b32" in line for line in lines)
    constants = {
        "HAS_BIAS": True,
        "FORMAT": constants["FORMAT"],
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
        # int4 weights are their own preview, and the gate comes with it.
        constants |= {"gate": None} if products or bits == 8 else {}
        code = build(gpu, preview_kernel, constants, num_warps=plans.DECIDE_WARPS)
        if amd(gpu):
            assert "_load_b128" in code["amdgcn"] or "load_dwordx4" in code["amdgcn"]
            continue
        lines = [line for line in code["ptx"].split("\n") if "ld.global.L1::evict_first" in line]
        assert lines
        assert all("v4.b32" in line for line in lines)


@pytest.mark.parametrize(("gpu", "weights"), BUILDS)
def test_second_decision(gpu: str, weights: str) -> None:
    from catsparse.kernels.triton.decide import gate_kernel
    from catsparse.kernels.triton.kept import kept_kernel

    kinds = [(True, False), (True, True), (False, True)]
    for hidden, tokens in SIZES if weights == "float" else SIZES[:1]:
        plan = plans.find_plan(hidden, tokens, kernels.DTYPES[0], packed(weights))
        rows = shape(weights, hidden, plan, tokens)
        constants: dict[str, Any] = {
            "ACT": "silu",
            "PER_NEURON": True,
            "H": hidden,
            "TOKENS": tokens,
            "FORMAT": rows["FORMAT"],
            "BLOCK_N": plans.GATE_ROWS,
            "BLOCK_K": plans.GATE_COLUMNS // plans.fields(rows["FORMAT"]),
            "PDL": early(gpu),
        }
        constants |= {"scale": None} if weights == "float" else {}
        if weights != "int4":  # whose gate is read as a preview
            build(gpu, gate_kernel, constants, weights, num_warps=plans.DECIDE_WARPS)
        for preview, second in kinds if weights == "float" else kinds[1:2]:
            constants = {
                "ACT": "silu",
                "PREVIEW": preview,
                "SECOND": second,
                "PER_NEURON": second,
                "HAS_MEAN": True,
                "BLOCK_L": plans.LIST_BLOCK,
                "ROWS": plans.kept_rows(plan, kernels.DTYPES[0], packed(weights)),
                "PDL": early(gpu),
            }
            constants |= rows
            constants |= {"gate": None} if preview else {}
            constants |= {} if second else {"product_threshold": None}
            options = {"num_warps": plan.warps, "maxnreg": plan.registers}
            build(gpu, kept_kernel, constants, weights, **options)
