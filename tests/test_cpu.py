"""The C kernel through its op: against loops in fp64, at every edge, bit for bit with itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    check_reading,
    check_rounding,
    every_pattern,
    odd_cases,
    same,
)
from catsparse.kernels import (
    ACTIVATIONS,
    FORMATS,
    MAX_OP_TOKENS,
    cpu,
    gated_mlp,
    gated_mlp_reference,
    make_preview,
    preview,
)
from catsparse.kernels.arguments import Call
from catsparse.kernels.build import Library, with_headers
from catsparse.kernels.cpu import gated_mlp_cpu

DTYPES = list(KERNEL_TOLERANCE)
LAYOUTS = {"rows": by_rows, "columns": by_columns}


def refuse(*arguments: Any) -> Tensor:
    raise AssertionError("the reference ran in the kernel's place")


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if cpu.cpu_library().handle is None:
        pytest.skip(f"no kernel: {cpu.cpu_library().reason}")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The op, with no reference to fall back on."""
    monkeypatch.setattr(cpu, "gated_mlp_reference", refuse)
    return gated_mlp


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def with_layout(case: Case, layout: str) -> tuple[Any, ...]:
    x, w_gate, w_up, w_down_t, *rest = case.arguments
    return x, w_gate, w_up, LAYOUTS[layout](w_down_t), *rest


def in_fp32(case: Case) -> Tensor:
    """The reference on the case's weights, no step of it rounded."""
    x, w_gate, w_up, w_down_t = (t.float() for t in case.arguments[:4])
    return gated_mlp_reference(x, w_gate, w_up, w_down_t, *case.arguments[4:])


# Against loops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_against_loops(kernel: Any, dtype: torch.dtype, act: str) -> None:
    """Both kinds of threshold, with and without compensation, both layouts of w_down_t."""
    for per_neuron in (False, True):
        for compensated in (False, True):
            for hidden, neurons, tokens in ((37, 101, 1), (70, 43, 6)):
                case = Case(
                    hidden, neurons, tokens, act, dtype, per_neuron, compensated, 5, hidden + 3
                )
                check_layouts(case, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(kernel: Any, dtype: torch.dtype) -> None:
    for case in odd_cases(dtype):
        check_layouts(case, kernel)


@pytest.mark.parametrize("tokens", range(1, MAX_OP_TOKENS + 1))
def test_every_number_of_tokens(kernel: Any, tokens: int) -> None:
    for dtype in DTYPES:
        check_layouts(Case(21, 45, tokens, "silu", dtype, tokens % 2 == 0, True, tokens), kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_a_large_layer_against_the_reference(kernel: Any, dtype: torch.dtype, tokens: int) -> None:
    case = Case(512, 1408, tokens, "silu", dtype, per_neuron=True, compensated=True)
    expected = in_fp32(case)
    for layout in LAYOUTS:
        y = kernel(*with_layout(case, layout)).float()
        error = float((y - expected).abs().max() / expected.abs().max())
        assert error < KERNEL_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_subnormal_weights(kernel: Any, dtype: torch.dtype) -> None:
    small = 2.0**-20 if dtype == torch.float16 else 2.0**-128
    for name in ("w_up", "w_gate", "w_down_t"):
        for tokens in (1, 4):
            case = Case(40, 50, tokens, "relu", dtype)
            weight = getattr(case, name) * small
            assert 0 < float((weight != 0).float().mean()) <= 1
            assert float(weight.abs().max()) < torch.finfo(dtype).tiny * 4
            setattr(case, name, weight)
            case.threshold = torch.tensor(KEEP)
            # Lift the result: it must not itself be rounded to a subnormal.
            lifted = "w_down_t" if name != "w_down_t" else "w_up"
            setattr(case, lifted, getattr(case, lifted) * 2.0**12)
            if dtype == torch.bfloat16:
                setattr(case, lifted, getattr(case, lifted) * 2.0**100)
            check_layouts(case, kernel)


# Which neurons are kept


NEURONS = 97
PATTERNS: dict[str, Callable[[int], bool]] = {
    "none": lambda i: False,
    "all": lambda i: True,
    "the first": lambda i: i == 0,
    "the last": lambda i: i == NEURONS - 1,
    "one in the middle": lambda i: i == 40,
    "every other": lambda i: i % 2 == 1,
    "one block": lambda i: 32 <= i < 64,
    "all but one block": lambda i: not 32 <= i < 64,
    "sixteen": lambda i: i % 6 == 0 and i < 96,
    "seventeen": lambda i: i % 6 == 0,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
def test_patterns_of_kept_neurons(kernel: Any, pattern: str, compensated: bool) -> None:
    for dtype in DTYPES:
        for tokens in (1, 2, 16):
            case = Case(35, NEURONS, tokens, "silu", dtype, compensated=compensated)
            kept = [PATTERNS[pattern](i) for i in range(NEURONS)]
            case.threshold = torch.tensor([KEEP if keep else DROP for keep in kept])
            check_layouts(case, kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_has_its_own_mask(kernel: Any, layout: str) -> None:
    """Token t has gate t in every neuron; neuron i is kept by tokens above its threshold i."""
    tokens, neurons = 16, 16
    x = torch.arange(1.0, tokens + 1)[:, None]
    threshold = torch.arange(neurons) + 0.5
    w_down_t = LAYOUTS[layout](torch.eye(neurons))
    one = torch.ones(neurons, 1)
    y = kernel(x, one, torch.zeros(neurons, 1), w_down_t, threshold, "relu", -torch.ones(neurons))
    assert torch.equal(y, (x > threshold).float())


def test_a_gate_at_the_threshold_is_dropped(kernel: Any) -> None:
    w = torch.tensor([[1.0], [2.0], [-2.0], [3.0]])
    y = kernel(torch.ones(1, 1), w, torch.ones(4, 1), torch.eye(4), torch.tensor(2.0), "relu")
    assert y.tolist() == [[0, 0, 0, 3]]


def test_a_threshold_that_is_not_a_number_drops(kernel: Any) -> None:
    case = Case(8, 8, 2)
    y = kernel(*case.arguments[:4], torch.tensor(torch.nan), "silu")
    assert not y.any()


# Bit for bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_the_number_of_threads_changes_no_bit(
    kernel: Any, threads: Callable[[int], None], dtype: torch.dtype, layout: str, tokens: int
) -> None:
    case = Case(131, 700, tokens, "silu", dtype, True, True, columns=900)
    arguments = with_layout(case, layout)
    expected = kernel(*arguments)
    for count in (2, 3, 5, 1):
        threads(count)
        for _ in range(5):
            assert torch.equal(kernel(*arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 3, 5, 8, 16])
def test_the_other_tokens_of_a_batch_change_no_bit(
    kernel: Any, dtype: torch.dtype, tokens: int
) -> None:
    """Reading w_down by columns. By rows a token alone is summed in segments, so two are the least
    number of tokens of which that holds."""
    case = Case(70, 333, tokens, "silu", dtype, False, True, columns=150)
    arguments = with_layout(case, "columns")
    batch = kernel(*arguments)
    for t in range(tokens):
        assert torch.equal(kernel(case.x[t : t + 1], *arguments[1:])[0], batch[t])
    arguments = with_layout(case, "rows")
    batch = kernel(*arguments)
    for t in range(tokens):
        pair = kernel(case.x[[t, (t + 1) % tokens]], *arguments[1:])
        assert torch.equal(pair[0], batch[t])
        alone = kernel(case.x[t : t + 1], *arguments[1:])[0]
        tolerance = KERNEL_TOLERANCE[dtype]
        scale = float(batch[t].abs().max())
        torch.testing.assert_close(alone, batch[t], rtol=tolerance, atol=tolerance * scale)


def test_from_several_python_threads_at_once(kernel: Any) -> None:
    cases = [
        Case(33 + seed, 90, 1 + seed % 4, "silu", DTYPES[seed % 3], True, seed=seed)
        for seed in range(8)
    ]
    expected = [kernel(*case.arguments) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            results = pool.map(lambda case: kernel(*case.arguments), cases)
            assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


# Conversion and rounding, bit by bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_weight_is_read_and_written_exactly(kernel: Any, dtype: torch.dtype) -> None:
    check_reading(dtype, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_result_is_rounded_as_torch_rounds(kernel: Any, dtype: torch.dtype) -> None:
    check_rounding(dtype, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_input_is_read_exactly(kernel: Any, dtype: torch.dtype) -> None:
    """x = (1, value), gate reads the first, up the second."""
    values = every_pattern(dtype)
    values = values[values.isfinite()]
    for start in (0, len(values) // 3, len(values) - 1600):  # a slice of either sign, and the ends
        for few in values[start : start + 1600].split(MAX_OP_TOKENS):
            x = torch.stack([torch.ones_like(few), few], 1)
            gate, up = torch.eye(2, dtype=dtype).split(1)
            y = kernel(x, gate, up, torch.ones(1, 1, dtype=dtype), torch.tensor(KEEP), "relu")
            assert same(y[:, 0], few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_spreads_as_in_torch(
    kernel: Any, dtype: torch.dtype, bad: float
) -> None:
    for name in ("x", "w_gate", "w_up"):
        for tokens in (1, 3):
            case = Case(20, 30, tokens, "silu", dtype)
            getattr(case, name)[-1, 7] = bad
            expected = in_fp32(case)
            for layout in LAYOUTS:
                y = kernel(*with_layout(case, layout)).float()
                assert torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.isinf(), expected.isinf())
                torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-2, atol=1e-2)


def test_dropped_rows_are_not_read(kernel: Any) -> None:
    """What they hold does not matter: neither up nor, by rows, down."""
    case = Case(20, 90, 1)
    case.threshold = torch.tensor([DROP if i % 3 else KEEP for i in range(90)])
    expected = kernel(*case.arguments)
    dropped = case.threshold == DROP
    case.w_up[dropped], case.w_down_t[dropped] = torch.nan, torch.nan
    assert torch.equal(kernel(*case.arguments), expected)


# Layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_and_strides(kernel: Any, dtype: torch.dtype) -> None:
    case = Case(33, 21, 4, "silu", dtype, compensated=True, columns=19)
    x, w_gate, w_up, w_down_t, *rest = case.arguments
    nan = torch.nan

    def inside(weight: Tensor) -> Tensor:
        """A slice of something larger that holds NaN."""
        rows, columns = weight.shape
        whole = torch.full((rows + 3, columns + 1000), nan, dtype=dtype)
        whole[2:-1, 7 : 7 + columns] = weight
        return whole[2:-1, 7 : 7 + columns]

    fused = torch.cat([w_gate, w_up])
    case.check(kernel(x, fused[:21], fused[21:], w_down_t, *rest))
    case.check(kernel(x, inside(w_gate), inside(w_up), inside(w_down_t), *rest))
    case.check(kernel(x, w_gate, w_up, inside(w_down_t.t()).t(), *rest))
    case.check(kernel(inside(x), w_gate, w_up, w_down_t, *rest))
    wide = torch.full((4, 66), nan, dtype=dtype)
    wide[:, ::2] = x
    case.check(kernel(wide[:, ::2], w_gate, w_up, w_down_t, *rest))
    case.check(kernel(x.t().contiguous().t(), w_gate, w_up, w_down_t, *rest))


def test_vectors_with_gaps(kernel: Any) -> None:
    case = Case(33, 21, 4, per_neuron=True, compensated=True)

    def spread(vector: Tensor) -> Tensor:
        return torch.stack([vector, torch.full_like(vector, torch.nan)], 1)[:, 0]

    vectors = [v for v in (case.threshold, case.mean, case.bias) if v is not None]
    threshold, mean, bias = (spread(v) for v in vectors)
    assert threshold.stride() == (2,)
    case.check(kernel(*case.arguments[:4], threshold, "silu", mean, bias))


@pytest.mark.parametrize("tokens", [1, 3])
def test_expanded_tensors(kernel: Any, tokens: int) -> None:
    case = Case(12, 20, 3)
    row = case.x[0]
    case.x = row.expand(tokens, 12)
    case.w_gate, case.w_up = row.expand(20, 12), case.w_up[0].expand(20, 12)
    case.threshold = torch.tensor(KEEP)
    case.mean, case.bias = torch.tensor(0.25).expand(20), torch.tensor(2.0).expand(12)
    case.check(kernel(*case.arguments))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (1, 1, 16), (16, 1)])
def test_leading_dimensions(kernel: Any, leading: tuple[int, ...]) -> None:
    case = Case(10, 14, 16, columns=6)
    flat = kernel(*case.arguments)
    count = torch.Size(leading).numel()
    x = case.x[:count].reshape(*leading, 10)
    y = kernel(x, *case.arguments[1:])
    assert y.shape == (*leading, 6)
    torch.testing.assert_close(y.reshape(-1, 6), flat[:count])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_under_compile(
    kernel: Any, layout: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler must not lay the weights out anew."""
    case = Case(24, 40, 5, compensated=True)
    arguments = with_layout(case, layout)
    handle = cpu.cpu_library().handle
    seen = []

    class Watched:
        @staticmethod
        def catsparse_gated_mlp(problem: Any) -> int:
            seen.append((problem._obj.down_transposed, problem._obj.down.stride))
            return int(handle.catsparse_gated_mlp(problem))  # type: ignore[union-attr]

    monkeypatch.setattr(cpu, "cpu_library", lambda: Library(Watched(), ""))  # type: ignore[arg-type]
    torch._dynamo.reset()
    case.check(torch.compile(kernel, fullgraph=True, backend=backend)(*arguments))
    assert seen == [(1, 24) if layout == "rows" else (0, 40)]


# What does not fit


def small(**changes: Any) -> dict[str, Any]:
    case = Case(8, 12, 3, compensated=True, per_neuron=True, columns=5)
    names = ("x", "w_gate", "w_up", "w_down_t", "threshold", "act", "mean", "bias")
    return dict(zip(names, case.arguments, strict=True)) | changes


MISFITS: dict[str, dict[str, Any]] = {
    "fp64": {k: v.double() for k, v in small().items() if k[0] in "xw"},
    "whole numbers": {"x": torch.ones(3, 8, dtype=torch.int64)},
    "another dtype of x": {"x": torch.randn(3, 8).bfloat16()},
    "another dtype of gate": {"w_gate": torch.randn(12, 8).half()},
    "another dtype of up": {"w_up": torch.randn(12, 8).half()},
    "another dtype of down": {"w_down_t": torch.randn(12, 5).half()},
    "x of one value": {"x": torch.tensor(1.0)},
    "x empty": {"x": torch.empty(0, 8)},
    "x empty in the middle": {"x": torch.empty(2, 0, 8)},
    "x without a width": {"x": torch.empty(3, 0)},
    "x too narrow": {"x": torch.randn(3, 7)},
    "x too wide": {"x": torch.randn(3, 9)},
    "17 tokens": {"x": torch.randn(17, 8)},
    "100 tokens in 3 dimensions": {"x": torch.randn(10, 10, 8)},
    "gate too short": {"w_gate": torch.randn(11, 8)},
    "gate too narrow": {"w_gate": torch.randn(12, 7)},
    "gate a vector": {"w_gate": torch.randn(8)},
    "gate of 3 dimensions": {"w_gate": torch.randn(1, 12, 8)},
    "up too short": {"w_up": torch.randn(11, 8)},
    "up of one row": {"w_up": torch.randn(1, 8)},
    "up too narrow": {"w_up": torch.randn(12, 7)},
    "down too short": {"w_down_t": torch.randn(11, 5)},
    "down too long": {"w_down_t": torch.randn(13, 5)},
    "down a vector": {"w_down_t": torch.randn(12)},
    "no neurons": {
        "w_gate": torch.randn(0, 8),
        "w_up": torch.randn(0, 8),
        "w_down_t": torch.randn(0, 5),
        "threshold": torch.tensor(0.0),
        "mean": None,
    },
    "no columns": {"w_down_t": torch.randn(12, 0), "bias": None},
    "gate with gaps": {"w_gate": torch.randn(12, 16)[:, ::2]},
    "up by columns": {"w_up": torch.randn(8, 12).t()},
    "down of one row, expanded": {"w_down_t": torch.randn(1, 5).expand(12, 5)},
    "down with gaps": {"w_down_t": torch.randn(24, 10)[::2, ::2]},
    "threshold too short": {"threshold": torch.rand(11)},
    "threshold too long": {"threshold": torch.rand(13)},
    "threshold of one": {"threshold": torch.rand(1)},
    "threshold of a row": {"threshold": torch.rand(1, 12)},
    "threshold a token": {"threshold": torch.rand(3, 1)},
    "threshold in bf16": {"threshold": torch.rand(12).bfloat16()},
    "threshold in fp64": {"threshold": torch.rand(12).double()},
    "mean too short": {"mean": torch.rand(11)},
    "mean too long": {"mean": torch.rand(13)},
    "mean of one": {"mean": torch.rand(1)},
    "mean of no dimension": {"mean": torch.tensor(0.5)},
    "mean in fp64": {"mean": torch.rand(12).double()},
    "bias too short": {"bias": torch.rand(4)},
    "bias too long": {"bias": torch.rand(6)},
    "bias of one": {"bias": torch.rand(1)},
    "bias in bf16": {"bias": torch.rand(5).bfloat16()},
    "product threshold too short": {"product_threshold": torch.rand(11)},
    "product threshold in bf16": {"product_threshold": torch.rand(12).bfloat16()},
    "product threshold on no device": {"product_threshold": torch.rand(12, device="meta")},
    "preview without scales": {"preview": make_preview(torch.randn(12, 8), 4)[0]},
    "preview too short": dict(
        zip(("preview", "preview_scale"), make_preview(torch.randn(11, 8), 4), strict=True)
    ),
    "preview too wide": dict(
        zip(("preview", "preview_scale"), make_preview(torch.randn(12, 65), 8), strict=True)
    ),
    "unknown activation": {"act": "swish"},
    "x on no device": {"x": torch.randn(3, 8, device="meta")},
    "gate on no device": {"w_gate": torch.randn(12, 8, device="meta")},
    "threshold on no device": {"threshold": torch.rand(12, device="meta")},
    "mean on no device": {"mean": torch.rand(12, device="meta")},
    "bias on no device": {"bias": torch.rand(5, device="meta")},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_goes_to_the_reference(
    misfit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result, or the error that it raises; the C code must not see the pointers."""
    arguments = small(**MISFITS[misfit])
    monkeypatch.setattr(cpu, "_Problem", refuse)

    def outcome(function: Callable[[dict[str, Any]], Tensor]) -> Any:
        try:
            return function(arguments)
        except (RuntimeError, KeyError, IndexError, NotImplementedError) as error:
            return type(error)

    expected = outcome(lambda given: gated_mlp_reference(**given))
    found = outcome(lambda given: gated_mlp_cpu(Call(**given)))
    assert type(found) is type(expected)
    if not isinstance(expected, Tensor):
        assert found is expected
        return
    assert (found.shape, found.dtype, found.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )
    if "device" not in misfit:
        assert torch.equal(found, expected)


def test_the_fitting_case_fits(kernel: Any) -> None:
    assert kernel(**small()).shape == (3, 5)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def catsparse_gated_mlp(problem: Any) -> int:
            return 1

    monkeypatch.setattr(cpu, "cpu_library", lambda: Library(Full(), ""))  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="12 neurons"):
        gated_mlp_cpu(Call(**small()))


# The two sides of the call


def test_numbers_agree_with_the_c_file() -> None:
    source = "".join(path.read_text() for path in with_headers(cpu.SOURCE))
    found = re.search(r"#define MAX_TOKENS (\d+)", source)
    assert found
    assert int(found[1]) == MAX_OP_TOKENS
    enum = re.search(r"enum \{ (SILU[^}]+)\}", source)
    assert enum
    numbers = {name.lower(): int(n) for name, n in re.findall(r"(\w+) = (\d+)", enum[1])}
    assert numbers == {name: i for i, name in enumerate(ACTIVATIONS)}
    assert numbers.keys() == BY_HAND.keys()
    kinds = re.search(r"dtypes\[\] = \{(.*?)\};", source, re.DOTALL)
    assert kinds
    order = re.findall(r"\{(\w+)_widen", kinds[1])
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    assert order == [short[dtype] for dtype in cpu.DTYPES]
    enum = re.search(r"enum \{ (F32[^}]+)\}", source)
    assert enum
    names = [name.lower() for name, _ in re.findall(r"(\w+) = (\d+)", enum[1])]
    assert names == [*order, *FORMATS]
    table = re.search(r"formats\[\] = \{(.*?)\n\};", source, re.DOTALL)
    assert table
    assert re.findall(r"\{(\w+?)_dots", table[1]) == [*names, "int4_digits"]
    for name, value in (("PREVIEW_GROUP", preview.GROUP), ("SCALE_GROUPS", preview.SCALE_GROUPS)):
        assert re.search(rf"#define {name} {value}\b", source)


def test_fields_agree_with_the_c_file() -> None:
    """Names, order and widths of ``Problem``."""
    body = re.search(r"typedef struct \{(.*?)\} Problem;", cpu.SOURCE.read_text(), re.DOTALL)
    assert body
    fields: list[tuple[str, int]] = []
    for line in re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL).split(";"):
        if not line.strip():
            continue
        size = 4 if "int32_t" in line else 24 if "Matrix" in line else 8
        names = re.sub(r"^\s*(const )?\w+ ", "", line)
        fields += [(name.strip(" *\n"), size) for name in names.split(",")]
    mine = [(field[0], getattr(cpu._Problem, field[0]).size) for field in cpu._Problem._fields_]
    assert mine == fields
