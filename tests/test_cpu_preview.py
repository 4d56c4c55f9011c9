"""The C kernel with a gate preview and a second decision: against loops in fp64, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    BY_HAND,
    DROP,
    KEEP,
    KERNEL_TOLERANCE,
    Case,
    by_columns,
    by_rows,
    check_layouts,
    preview_cases,
)
from catsparse.kernels import MAX_OP_TOKENS, cpu, gated_mlp, gated_mlp_reference, make_preview

DTYPES = list(KERNEL_TOLERANCE)
LAYOUTS = {"rows": by_rows, "columns": by_columns}
NEVER = torch.tensor(torch.inf)  # a threshold that nothing exceeds


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The op, with no reference to fall back on."""
    if cpu.cpu_library().handle is None:
        pytest.skip(f"no kernel: {cpu.cpu_library().reason}")

    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the reference ran in the kernel's place")

    monkeypatch.setattr(cpu, "gated_mlp_reference", refuse)
    return gated_mlp


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def previewed(*shape: int, bits: int = 4, second: bool = False, **options: Any) -> Case:
    """A case (hidden, neurons, tokens) with a preview."""
    return Case(*shape, quantize=make_preview, bits=bits, second=second, **options)


# Against loops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", BY_HAND)
def test_against_loops(kernel: Any, dtype: torch.dtype, act: str) -> None:
    """4, 8 or no bits; both kinds of thresholds; with and without compensation."""
    for tokens, per_neuron, compensated in ((1, True, False), (1, False, True), (6, True, True)):
        for bits, second in ((4, False), (8, False), (4, True), (0, True)):
            case = Case(
                70,
                53,
                tokens,
                act,
                dtype,
                per_neuron,
                compensated,
                quantize=make_preview if bits else None,
                bits=bits,
                second=second,
                columns=73,
            )
            check_layouts(case, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(kernel: Any, dtype: torch.dtype) -> None:
    for case in preview_cases(dtype, make_preview):
        check_layouts(case, kernel)


@pytest.mark.parametrize("tokens", range(1, MAX_OP_TOKENS + 1))
def test_every_number_of_tokens(kernel: Any, tokens: int) -> None:
    for dtype in DTYPES:
        for bits in (4, 8):
            options = {"dtype": dtype, "per_neuron": tokens % 2 == 0, "seed": tokens}
            case = previewed(75, 41, tokens, bits=bits, second=True, compensated=True, **options)
            check_layouts(case, kernel)


def test_the_cases_tell_the_decisions_apart() -> None:
    """Dropping by the gate in the preview's place, or without the second decision, is wrong."""
    case = previewed(70, 53, 6, second=True, per_neuron=True)
    truth = torch.from_numpy(case.by_hand())
    for changed in ({"preview": None}, {"product_threshold": None}):
        other = previewed(70, 53, 6, second=True, per_neuron=True)
        vars(other).update(changed)
        assert (torch.from_numpy(other.by_hand()) - truth).abs().max() > 0.01 * truth.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_meets_its_input(kernel: Any, bits: int, dtype: torch.dtype) -> None:
    """Weight j of neuron j is the only one: |preview| must be its value, at every place and n."""
    hidden = 200
    values = 2 ** (bits - 1) - 1 - torch.arange(hidden) % 2**bits
    weight = torch.diag(values.to(dtype)) * 0.5
    packed, scale = make_preview(-torch.eye(hidden, dtype=dtype) * 2 ** (bits - 1) * 0.5, bits)
    n = values + 2 ** (bits - 1)
    for j in range(hidden):
        if bits == 8:
            packed[j, j ^ j % 4 * 64] = n[j]  # the run of row j that holds input j
        else:
            half, place = j % 64 // 32, j // 64 * 32 + j % 32
            packed[j, place] = (8 << (4 - 4 * half)) | n[j] << (4 * half)
    x = torch.ones(1, hidden, dtype=dtype)
    for nudge, kept in ((0.999, 1.0), (1.0, 0.0)):
        threshold = (values * 0.5).clamp(min=0) * nudge
        one = torch.ones(hidden, hidden, dtype=dtype) / hidden
        y = kernel(
            x,
            weight,
            one,
            torch.eye(hidden, dtype=dtype),
            threshold,
            "relu",
            torch.full((hidden,), -1000.0),
            None,
            None,
            packed,
            scale,
        )
        assert torch.equal(y[0] > 500, (values > 0) & bool(kept))


# Which neurons are kept


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_all_kept_and_all_dropped(kernel: Any, bits: int, tokens: int) -> None:
    for dtype in DTYPES:
        case = previewed(100, 67, tokens, bits=bits, dtype=dtype, compensated=True)
        case.threshold = torch.tensor(KEEP)
        check_layouts(case, kernel)
        assert case.bias is not None
        first = (torch.tensor(DROP), None, *case.preview)
        second = (case.threshold, NEVER, *case.preview)
        for threshold, product, *preview in (first, second):
            for layout in LAYOUTS.values():
                weights = (case.w_gate, case.w_up, layout(case.w_down_t))
                y = kernel(
                    case.x, *weights, threshold, "silu", case.mean, case.bias, product, *preview
                )
                assert torch.equal(y, case.bias.to(dtype).expand_as(y))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_has_its_own_masks(kernel: Any, layout: str) -> None:
    """Token t has preview and gate t, and |h| = t: three ways of dropping by neuron."""
    tokens, neurons = 16, 48
    x = torch.arange(1.0, tokens + 1)[:, None]
    one = torch.ones(neurons, 1)
    low = torch.arange(neurons) // 3 + 0.5
    first = torch.where(torch.arange(neurons) % 3 == 1, KEEP, low)
    second = torch.where(torch.arange(neurons) % 3 == 0, KEEP, low + 2)
    packed, scale = make_preview(one, 4)
    up = one / x[-1]
    down = LAYOUTS[layout](torch.eye(neurons))
    y = kernel(x, one, up, down, first, "relu", None, None, second / 16, packed, scale)
    decided = -8 * float(scale[0, 0]) * x  # 1 is rounded to so much
    h = x * x / 16
    assert torch.equal(y, torch.where((decided > first) & (h > second / 16), h, 0.0))


def test_at_a_threshold_is_dropped(kernel: Any) -> None:
    """Preview and product exactly there; products are compared by magnitude, without the mean."""
    w_up = torch.tensor([[1.0], [2.0], [-2.0], [3.0], [-3.0]])
    one, mean = torch.ones(5, 1), torch.full((5,), 2.5)
    arguments = (torch.ones(1, 1), one, w_up, torch.eye(5), torch.tensor(0.5), "relu", mean, None)
    y = kernel(*arguments, torch.tensor(2.0))
    assert y.tolist() == [[0, 0, 0, 0.5, -5.5]]
    packed, scale = make_preview(one * 7, 4)
    for threshold, kept in ((7.0, False), (6.99, True)):
        x, *weights = arguments[:4]
        y = kernel(x, *weights, torch.tensor(threshold), "relu", None, None, None, packed, scale)
        assert y.tolist() == [w_up[:, 0].tolist() if kept else [0] * 5]


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_rows_are_not_read(kernel: Any, tokens: int, dtype: torch.dtype) -> None:
    """What they hold does not matter: gate, up and down where the preview drops, and down where
    the second decision does."""
    case = previewed(90, 200, tokens, dtype=dtype, second=True)
    third = torch.arange(200) % 3
    case.threshold = torch.where(third == 0, DROP, KEEP)
    case.product_threshold = torch.where(third == 1, DROP, KEEP)
    expected = kernel(*case.arguments)
    assert expected.isfinite().all()
    case.w_gate[third == 0] = torch.nan
    case.w_up[third == 0] = torch.nan
    case.w_down_t[third < 2] = torch.nan
    assert torch.equal(kernel(*case.arguments), expected)


# Bit for bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_the_number_of_threads_changes_no_bit(
    kernel: Any, threads: Callable[[int], None], dtype: torch.dtype, layout: str, tokens: int
) -> None:
    case = previewed(
        131, 700, tokens, dtype=dtype, second=True, per_neuron=True, compensated=True, columns=90
    )
    x, w_gate, w_up, w_down_t, *rest = case.arguments
    arguments = (x, w_gate, w_up, LAYOUTS[layout](w_down_t), *rest)
    expected = kernel(*arguments)
    for count in (2, 3, 1):
        threads(count)
        for _ in range(3):
            assert torch.equal(kernel(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_other_tokens_of_a_batch_change_no_bit(
    kernel: Any, dtype: torch.dtype, bits: int
) -> None:
    for tokens in (2, 5, 16):
        case = previewed(200, 150, tokens, dtype=dtype, bits=bits, second=True)
        x, w_gate, w_up, w_down_t, *rest = case.arguments
        weights = (w_gate, w_up, by_columns(w_down_t))
        batch = kernel(x, *weights, *rest)
        for t in range(tokens):
            assert torch.equal(kernel(x[t : t + 1], *weights, *rest)[0], batch[t])


# What is not finite, very small or very large


def agree_with_fp32(kernel: Any, case: Case) -> None:
    x, *weights = (t.float() for t in case.arguments[:4])
    expected = gated_mlp_reference(x, *weights, *case.arguments[4:])
    y = kernel(*case.arguments).float()
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act", BY_HAND)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_a_preview_that_is_not_finite_drops(kernel: Any, bits: int, act: str, bad: float) -> None:
    """At any threshold. So does one of a finite gate by its scale."""
    for dtype in DTYPES:
        for tokens in (1, 5):
            case = previewed(130, 20, tokens, act=act, dtype=dtype, bits=bits)
            case.threshold = torch.tensor(KEEP)
            packed, scale = case.preview
            spoilt = case.w_gate.clone()
            spoilt[3, 70], spoilt[19, 129] = bad, bad
            case.preview = make_preview(spoilt, bits)
            scale[3, 1], scale[19, 2] = bad, bad
            packed[3, 64 * bits // 8 : 128 * bits // 8] = 0x88 if bits == 4 else 0x80
            packed[19, 128 * bits // 8 :] = 0x88 if bits == 4 else 0x80
            for preview in (case.preview, (packed, scale)):
                case.preview = preview
                agree_with_fp32(kernel, case)
                y = kernel(*case.arguments)
                case.w_up[3], case.w_up[19] = torch.nan, torch.nan
                assert torch.equal(kernel(*case.arguments), y)
                case.w_up[3], case.w_up[19] = 1, 1


@pytest.mark.parametrize("act", BY_HAND)
def test_what_is_not_finite_spreads_as_in_torch(kernel: Any, act: str) -> None:
    """A gate that is not finite in a kept neuron; x; and a product, which NaN does not exceed."""
    for name in ("x", "w_gate", "w_up"):
        for bad in (torch.nan, torch.inf)[: 1 if act == "gelu" else 2]:  # torch: gelu(inf) is NaN
            for second in (False, True):
                for tokens in (1, 3):
                    case = previewed(20, 30, tokens, act=act, second=second)
                    getattr(case, name)[-1, 7] = bad
                    agree_with_fp32(kernel, case)


@pytest.mark.parametrize("act", BY_HAND)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_gate_that_is_not_a_number_drops(kernel: Any, act: str, tokens: int) -> None:
    case = Case(20, 30, tokens, act)
    case.threshold = torch.tensor(KEEP)
    case.w_gate[4, 7] = torch.nan
    agree_with_fp32(kernel, case)
    assert kernel(*case.arguments).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [0.0, 2.0**-133, 2.0**-120, 2.0**-40, 2.0**40, 2.0**120], ids=str)
def test_hostile_scales(kernel: Any, bits: int, size: float) -> None:
    """Some neurons' whole gate is zero, denormal or huge; their neighbours' is not."""
    for tokens in (1, 5):
        case = previewed(130, 20, tokens, act="relu", dtype=torch.bfloat16, bits=bits)
        case.w_gate[::3] = case.w_gate[::3] * size
        case.w_up[::3] = case.w_up[::3] / max(size, 2.0**-90)
        case.preview = make_preview(case.w_gate, bits)
        case.threshold = torch.full((20,), 0.3)
        case.threshold[::3] = 0.3 * size
        agree_with_fp32(kernel, case)


# Layouts


def test_vectors_and_previews_with_gaps(kernel: Any) -> None:
    case = previewed(70, 21, 4, second=True, per_neuron=True)
    packed, scale = case.preview
    case.product_threshold = torch.stack([case.product_threshold, NEVER.expand(21)], 1)[:, 0]
    case.check(kernel(*case.arguments), KERNEL_TOLERANCE[case.dtype])
    case.preview = torch.cat([packed, packed], 1)[:, : packed.shape[1]], scale.t().contiguous().t()
    case.check(kernel(*case.arguments), KERNEL_TOLERANCE[case.dtype])


def test_a_preview_at_an_odd_address(kernel: Any) -> None:
    for dtype in DTYPES:
        case = previewed(70, 21, 4, dtype=dtype)
        packed, scale = case.preview
        shifted = [
            torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (packed, scale)
        ]
        case.preview = shifted[0], shifted[1]
        case.check(kernel(*case.arguments), KERNEL_TOLERANCE[case.dtype])
