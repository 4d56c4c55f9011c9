"""The op ``catsparse::sparse_linear``: against fp64 by hand, at odd sizes and on hostile input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from catsparse.kernels import keep_inputs, sparse_linear, sparse_linear_reference
from catsparse.kernels.cpu import cpu_library, sparse_linear_cpu
from catsparse.kernels.sparse_linear import masked_input
from catsparse.kernels.sparse_linear_cuda import launch_sparse_linear, sparse_linear_cuda
from catsparse.kernels.stream import Norm, rms_norm
from catsparse.linears import add_input_sparsity, remove_input_sparsity

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [(64, 64), (65, 33), (512, 1000), (1, 3), (300, 7), (7, 2050)]


def arguments(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight_t, a threshold for each input, means and the bias that goes with them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    weight_t = (torch.randn(inputs, outputs, generator=generator) / inputs**0.5).to(dtype)
    threshold = torch.rand(inputs, generator=generator) * 1.5
    mean = torch.randn(inputs, generator=generator) * 0.1
    return x, weight_t, threshold, mean, mean @ weight_t.float() + 0.3


def by_hand(
    x: Tensor, weight_t: Tensor, threshold: Tensor, mean: Tensor | None, bias: Tensor | None
) -> Tensor:
    """fp64, input by input."""
    y = torch.zeros(len(x), weight_t.shape[1], dtype=torch.float64)
    for t, j in itertools.product(range(len(x)), range(x.shape[1])):
        limit = float(threshold[j] if threshold.dim() else threshold)
        if abs(float(x[t, j])) > limit:
            y[t] += (float(x[t, j]) - (0.0 if mean is None else float(mean[j]))) * weight_t[j]
    return y if bias is None else y + bias


def needs_kernel() -> None:
    if cpu_library().handle is None:
        pytest.skip(cpu_library().reason)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("compensated", [False, True])
def test_kernel(dtype: torch.dtype, sizes: tuple[int, int], tokens: int, compensated: bool) -> None:
    needs_kernel()
    x, weight_t, threshold, mean, bias = arguments(tokens, *sizes, dtype)
    extra = (mean, bias) if compensated else (None, None)
    for limit in (threshold, torch.tensor(0.7), torch.tensor(-1.0), torch.tensor(1e9)):
        y = sparse_linear_cpu(x, weight_t, limit, *extra)
        assert y is not None
        assert y.dtype == dtype
        expected = sparse_linear_reference(
            x.double(),
            weight_t.double(),
            limit,
            *(None if v is None else v.double() for v in extra),
        )
        scale = float(expected.abs().max()) + 1e-6
        assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * scale
        assert torch.equal(y, sparse_linear(x, weight_t, limit, *extra))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("scalar", [False, True])
def test_reference_is_the_maths(compensated: bool, scalar: bool) -> None:
    x, weight_t, threshold, mean, bias = arguments(3, 9, 5, torch.float32)
    limit = torch.tensor(0.6) if scalar else threshold
    extra = (mean, bias) if compensated else (None, None)
    found = sparse_linear_reference(x.double(), weight_t.double(), limit, *extra)
    assert torch.allclose(found, by_hand(x, weight_t, limit, *extra), atol=1e-6)


def test_masking_the_input_is_the_same() -> None:
    """With bias W mean, a dropped input counts as its mean."""
    x, weight_t, threshold, mean, _ = arguments(4, 33, 17, torch.float32)
    bias = mean @ weight_t
    masked = masked_input(x, threshold, mean) @ weight_t
    assert torch.allclose(masked, sparse_linear(x, weight_t, threshold, mean, bias), atol=1e-5)


def test_dropped_inputs_weights_are_not_read() -> None:
    needs_kernel()
    x, weight_t, threshold, _, _ = arguments(1, 128, 96, torch.float32)
    dropped = ~keep_inputs(x, threshold)[0]
    assert 20 < int(dropped.sum()) < 100
    expected = sparse_linear(x, weight_t, threshold)
    weight_t[dropped] = float("nan")
    assert torch.equal(sparse_linear(x, weight_t, threshold), expected)


def test_inputs_that_are_no_number() -> None:
    """NaN is above no threshold; an infinity is, and shows."""
    x = torch.tensor([[float("nan"), 1.0, 0.1], [float("inf"), 1.0, 0.1]])
    weight_t = torch.ones(3, 4)
    y = sparse_linear(x, weight_t, torch.tensor(0.5))
    assert y[0].tolist() == [1.0] * 4
    assert torch.isinf(y[1]).all()


@pytest.mark.parametrize("tokens", [1, 7])
def test_rows_with_a_stride_and_a_transposed_view(tokens: int) -> None:
    x, weight_t, threshold, mean, bias = arguments(tokens, 40, 24, torch.float32)
    expected = sparse_linear(x, weight_t, threshold, mean, bias)
    wide = torch.zeros(40, 50)
    wide[:, :24] = weight_t
    assert torch.equal(sparse_linear(x, wide[:, :24], threshold, mean, bias), expected)
    turned = weight_t.t().contiguous().t()
    found = sparse_linear(x, turned, threshold, mean, bias)
    assert torch.allclose(found, expected, atol=1e-5)


def test_leading_dimensions_and_nothing_at_all() -> None:
    x, weight_t, threshold, _, _ = arguments(6, 40, 24, torch.float32)
    y = sparse_linear(x, weight_t, threshold)
    assert torch.equal(sparse_linear(x.view(2, 3, 40), weight_t, threshold), y.view(2, 3, 24))
    assert sparse_linear(x[:0], weight_t, threshold).shape == (0, 24)


def test_results_repeat_whatever_the_threads() -> None:
    x, weight_t, threshold, mean, bias = arguments(1, 2048, 1024, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sparse_linear(x, weight_t, threshold, mean, bias))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("case", ["threshold of another size", "fp64 mean", "weight of bf16"])
def test_what_the_kernel_does_not_take_goes_elsewhere(case: str) -> None:
    x, weight_t, threshold, mean, bias = arguments(1, 16, 8, torch.float32)
    if case == "threshold of another size":
        assert sparse_linear_cpu(x, weight_t, threshold[:5], None, None) is None
    elif case == "fp64 mean":
        assert sparse_linear_cpu(x, weight_t, threshold, mean.double(), bias) is None
    else:
        assert sparse_linear_cpu(x, weight_t.bfloat16(), threshold, None, None) is None


def test_traces_as_one_node() -> None:
    x, weight_t, threshold, mean, bias = arguments(2, 16, 8, torch.float32)
    torch.library.opcheck(
        torch.ops.catsparse.sparse_linear.default,
        (x, weight_t, threshold, mean, bias),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(sparse_linear, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(x, weight_t, threshold, mean, bias),
        sparse_linear(x, weight_t, threshold, mean, bias),
    )


# -- on a GPU

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_SIZES = [(64, 64), (65, 40), (512, 1000), (4096, 6144), (5, 8), (30000, 16)]


def on_gpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", GPU_SIZES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_gpu_kernel(dtype: torch.dtype, sizes: tuple[int, int], tokens: int) -> None:
    x, weight_t, threshold, mean, bias = arguments(tokens, *sizes, dtype)
    for limit in (threshold, torch.tensor(0.7), torch.tensor(-1.0), torch.tensor(1e9)):
        for extra in ((mean, bias), (None, None)):
            given = on_gpu(x, weight_t, limit, *extra)
            y = sparse_linear_cuda(*given)  # type: ignore[arg-type]
            assert y is not None
            wide = [None if v is None else v.double() for v in extra]
            expected = sparse_linear_reference(x.double(), weight_t.double(), limit, *wide)
            scale = float(expected.abs().max()) + 1e-6
            assert float((y.cpu().double() - expected).abs().max()) <= TOLERANCE[dtype] * scale
            again = sparse_linear(*given)  # type: ignore[arg-type]
            assert torch.equal(again, y)


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_gpu_kernel_reads_no_dropped_rows(tokens: int) -> None:
    x, weight_t, threshold, _, _ = arguments(tokens, 1000, 96, torch.bfloat16)
    expected = sparse_linear(*on_gpu(x, weight_t, threshold))  # type: ignore[arg-type]
    weight_t[~keep_inputs(x, threshold).any(0)] = float("nan")
    found = sparse_linear(*on_gpu(x, weight_t, threshold))  # type: ignore[arg-type]
    assert torch.equal(found, expected)


@gpu
@needs_gpu
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_gpu_kernel_of_three_layers_with_a_norm(tokens: int, offset: float) -> None:
    """As the decode step calls it: q, k and v beside each other, and a residual."""
    sizes = (512, 128, 128)
    parts = [
        arguments(tokens, 512, n, torch.bfloat16, seed=i)[1].cuda() for i, n in enumerate(sizes)
    ]
    x, _, threshold, mean, _ = on_gpu(*arguments(tokens, 512, 8, torch.bfloat16))
    assert x is not None
    assert threshold is not None
    assert mean is not None
    norm = Norm(torch.rand(512, device="cuda").bfloat16() + 0.5, 1e-5, offset)
    whole = torch.cat(parts, dim=1)
    bias, residual = mean @ whole.float(), torch.randn(tokens, 768, device="cuda").bfloat16()
    y = launch_sparse_linear(x, parts, threshold, mean, bias, norm, residual)
    product = sparse_linear_reference(
        rms_norm(x, norm).double(), whole.double(), threshold, mean.double(), bias.double()
    )
    expected = residual.double() + product.bfloat16().double()
    assert float((y - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


@gpu
@needs_gpu
def test_gpu_kernel_in_a_graph() -> None:
    x, weight_t, threshold, mean, bias = on_gpu(*arguments(1, 2048, 512, torch.bfloat16))
    assert x is not None
    call = (x, weight_t, threshold, mean, bias)
    sparse_linear(*call)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(*call)  # type: ignore[arg-type]
    for seed in (1, 2):
        x.copy_(arguments(1, 2048, 512, torch.bfloat16, seed)[0])
        graph.replay()
        assert torch.equal(y, sparse_linear(*call))  # type: ignore[arg-type]


@gpu
@needs_gpu
def test_gpu_layer_keeps_one_weight() -> None:
    """The weight itself is laid out by input; densified it is as before, bit for bit."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16)
    weight, values = dense.weight, dense.weight.detach().clone()
    x = torch.randn(1, 512, device="cuda").bfloat16()
    layer = add_input_sparsity(dense, torch.tensor(0.6), None, "masked").eval()
    with torch.no_grad():
        y = layer(x)
        before = torch.cuda.memory_allocated()
        layer(x)
        assert torch.cuda.memory_allocated() == before
    assert layer.weight is weight
    assert layer.weight.t().is_contiguous()
    assert layer._catsparse_copy is None
    assert torch.equal(layer.weight, values)
    expected = (
        torch.where(x.abs() > 0.6, x, 0.0).double() @ values.double().t() + layer.bias.double()
    )
    assert float((y - expected).abs().max()) <= 1e-2 * float(expected.abs().max())
    remove_input_sparsity(layer)
    assert weight.is_contiguous()
    assert torch.equal(weight, values)
