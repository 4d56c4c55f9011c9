"""catsparse::gated_mlp and its gradient path, against loops in fp64 written from the formula."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import BY_HAND, TOLERANCE, Case
from catsparse.kernels import (
    ACTIVATIONS,
    MAX_OP_TOKENS,
    gated_mlp,
    gated_mlp_reference,
    masked_hidden,
)

SHAPES = [(1, 1, 1), (5, 7, 1), (33, 65, 2), (8, 3, 5), (17, 1, 16), (64, 96, 7), (31, 129, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
def test_against_loops(shape: tuple[int, int, int], per_neuron: bool, compensated: bool) -> None:
    case = Case(*shape, per_neuron=per_neuron, compensated=compensated)
    case.check(gated_mlp(*case.arguments))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_activation_and_dtype(act: str, per_neuron: bool, dtype: torch.dtype) -> None:
    for compensated in (False, True):
        case = Case(24, 40, 3, act, dtype, per_neuron, compensated, seed=2)
        case.check(gated_mlp(*case.arguments))


def test_the_cases_do_drop_some_neurons_and_keep_others() -> None:
    for shape, per_neuron in itertools.product(SHAPES[2:], (False, True)):
        case = Case(*shape, per_neuron=per_neuron)
        kept = np.abs(case.gate_by_hand()) > case.threshold.numpy()
        assert 0.05 < kept.mean() < 0.95


@pytest.mark.parametrize("tokens", range(1, MAX_OP_TOKENS + 1))
def test_every_number_of_tokens(tokens: int) -> None:
    case = Case(9, 21, tokens, compensated=True, seed=tokens)
    case.check(gated_mlp(*case.arguments))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (1, 1, 6), (3, 0)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    case = Case(10, 14, 6, compensated=True)
    flat = gated_mlp(*case.arguments)
    x = case.x[: math.prod(leading)].reshape(*leading, 10)
    y = gated_mlp(x, *case.arguments[1:])
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 10), flat[: math.prod(leading)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
def test_negative_threshold_is_the_dense_mlp(
    dtype: torch.dtype, act: str, per_neuron: bool
) -> None:
    case = Case(32, 48, 5, act, dtype)
    threshold = torch.full((48,) if per_neuron else (), -1.0)
    dense = F.linear(
        ACTIVATIONS[act](F.linear(case.x, case.w_gate)) * F.linear(case.x, case.w_up),
        case.w_down_t.t(),
    )
    arguments = (case.x, case.w_gate, case.w_up, case.w_down_t, threshold, act)
    assert torch.equal(gated_mlp_reference(*arguments), dense)  # bit for bit
    # The CPU kernel does not round between the steps.
    torch.testing.assert_close(
        gated_mlp(*arguments), dense, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
def test_everything_dropped_leaves_the_bias(dtype: torch.dtype, per_neuron: bool) -> None:
    case = Case(16, 24, 4, dtype=dtype, compensated=True)
    threshold = torch.full((24,) if per_neuron else (), 3e38)
    weights = (case.w_gate, case.w_up, case.w_down_t)
    assert case.bias is not None
    y = gated_mlp(case.x, *weights, threshold, "silu", case.mean, case.bias)
    assert torch.equal(y, case.bias.to(dtype).expand(4, 16))
    assert not gated_mlp(case.x, *weights, threshold, "silu").any()


def test_a_gate_at_the_threshold_is_dropped() -> None:
    x = torch.ones(1, 1)
    w = torch.tensor([[1.0], [2.0], [-2.0], [3.0]])
    threshold = torch.tensor(2.0)
    down = torch.eye(4)
    y = gated_mlp(x, w, torch.ones(4, 1), down, threshold, "relu")
    assert y.tolist() == [[0, 0, 0, 3]]
    g = torch.tensor([1.0, 2.0, -2.0, 3.0, -3.0])
    assert masked_hidden(g, torch.ones(5), threshold, None).tolist() == [0, 0, 0, 3, -3]


def test_magnitude_decides_not_sign() -> None:
    """silu(-1) = -0.27 passes a threshold of 0.2; silu(0.1) = 0.05 does not."""
    x = torch.ones(1, 1)
    w_gate = torch.tensor([[-1.0], [0.1]])
    y = gated_mlp(x, w_gate, torch.ones(2, 1), torch.eye(2), torch.tensor(0.2), "silu")
    assert y[0, 0] == pytest.approx(BY_HAND["silu"](-1.0))
    assert y[0, 1] == 0


def test_slices_of_a_fused_weight_and_a_transposed_down() -> None:
    case = Case(33, 21, 4, compensated=True)
    fused = torch.cat([case.w_gate, case.w_up])
    down = case.w_down_t.t().contiguous()  # as nn.Linear holds it
    assert not down.t().is_contiguous()
    y = gated_mlp(case.x, fused[:21], fused[21:], down.t(), *case.arguments[4:])
    case.check(y)
    torch.testing.assert_close(y, gated_mlp(*case.arguments), rtol=1e-6, atol=1e-6)


def test_strided_tokens() -> None:
    case = Case(12, 20, 5)
    wide = torch.zeros(5, 24)
    wide[:, ::2] = case.x
    case.check(gated_mlp(wide[:, ::2], *case.arguments[1:]))


def test_output_may_be_of_another_size_than_the_input() -> None:
    case = Case(12, 20, 3)
    w_down_t = torch.randn(20, 5)
    y = gated_mlp(case.x, case.w_gate, case.w_up, w_down_t, case.threshold, "silu")
    h = masked_hidden(
        F.silu(case.x @ case.w_gate.t()), case.x @ case.w_up.t(), case.threshold, None
    )
    torch.testing.assert_close(y, h @ w_down_t)


def test_compensation_equals_filling_in_the_mean() -> None:
    """sum over kept (h - mean) w + W mean is the same as putting the mean where h is dropped."""
    case = Case(24, 40, 6, compensated=True)
    g, u = F.silu(case.x @ case.w_gate.t()), case.x @ case.w_up.t()
    filled = masked_hidden(g, u, case.threshold, case.mean) @ case.w_down_t
    torch.testing.assert_close(gated_mlp(*case.arguments), filled, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_alone() -> None:
    case = Case(16, 24, 3, compensated=True)
    before = [a.clone() for a in case.arguments if isinstance(a, Tensor)]
    gated_mlp(*case.arguments)
    after = [a for a in case.arguments if isinstance(a, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_op_is_the_reference_where_there_is_no_kernel() -> None:
    case = Case(16, 24, 3, dtype=torch.float64)
    assert torch.equal(gated_mlp(*case.arguments), gated_mlp_reference(*case.arguments))


# The op as torch sees it


@pytest.mark.parametrize("shape", [(5, 7, 1), (16, 24, 3), (8, 8, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype, per_neuron: bool) -> None:
    for compensated in (False, True):
        case = Case(*shape, "silu", dtype, per_neuron, compensated)
        torch.library.opcheck(torch.ops.catsparse.gated_mlp.default, case.arguments)


def test_opcheck_of_transposed_weights_and_batches() -> None:
    case = Case(8, 12, 6, compensated=True)
    down = case.w_down_t.t().contiguous().t()
    arguments = (case.x.view(2, 3, 8), case.w_gate, case.w_up, down, *case.arguments[4:])
    torch.library.opcheck(torch.ops.catsparse.gated_mlp.default, arguments)


def test_meta_tensors_give_shape_and_dtype() -> None:
    case = Case(8, 12, 6, dtype=torch.bfloat16)
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in case.arguments]
    y = gated_mlp(*on_meta)
    assert (y.shape, y.dtype, y.device.type) == ((6, 8), torch.bfloat16, "meta")


def test_one_node_under_compile() -> None:
    case = Case(8, 12, 3, compensated=True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(gated_mlp, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*case.arguments), gated_mlp(*case.arguments))
    calls = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert [str(n.target) for n in calls] == ["catsparse.gated_mlp"]


# The gradient path


def hidden_case(shape: tuple[int, ...] = (4, 9)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.randn(shape, dtype=torch.float64)
    g[..., 0] = 0.05  # some of either kind, and none near the threshold
    g[..., 1] = -2.0
    g = torch.where((g.abs() - 0.5).abs() < 0.05, g * 2, g)
    u = torch.randn(shape, dtype=torch.float64)
    return g, u, torch.tensor(0.5), torch.randn(shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9)])
@pytest.mark.parametrize("per_neuron", [False, True])
def test_masked_hidden_by_hand(shape: tuple[int, ...], per_neuron: bool) -> None:
    g, u, threshold, mean = hidden_case(shape)
    threshold = threshold.expand(9).clone() if per_neuron else threshold
    expected = [
        a * b if abs(a) > 0.5 else m
        for a, b, m in zip(
            g.flatten().tolist(),
            u.flatten().tolist(),
            mean.expand(shape).flatten().tolist(),
            strict=True,
        )
    ]
    h = masked_hidden(g, u, threshold, mean)
    assert h.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    plain = masked_hidden(g, u, threshold, None)
    assert bool(((plain == 0) == (g.abs() <= 0.5)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_hidden_keeps_the_dtype(dtype: torch.dtype) -> None:
    g, u, threshold, mean = hidden_case()
    for fill in (None, mean.float()):
        assert masked_hidden(g.to(dtype), u.to(dtype), threshold, fill).dtype == dtype


def test_gradients_pass_kept_neurons_only() -> None:
    g, u, threshold, mean = hidden_case()
    for t in (g, u, mean):
        t.requires_grad_()
    upstream = torch.randn(4, 9, dtype=torch.float64)
    masked_hidden(g, u, threshold, mean).backward(upstream)
    kept = (g.detach().abs() > 0.5).double()
    assert 0 < float(kept.mean()) < 1
    torch.testing.assert_close(g.grad, upstream * u.detach() * kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(u.grad, upstream * g.detach() * kept, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean.grad, (upstream * (1 - kept)).sum(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("with_mean", [False, True])
def test_gradcheck(with_mean: bool) -> None:
    g, u, threshold, mean = hidden_case((3, 5))
    inputs = [t.requires_grad_() for t in ((g, u, mean) if with_mean else (g, u))]
    assert torch.autograd.gradcheck(
        lambda a, b, m=None: masked_hidden(a, b, threshold, m), inputs, atol=1e-6
    )
    assert torch.autograd.gradgradcheck(
        lambda a, b, m=None: masked_hidden(a, b, threshold, m), inputs, atol=1e-6
    )


def test_dropped_values_that_are_not_finite_do_not_leak() -> None:
    """An overflow in a dropped neuron's product must not reach the output."""
    g, u = torch.tensor([0.1, 2.0]), torch.tensor([torch.inf, 3.0])
    assert masked_hidden(g, u, torch.tensor(0.5), None).tolist() == [0, 6]
    x, w_up = torch.ones(1, 1), u[:, None]
    y = gated_mlp(x, g[:, None], w_up, torch.eye(2), torch.tensor(0.5), "relu")
    assert y.tolist() == [[0, 6]]
