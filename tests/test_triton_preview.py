"""The Triton kernels with previews and second decisions on a CPU, by Triton's interpreter: against
loops in fp64, and the masks against the reference bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BY_HAND, DROP, KEEP, KERNEL_TOLERANCE, Case
from catsparse.kernels import (
    ACTIVATIONS,
    Call,
    cuda,
    gated_mlp_reference,
    keep_mask,
    make_preview,
    preview_of,
)
from catsparse.kernels import triton as kernels
from catsparse.kernels.triton import launches, plans
from interpreting import inside, outside, run_interpreted

# The interpreter rounds to bf16 towards zero.
TOLERANCE = KERNEL_TOLERANCE | {torch.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


@outside
def test_in_a_process_that_interprets() -> None:
    run_interpreted(__file__)


def run(*arguments: Any) -> Tensor:
    """As the op does it on a GPU that cuda.cu does not serve: in groups of tokens."""
    call = Call(*arguments)
    assert kernels.fits_triton(call)
    parts = call.x.split(kernels.MAX_TOKENS)
    return torch.cat([kernels.gated_mlp_triton(call._replace(x=part)) for part in parts])


def previewed(*shape: int, bits: int = 4, second: bool = False, **options: Any) -> Case:
    """A case (hidden, neurons, tokens) with a preview."""
    return Case(*shape, quantize=make_preview, bits=bits, second=second, **options)


# Against loops


@inside
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "columns", "dtype"),
    [
        ((1, 1, 1), 1, torch.float32),
        ((7, 33, 1), 9, torch.float16),
        ((63, 11, 2), 65, torch.bfloat16),
        ((64, 5, 4), 64, torch.float32),
        ((65, 13, 3), 3, torch.float16),
        ((513, 9, 1), 40, torch.bfloat16),
        ((700, 5, 2), 11, torch.float32),
    ],
    ids=str,
)
def test_against_loops(shape: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    """4, 8 or no bits, of the gate and of products, with one or two decisions."""
    kinds = [(4, False, False), (8, False, True), (4, True, True), (8, True, False)]
    for number, (bits, products, second) in enumerate([*kinds, (0, False, True)]):
        case = Case(
            *shape,
            act=list(BY_HAND)[(number + shape[1]) % 4],
            dtype=dtype,
            per_neuron=number % 2 == 0,
            compensated=number % 3 > 0,
            columns=columns,
            quantize=make_preview if bits else None,
            bits=bits,
            second=second,
            products=products,
        )
        y = run(*case.arguments)
        case.check(y, TOLERANCE[dtype])
        assert torch.equal(run(*case.arguments), y)


@inside
@pytest.mark.parametrize("tokens", [5, 16])
def test_more_tokens_than_a_launch_takes(tokens: int) -> None:
    for products in (False, True):
        options = {"second": True, "per_neuron": True, "compensated": True, "products": products}
        case = previewed(75, 12, tokens, **options)
        case.check(run(*case.arguments), TOLERANCE[case.dtype])


@inside
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_the_plans_of_long_rows(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans.find_plan(4096, 1, dtype)
    assert plan.rows == rows
    monkeypatch.setattr(plans, "find_plan", lambda *_: plan)
    monkeypatch.setattr(plans, "LIST_BLOCK", 4)  # a slice of the neurons is listed in turns
    for bits in (4, 0):
        quantize = make_preview if bits else None
        case = Case(70, 40, 1, dtype=dtype, quantize=quantize, second=True, compensated=True)
        case.check(run(*case.arguments), TOLERANCE[dtype])


# The mask, bit for bit


def exact_call(bits: int, tokens: int, products: bool, hidden: int = 1100) -> Call:
    """Small whole numbers throughout, so that every sum is exact in whatever order; thresholds are
    values that occur."""
    torch.manual_seed(bits + tokens)
    neurons = 37
    weights = torch.randn(2, neurons, hidden)
    packed, scale = make_preview(weights[0], bits, weights[1] if products else None)
    packed = torch.randint(256, packed.shape, dtype=torch.uint8)
    scale = (2.0 ** torch.randint(0, 2, scale.shape)).bfloat16()
    x = torch.randint(-2, 3, (tokens, hidden)) * (torch.rand(tokens, hidden) < 0.02)
    call = Call(
        x.float(),
        *weights,
        torch.ones(neurons, 8),
        torch.tensor(0.0),
        "relu",
        preview=packed,
        preview_scale=scale,
    )
    decided = decided_by_reference(call)
    at = torch.arange(neurons)
    return call._replace(threshold=decided[at % tokens, at].abs().float())


def decided_by_reference(call: Call) -> Tensor:
    assert call.preview is not None
    assert call.preview_scale is not None
    relu = ACTIVATIONS[call.act]
    return preview_of(call.x.double(), call.preview, call.preview_scale, len(call.w_gate), relu)


def masks(call: Call) -> Tensor:
    """``[T, I]`` as the first launch decides."""
    kept, _ = launches.decide(call, plans.Launch.of(call))
    tokens = torch.arange(len(call.x), device=kept.device)
    return (kept >> tokens[:, None] & 1).bool()


@inside
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_masks_are_the_references_bit_for_bit(bits: int, products: bool) -> None:
    for tokens in (1, 2, 3, 4):
        call = exact_call(bits, tokens, products)
        decided = decided_by_reference(call)
        assert torch.equal(decided, decided.float().double())
        for nudge in (1.0, 0.999, 1.001):
            threshold = call.threshold * nudge
            expected = keep_mask(decided, decided, threshold)
            assert torch.equal(masks(call._replace(threshold=threshold)), expected)
        kept = float(keep_mask(decided, decided, call.threshold).float().mean())
        assert tokens == 1 or 0.05 < kept < 0.95


@inside
@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_meets_its_input(bits: int) -> None:
    """Input j is 1 in token 0 alone, and only weight j of neuron j is not zero."""
    hidden = 600 if bits == 4 else 300
    values = 2 ** (bits - 1) - 1 - torch.arange(hidden) % 2**bits
    weight = torch.diag(values.float())
    packed, scale = make_preview(-torch.eye(hidden) * 2 ** (bits - 1), bits)
    assert bool((scale[torch.arange(hidden), torch.arange(hidden) // 64] == 1).all())
    n = (values + 2 ** (bits - 1)).to(torch.uint8)
    whole = packed.shape[1] // 256 * 256
    for j in range(hidden):
        place = j if bits == 8 else j // 64 * 32 + j % 32
        place = place ^ j % 4 * 64 if place < whole else place
        low = bits == 8 or j % 64 < 32
        packed[j, place] = n[j] if bits == 8 else (8 << 4 | n[j]) if low else (n[j] << 4 | 8)
    size = values.abs().float()
    for nudge, kept in ((0.999, values != 0), (1.0, torch.zeros(hidden, dtype=torch.bool))):
        call = Call(
            torch.ones(1, hidden),
            weight,
            weight,
            weight,
            size * nudge,
            "relu",
            preview=packed,
            preview_scale=scale,
        )
        assert torch.equal(masks(call)[0], kept & (values > 0))


@inside
def test_a_second_decision_at_its_threshold_drops() -> None:
    """By magnitude, and before the mean is taken off."""
    w_up = torch.tensor([[1.0], [2.0], [-2.0], [3.0], [-3.0]])
    one, mean = torch.ones(5, 1), torch.full((5,), 2.5)
    weights = (torch.ones(1, 1), one, w_up, torch.eye(5))
    y = run(*weights, torch.tensor(0.5), "relu", mean, None, torch.tensor(2.0))
    assert y.tolist() == [[0, 0, 0, 0.5, -5.5]]
    packed, scale = make_preview(one * 7, 4)
    for threshold, kept in ((7.0, False), (6.99, True)):
        y = run(*weights, torch.tensor(threshold), "relu", None, None, None, packed, scale)
        assert y.tolist() == [w_up[:, 0].tolist() if kept else [0] * 5]


@inside
def test_each_token_has_its_own_masks() -> None:
    """Token t has preview and gate t, and |h| = t: three ways of dropping by neuron."""
    tokens, neurons = 6, 18
    x = torch.arange(1.0, tokens + 1)[:, None]
    one = torch.ones(neurons, 1)
    low = torch.arange(neurons) // 3 + 0.5
    first = torch.where(torch.arange(neurons) % 3 == 1, KEEP, low)
    second = torch.where(torch.arange(neurons) % 3 == 0, KEEP, low + 2)
    packed, scale = make_preview(one, 4)
    y = run(x, one, one, torch.eye(neurons), first, "relu", None, None, second, packed, scale)
    decided = -8 * float(scale[0, 0]) * x  # 1 is rounded to so much
    assert torch.equal(y, torch.where((decided > first) & (x * x > second), x * x, 0.0))


# What is dropped is not read


@inside
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_dropped_rows_are_not_read(tokens: int, products: bool) -> None:
    case = previewed(90, 30, tokens, second=True, products=products)
    third = torch.arange(30) % 3
    case.threshold = torch.where(third == 0, DROP, KEEP)
    case.product_threshold = torch.where(third == 1, DROP, KEEP)
    expected = run(*case.arguments)
    assert expected.isfinite().all()
    case.w_gate[third == 0] = torch.nan
    case.w_up[third == 0] = torch.nan
    case.w_down_t[third < 2] = torch.nan
    assert torch.equal(run(*case.arguments), expected)


@inside
def test_all_kept_and_all_dropped() -> None:
    never = torch.tensor(torch.inf)
    case = previewed(100, 20, 3, bits=8, compensated=True)
    case.threshold = torch.tensor(KEEP)
    case.check(run(*case.arguments), TOLERANCE[case.dtype])
    assert case.preview is not None
    assert case.bias is not None
    weights = (case.x, case.w_gate, case.w_up, case.w_down_t)
    first, second = (torch.tensor(DROP), None), (case.threshold, never)
    for threshold, product in (first, second):
        y = run(*weights, threshold, "silu", case.mean, case.bias, product, *case.preview)
        assert torch.equal(y, case.bias.expand_as(y))
    y = run(*weights, torch.tensor(KEEP), "silu", case.mean, case.bias, never)
    assert torch.equal(y, case.bias.expand_as(y))


# What is not finite, very small or very large


def agree_with_fp32(case: Case) -> None:
    x, *weights = (t.float() for t in case.arguments[:4])
    expected = gated_mlp_reference(x, *weights, *case.arguments[4:])
    y = run(*case.arguments).float()
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-2, atol=1e-2)


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_preview_that_is_not_finite_drops(bits: int, bad: float) -> None:
    """At any threshold. So does one of a finite gate by its scale."""
    acts = ["relu", "silu"] if bits == 4 else ["gelu", "gelu_tanh"]
    for number, act in enumerate(acts):
        case = previewed(130, 8, 1 + 2 * number, act=act, dtype=DTYPES[number], bits=bits)
        case.threshold = torch.tensor(KEEP)
        assert case.preview is not None
        packed, scale = case.preview
        spoilt = case.w_gate.clone()
        spoilt[3, 70], spoilt[7, 129] = bad, bad
        case.preview = make_preview(spoilt, bits)
        scale[3, 1], scale[7, 2] = bad, bad
        packed[3, 64 * bits // 8 : 128 * bits // 8] = 0x88 if bits == 4 else 0x80
        packed[7, 128 * bits // 8 :] = 0x88 if bits == 4 else 0x80
        for preview in (case.preview, (packed, scale)):
            case.preview = preview
            agree_with_fp32(case)
            y = run(*case.arguments)
            case.w_up[3], case.w_up[7] = torch.nan, torch.nan
            assert torch.equal(run(*case.arguments), y)
            case.w_up[3], case.w_up[7] = 1, 1


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("act", BY_HAND)
def test_what_is_not_finite_spreads_as_in_torch(act: str) -> None:
    """A gate that is not finite in a kept neuron; x; and a product, which NaN does not exceed."""
    for name in ("x", "w_gate", "w_up"):
        for bad in (torch.nan, torch.inf)[: 1 if act == "gelu" else 2]:  # torch: gelu(inf) is NaN
            for second, bits in ((False, 4), (True, 4), (True, 0)):
                quantize = make_preview if bits else None
                case = Case(20, 12, 3, act, quantize=quantize, second=second)
                getattr(case, name)[-1, 7] = bad
                agree_with_fp32(case)


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0.0, 2.0**-133, 2.0**-120, 2.0**-40, 2.0**40, 2.0**120], ids=str)
def test_hostile_scales(bits: int, size: float) -> None:
    """Some neurons' whole gate is zero, denormal or huge; their neighbours' is not."""
    for tokens in (1, 3):
        case = previewed(130, 10, tokens, act="relu", bits=bits)
        case.w_gate[::3] = case.w_gate[::3] * size
        case.w_up[::3] = case.w_up[::3] / max(size, 2.0**-90)
        case.preview = make_preview(case.w_gate, bits)
        case.threshold = torch.full((10,), 0.3)
        case.threshold[::3] = 0.3 * size
        agree_with_fp32(case)


# Layouts


@inside
def test_vectors_with_gaps() -> None:
    case = previewed(70, 13, 3, second=True, per_neuron=True, compensated=True)
    expected = run(*case.arguments)
    assert case.preview is not None
    gap = torch.full((13,), torch.nan)
    for name in ("threshold", "product_threshold", "mean"):
        setattr(case, name, torch.stack([getattr(case, name), gap], 1)[:, 0])
    packed, scale = case.preview
    case.preview = packed, scale.t().contiguous().t()
    assert torch.equal(run(*case.arguments), expected)


def test_a_preview_that_would_have_to_be_copied_is_not_taken() -> None:
    case = previewed(70, 21, 2)
    assert case.preview is not None
    packed, scale = case.preview
    assert kernels.fits_triton(Call(*case.arguments))
    shifted = torch.cat([packed.flatten()[:4], packed.flatten()])[4:].view(packed.shape)
    gaps = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    for other in (shifted, gaps):
        case.preview = other, scale
        assert not kernels.fits_triton(Call(*case.arguments))


def test_sizes_that_are_not_taken() -> None:
    sizes: dict[tuple[torch.dtype, int, int, int], str] = {
        (torch.bfloat16, 8192, 2**24 - 1, 8192): "",
        (torch.float32, 1, 1, 1): "",
        (torch.bfloat16, 8193, 1, 1): "rows of 8193 elements do not fit in the registers",
        (torch.bfloat16, 1, 1, 8193): "rows of 8193 elements do not fit in the registers",
        (torch.bfloat16, 1, 2**24, 1): "16777216 neurons are too many",
        (torch.float64, 1, 1, 1): "no kernel for float64",
    }
    for asked, why in sizes.items():
        assert (kernels.why_not_triton_sizes(*asked) or "") == why


# On the way there


def test_amd_gets_no_options_of_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    case = previewed(70, 21, 2)
    launch = plans.Launch.of(Call(*case.arguments))
    assert launch.options == {"num_warps": 8, "maxnreg": launch.plan.registers}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.options == {"num_warps": 8}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    plans.launches_early.cache_clear()
    try:
        assert not plans.launches_early(torch.device("cuda", 0))
    finally:
        plans.launches_early.cache_clear()


def test_which_gpus_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    for hip, cuda_version, capability, why in (
        (None, None, (9, 0), "torch was built without CUDA"),
        (None, "13.0", (7, 5), "GPU is older than compute capability 8.0"),
        (None, "13.0", (8, 0), None),
        ("6.4", None, (9, 4), None),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", cuda_version)
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        assert kernels.why_not_triton(gpu) == why
    assert kernels.why_not_triton(torch.device("cpu")) == "no kernel for cpu"


@inside
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_the_op_comes_here_where_cuda_does_not_serve(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("another implementation ran")

    monkeypatch.setattr(cuda, "why_not_cuda", lambda device: "an older one")
    monkeypatch.setattr(cuda, "why_not_triton", lambda device: None)
    monkeypatch.setattr(cuda, "gated_mlp_reference", never)
    for bits, products, second in ((4, False, False), (8, True, True), (0, False, True)):
        quantize = make_preview if bits else None
        options = {"bits": bits, "products": products, "second": second}
        case = Case(40, 9, 7, quantize=quantize, **options)
        case.check(cuda.gated_mlp_cuda(Call(*case.arguments), backend), TOLERANCE[case.dtype])
