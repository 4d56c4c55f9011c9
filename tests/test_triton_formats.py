"""The Triton kernels on packed weights on a CPU, by Triton's interpreter, against fp64.

Weights meet x as the numbers they stand for, in fp32, and are not rounded to x's dtype as the
reference rounds them. So the tolerances are those of weights in floats: the result is rounded once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BY_HAND, KEEP, KERNEL_TOLERANCE, Case, same
from catsparse.kernels import FORMATS, Call, cuda, dequantize_weight, make_preview, quantize
from catsparse.kernels import triton as kernels
from catsparse.kernels.triton import launches, plans
from interpreting import inside, outside, run_interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
rows = pytest.importorskip("catsparse.kernels.triton.rows")
column_of, decode, fields = rows.column_of, rows.decode, rows.fields

# The interpreter rounds to bf16 towards zero.
TOLERANCE = KERNEL_TOLERANCE | {torch.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)
# Hidden size, neurons, columns, tokens: rows that are whole words and such that are not, whole
# powers of two and not; of int4 either side of a block of runs, and with a rest behind it.
ANY_SIZES = [(1, 1, 1, 1), (37, 4, 41, 1), (64, 7, 64, 2), (129, 3, 83, 3), (192, 4, 100, 4)]
WHOLE_GROUPS = [(64, 5, 64, 1), (192, 4, 64, 2), (512, 3, 576, 3), (1088, 2, 128, 4)]
SHAPES = [(weights, shape) for weights in ("int8", "fp8") for shape in ANY_SIZES]
SHAPES += [("int4", shape) for shape in WHOLE_GROUPS]
# Bits of a preview, whether it is of products, and a second decision.
PLAIN = (0, False, False)
KINDS = [(4, False, False), (0, False, True), (8, True, True), (4, True, False)]


@outside
def test_in_a_process_that_interprets() -> None:
    run_interpreted(__file__)


def run(*arguments: Any) -> Tensor:
    """As the op does it on a GPU that cuda.cu does not serve: in groups of tokens."""
    call = Call(*arguments)
    assert kernels.fits_triton(call)
    parts = call.x.split(kernels.MAX_TOKENS)
    return torch.cat([kernels.gated_mlp_triton(call._replace(x=part)) for part in parts])


def packed_case(weights: str, shape: tuple[int, ...], number: int, *kind: Any) -> Case:
    hidden, neurons, columns, tokens = shape
    bits, products, second = kind
    return Case(
        *(hidden, neurons, tokens, list(BY_HAND)[number % 4], DTYPES[number % 3]),
        per_neuron=number % 2 == 0,
        compensated=number % 4 > 1,
        columns=columns,
        quantize=make_preview if bits else None,
        bits=bits,
        products=products,
        second=second,
        pack=partial(quantize, weights=weights),
    )


@inside
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("weights", "shape"), SHAPES, ids=str)
def test_against_loops(weights: str, shape: tuple[int, ...]) -> None:
    at = SHAPES.index((weights, shape))
    for number, kind in enumerate((PLAIN, KINDS[at % 4])):
        case = packed_case(weights, shape, at + number, *kind)
        y = run(*case.arguments)
        case.check(y, TOLERANCE[case.dtype])
        assert number or shape[3] != 2 or torch.equal(run(*case.arguments), y)


@inside
@pytest.mark.parametrize("weights", FORMATS)
def test_threads_that_read_several_words(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in long rows, and in more groups of tokens than one; and with the plan of long rows."""
    plan = plans.find_plan(4096, 1, torch.bfloat16, weights)
    assert plan.rows == (4 if weights == "int4" else 2)
    monkeypatch.setattr(plans, "run_words", lambda *_: 4 if weights == "int4" else 2)
    case = packed_case(weights, (128, 3, 192, 5), 0, *PLAIN)
    case.check(run(*case.arguments), TOLERANCE[case.dtype])
    monkeypatch.setattr(plans, "find_plan", lambda *_: plan)
    case = packed_case(weights, (576, 7, 64, 1), 1, *KINDS[0])
    case.check(run(*case.arguments), TOLERANCE[case.dtype])


@inside
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("gap", [3, 4])
def test_rows_with_gaps(weights: str, gap: int) -> None:
    """Of fp8's NaN, which a read past a row's end would bring in."""
    shape, kind = ((58, 5, 35, 2), PLAIN) if gap == 3 else ((60, 5, 36, 2), KINDS[1])
    case = packed_case(weights, shape, 0, *kind)
    x, *packed = case.arguments[:4]
    for i, w in enumerate(packed):
        wide = torch.full((w.shape[0], w.shape[1] + gap), 0x7F, dtype=torch.uint8)
        wide[:, : w.shape[1]] = w.view(torch.uint8)
        packed[i] = wide.view(w.dtype)[:, : w.shape[1]]
    raw = launches.raw_weights(Call(x, *packed, *case.arguments[4:]))
    assert raw[0].dtype == (torch.int32 if gap == 4 else torch.uint8)
    case.check(run(x, *packed, *case.arguments[4:]), TOLERANCE[case.dtype])


@triton.jit
def decode_kernel(words, numbers, FORMAT: tl.constexpr):
    at = tl.arange(0, 256)
    word = tl.load(words + at)
    for k in tl.static_range(fields(FORMAT)):
        tl.store(numbers + column_of(at, k, FORMAT), decode(word, k, FORMAT))


def every_number(weights: str, device: str) -> tuple[Tensor, Tensor]:
    """All numbers of a format, each in each place of a word: decoded, and as they should be."""
    codes = (torch.arange(256)[:, None] + torch.arange(4) * 77).to(torch.uint8)
    numbers = torch.empty(256 * (8 if weights == "int4" else 4), device=device)
    decode_kernel[(1,)](codes.view(torch.int32).to(device), numbers, FORMAT=weights)
    if weights == "int4":  # as in row 0, whose runs have kept their places
        row, groups = codes.view(1, -1), torch.ones(1, 32, dtype=torch.bfloat16)
        return numbers.cpu(), dequantize_weight(row, groups, torch.float32).flatten()
    return numbers.cpu(), codes.flatten().view(FORMATS[weights]).float()


@inside
@pytest.mark.parametrize("weights", FORMATS)
def test_every_number_of_a_format(weights: str) -> None:
    assert same(*every_number(weights, "cpu"))


# What is dropped is not read


@inside
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("tokens", "bits"), [(1, 0), (3, 4)])
def test_dropped_rows_are_not_read(weights: str, tokens: int, bits: int) -> None:
    second = tokens == 1  # behind W_gate itself
    case = packed_case(weights, (64, 6, 64, tokens), 0, bits, False, second)
    third = torch.arange(6) % 3
    case.threshold = torch.where(third == 0, torch.inf, KEEP)
    if second:
        case.product_threshold = torch.where(third == 1, torch.inf, KEEP)
    expected = run(*case.arguments)
    assert expected.isfinite().all()
    gate, up, down = case.scales
    gate[(third == 0) & bool(bits)] = torch.nan
    up[third == 0] = torch.nan
    down[(third == 0) | ((third == 1) & second)] = torch.nan
    assert torch.equal(run(*case.arguments), expected)


# Scales that are not ordinary


def truth(call: Call) -> Tensor:
    """In fp64, from the rows of neurons that any token keeps; scales of rows outside of the sums,
    which makes a difference where they are infinite."""
    scales = [call.gate_scale, call.up_scale, call.down_scale]
    numbers = []
    for w, scale in zip(call[1:4], scales, strict=True):
        outside = scale is not None and scale.dim() == 1
        numbers.append(w.double() if outside else dequantize_weight(w, scale, torch.float64))
    outer = [s.double() if s is not None and s.dim() == 1 else 1.0 for s in scales]
    x = call.x.double()
    g = (x @ numbers[0].T * outer[0]).relu()
    h = g * (x @ numbers[1].T * outer[1])
    keep = g.abs() > call.threshold
    rows = keep.any(0)
    return (torch.where(keep, h, 0.0) * outer[2])[:, rows] @ numbers[2][rows]


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_hostile_scales(weights: str, place: int) -> None:
    """They touch the neuron they belong to, and those tokens that keep it."""
    for tokens, hostile in ((1, (0.0, 1e-40, 1e30)), (3, (torch.inf,)), (1, (torch.nan,))):
        if (weights, place, hostile) == ("int4", 0, (torch.inf,)):
            continue  # infinite or, by another order of the sum, NaN
        case = packed_case(weights, (64, 4, 64, tokens), 0, *PLAIN)
        for row, value in enumerate(hostile):
            case.scales[place].view(4, -1)[row, 0] = value
        scales = dict(zip(("gate_scale", "up_scale", "down_scale"), case.scales, strict=True))
        call = Call(case.x, *case.packed, case.threshold, "relu", **scales)
        y, expected = kernels.gated_mlp_triton(call).double(), truth(call)
        good = expected.isfinite()
        assert torch.equal(y.isfinite(), good)
        torch.testing.assert_close(y[good], expected[good], rtol=1e-4, atol=1e-5)


# Whether they come here


@inside
@pytest.mark.parametrize("weights", FORMATS)
def test_the_op_comes_here_where_cuda_does_not_serve(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("another implementation ran")

    monkeypatch.setattr(cuda, "why_not_cuda", lambda device: "an older one")
    monkeypatch.setattr(cuda, "why_not_triton", lambda device: None)
    monkeypatch.setattr(cuda, "gated_mlp_reference", never)
    case = packed_case(weights, (64, 3, 64, 5), 0, *PLAIN)
    case.check(cuda.gated_mlp_cuda(Call(*case.arguments)), TOLERANCE[case.dtype])


def test_what_is_taken() -> None:
    def call(weights: str) -> Call:
        return Call(*packed_case(weights, (64, 9, 128, 2), 0, *PLAIN).arguments)

    for weights in FORMATS:
        assert kernels.fits_triton(call(weights))
        mixed = call(weights)._replace(w_up=call("int8" if weights == "fp8" else "fp8").w_up)
        assert not kernels.fits_triton(mixed)
        columns = call(weights)
        assert not kernels.fits_triton(columns._replace(w_down_t=columns.w_down_t.t()))
    # int4 is read in words where it lies; the others anywhere.
    for weights in FORMATS:
        moved = call(weights)
        up = moved.w_up.view(torch.uint8).flatten()
        up = torch.cat([up[:1], up])[1:].view(moved.w_up.shape).view(moved.w_up.dtype)
        moved = moved._replace(w_up=up)
        assert kernels.fits_triton(moved) == (weights != "int4")
        if weights != "int4":
            assert {w.dtype for w in launches.raw_weights(moved)} == {torch.uint8}
