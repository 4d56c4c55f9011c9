"""The sparse forward: which path runs when, that they agree, and what the module survives."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import catsparse
import tiny
from catsparse import hub
from catsparse import modules as module_under_test
from catsparse.data import load_windows
from catsparse.kernels import MAX_OP_TOKENS, Backend, gated_mlp
from catsparse.kernels.backend import AUTO_TOKENS
from catsparse.modules import SparseMLP, add_sparsity, remove_sparsity, sparse_modules
from catsparse.sites import match_gated_mlp

H, I = 32, 48  # noqa: E741
THRESHOLD, MEAN = "catsparse_threshold", "catsparse_mean"


def dense_mlp(fused: bool = False, bias: bool = False, act: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    config = tiny.llama_config(mlp_bias=bias, hidden_act=act)
    mlp = (Phi3MLP if fused else LlamaMLP)(config)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.25)
    return mlp.eval()


def sparse_mlp(
    dense: nn.Module, per_neuron: bool = True, compensate: bool = True, prefill: str = "masked"
) -> SparseMLP:
    torch.manual_seed(1)
    threshold = 0.2 + 0.3 * torch.rand(I) if per_neuron else torch.tensor(0.3)
    mean = 0.3 * torch.randn(I) if compensate else None
    return add_sparsity(dense, match_gated_mlp(dense), threshold, mean, prefill)


def by_hand(dense: nn.Module, x: Tensor, threshold: Tensor, mean: Tensor | None) -> Tensor:
    """The masked MLP from the dense module's weights, in their dtype."""
    if hasattr(dense, "gate_up_proj"):
        gate, up = dense.gate_up_proj(x).split(I, dim=-1)
    else:
        gate, up = dense.gate_proj(x), dense.up_proj(x)
    g = F.silu(gate)
    fill = torch.zeros(I) if mean is None else mean
    kept = g.float().abs() > threshold
    assert 0.1 < float(kept.float().mean()) < 0.9 or x.numel() < 100
    return dense.down_proj(torch.where(kept, g * up, fill.to(g.dtype)))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each call of the op."""
    calls: list[int] = []

    def watched(x: Tensor, *arguments: Any, backend: str) -> Tensor:
        calls.append(x.numel() // x.shape[-1])
        return gated_mlp(x, *arguments, backend=backend)

    monkeypatch.setattr(module_under_test, "gated_mlp", watched)
    return calls


@pytest.fixture(autouse=True)
def no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inference, unless the test is marked as training."""
    with torch.set_grad_enabled("training" in request.node.name):
        yield


# Two paths, one result


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_op_and_masked_children_agree(
    fused: bool, per_neuron: bool, compensate: bool, spy: list[int]
) -> None:
    dense = dense_mlp(fused)
    mlp = sparse_mlp(copy.deepcopy(dense), per_neuron, compensate)
    for tokens in (1, 5, 16):
        x = torch.randn(tokens, H)
        op = mlp(x)
        assert spy.pop() == tokens
        with torch.enable_grad():
            masked = mlp(x)
        assert not spy
        expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean)
        torch.testing.assert_close(op, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-6)


def test_many_tokens_are_masked_by_default(spy: list[int]) -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense))
    x = torch.randn(MAX_OP_TOKENS + 1, H)
    expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean)
    torch.testing.assert_close(mlp(x), expected)
    assert not spy
    assert not torch.allclose(mlp(x), dense(x), atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "few"),
    [
        ((16, H), True),
        ((17, H), False),
        ((1, 16, H), True),
        ((1, 17, H), False),
        ((16, 1, H), True),  # one token each of 16 sequences
        ((17, 1, H), False),
        ((4, 4, H), True),
        ((6, 3, H), False),
        ((1, 1, H), True),
        ((H,), True),
        ((0, H), True),
    ],
    ids=str,
)
def test_dense_prefill_is_decided_by_the_number_of_tokens(
    shape: tuple[int, ...], few: bool, spy: list[int]
) -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense), prefill="dense")
    x = torch.randn(shape)
    y = mlp(x)
    assert y.shape == x.shape
    assert bool(spy) == few
    if not few:
        assert torch.equal(y, dense(x))
    elif x.numel():
        expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(y, dense(x), atol=1e-3)


def test_disabled_is_dense(spy: list[int]) -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense))
    mlp.catsparse_enabled = False
    for tokens in (1, 40):
        x = torch.randn(tokens, H)
        assert torch.equal(mlp(x), dense(x))
    assert not spy


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu", "relu"])
def test_other_activations(act: str) -> None:
    dense = dense_mlp(act=act)
    mlp = sparse_mlp(copy.deepcopy(dense))
    x = torch.randn(6, H)
    with torch.enable_grad():
        masked = mlp(x)
    torch.testing.assert_close(mlp(x), masked, rtol=1e-4, atol=1e-5)


def test_all_kept_is_dense(spy: list[int]) -> None:
    """Bit for bit in torch, whose matmuls are the dense module's; by the kernel within rounding."""
    dense = dense_mlp()
    site = match_gated_mlp(dense)
    mlp = add_sparsity(copy.deepcopy(dense), site, torch.tensor(-1.0), torch.zeros(I), "masked")
    x, more = torch.randn(3, H), torch.randn(40, H)
    torch.testing.assert_close(mlp(x), dense(x))
    assert torch.equal(mlp(more), dense(more))
    assert spy == [3]
    mlp.set_backend(Backend.TORCH, True)
    assert torch.equal(mlp(x), dense(x))
    assert spy == [3]


# When the children are called


def refusal(mlp: SparseMLP, x: Tensor, spy: list[int]) -> str:
    """Why the op is not used; checks that it is not."""
    reason = mlp.why_not_raw(x.dtype)
    assert reason is not None
    assert mlp.raw_weights(x.dtype) is None
    mlp(x)
    assert not spy
    return reason


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_on_children_are_called(child: str, kind: str, spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp())
    x = torch.randn(4, H)
    expected = mlp(x)
    spy.clear()
    seen = []
    linear = mlp.get_submodule(child)
    if kind == "forward":
        handle = linear.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    else:
        handle = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
    assert refusal(mlp, x, spy) == f"{child} is hooked"
    assert len(seen) == 1
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    mlp(x)
    assert spy == [4]


def test_hook_on_the_activation_is_called() -> None:
    """Watching activations there is what such hooks are for; decode must not skip them."""
    mlp = sparse_mlp(dense_mlp())
    seen = []
    mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    mlp(torch.randn(40, H))
    mlp(torch.randn(4, H))
    assert seen == [(40, I), (4, I)]


def test_hooks_on_the_mlp_survive(spy: list[int]) -> None:
    dense = dense_mlp()
    seen = []
    dense.register_forward_hook(lambda m, a, out: seen.append("after"))
    dense.register_forward_pre_hook(lambda m, a: seen.append("before"))
    mlp = sparse_mlp(dense)
    mlp(torch.randn(4, H))
    assert seen == ["before", "after"]
    assert spy == [4]  # they are no reason to leave the op
    remove_sparsity(mlp)
    dense(torch.randn(4, H))
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("compensate", [False, True])
def test_biases_are_honoured(tokens: int, compensate: bool, spy: list[int]) -> None:
    dense = dense_mlp(bias=True)
    assert dense.down_proj.bias is not None
    mlp = sparse_mlp(copy.deepcopy(dense), compensate=compensate)
    x = torch.randn(tokens, H)
    assert "has a bias" in refusal(mlp, x, spy)
    expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean)
    torch.testing.assert_close(mlp(x), expected)


def test_wrapped_child_is_called(spy: list[int]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp = sparse_mlp(dense_mlp())
    x = torch.randn(4, H)
    before = mlp(x)
    spy.clear()
    mlp.down_proj.__class__ = Doubled
    assert refusal(mlp, x, spy) == f"down_proj is {__name__}'s Doubled"
    torch.testing.assert_close(mlp(x), 2 * before, rtol=1e-4, atol=1e-5)


def test_child_forward_replaced_on_the_instance(spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp.up_proj.forward = lambda x: x.new_zeros(len(x), I)
    assert "hooked" in refusal(mlp, torch.randn(4, H), spy)


def test_parametrized_weight_is_not_read_raw(spy: list[int]) -> None:
    class Halved(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense))
    nn.utils.parametrize.register_parametrization(mlp.down_proj, "weight", Halved())
    x = torch.randn(4, H)
    refusal(mlp, x, spy)
    expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean) / 2
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_another_dtype_than_the_input(spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp()).bfloat16()
    assert "torch.bfloat16" in str(mlp.why_not_raw(torch.float32))
    assert mlp.why_not_raw(torch.bfloat16) is None
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(torch.randn(4, H))
    assert not spy
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("compensate", [False, True])
def test_autocast_gives_the_dtype_that_dense_gives(compensate: bool) -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense), compensate=compensate)
    for tokens in (4, 40):
        x = torch.randn(tokens, H)
        expected = mlp(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = mlp(x)
            assert y.dtype == dense(x).dtype
        # Rounding to bf16 flips a neuron here and there, so not element by element.
        assert float((y - expected).norm() / expected.norm()) < 0.1


def test_meta_weights_are_not_read() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.to("meta"))
    assert mlp.why_not_raw() == "down_proj is offloaded"


# Moving, copying, saving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per_neuron", [False, True], ids=["scalar", "vector"])
def test_changing_dtype_leaves_thresholds_exact(
    dtype: torch.dtype, per_neuron: bool, spy: list[int]
) -> None:
    mlp = sparse_mlp(dense_mlp(), per_neuron)
    before = {name: getattr(mlp, name).clone() for name in (THRESHOLD, MEAN)}
    assert not torch.equal(before[MEAN], before[MEAN].bfloat16().float())  # rounding would show
    for _ in range(2):
        mlp.to(dtype)
        for name, value in before.items():
            assert getattr(mlp, name).dtype == torch.float32
            assert torch.equal(getattr(mlp, name), value)
        y = mlp(torch.randn(4, H, dtype=dtype))
        assert y.dtype == dtype
        assert mlp.catsparse_bias is not None
        assert mlp.catsparse_bias.dtype == torch.float32
        mlp.float()
    assert spy == ([] if dtype == torch.float64 else [4, 4])  # no kernel for fp64: torch


def test_half_float_and_module_to_are_alike() -> None:
    x = torch.randn(4, H)
    conversions = (
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(x.bfloat16()),
    )
    results = [convert(sparse_mlp(dense_mlp()))(x.bfloat16()) for convert in conversions]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_device_follows_the_weights() -> None:
    mlp = sparse_mlp(dense_mlp()).to("meta")
    assert mlp.catsparse_threshold.device.type == "meta"
    assert mlp.catsparse_threshold.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
def test_deepcopy_is_independent(fused: bool, spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp(fused))
    other = copy.deepcopy(mlp)
    assert type(other) is type(mlp)
    x = torch.randn(4, H)
    assert torch.equal(other(x), mlp(x))
    assert spy == [4, 4]
    before = mlp(x)
    other.down_proj.weight.zero_()
    other.catsparse_threshold.fill_(9)
    assert torch.equal(mlp(x), before)
    assert not other(x).any()
    remove_sparsity(other)
    assert isinstance(mlp, SparseMLP)


def test_pickle_round_trip(spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp())
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = torch.randn(4, H)
    assert torch.equal(other(x), mlp(x))
    assert spy == [4, 4]
    assert type(other) is type(mlp)
    assert type(remove_sparsity(other)) is LlamaMLP


def test_whole_model_deepcopy_and_pickle(sparse_llama: Any) -> None:
    expected = tiny.logits(sparse_llama)
    file = io.BytesIO()
    torch.save(sparse_llama, file)
    file.seek(0)
    for other in (copy.deepcopy(sparse_llama), torch.load(file, weights_only=False)):
        assert torch.equal(tiny.logits(other), expected)
        assert len(sparse_modules(other)) == 2
        catsparse.densify(other)
    assert torch.equal(tiny.logits(sparse_llama), expected)


def test_state_dict_keys_do_not_change(llama: Any, calibration: Any) -> None:
    before = list(llama.state_dict())
    parameters = dict(llama.named_parameters())
    catsparse.sparsify(llama, calibration)
    assert list(llama.state_dict()) == before
    assert all(p is parameters[n] for n, p in llama.named_parameters())
    llama.load_state_dict(llama.state_dict(), strict=True)


def test_add_and_remove_restore_the_module() -> None:
    dense = dense_mlp()
    attributes = dict(dense.__dict__)
    buffers = dict(dense.named_buffers())
    parameters = dict(dense.named_parameters())
    x = torch.randn(4, H)
    expected = dense(x)
    mlp = sparse_mlp(dense)
    assert isinstance(mlp, LlamaMLP)
    restored = remove_sparsity(mlp)
    assert restored is dense
    assert type(dense) is LlamaMLP
    assert dense.__dict__.keys() == attributes.keys()
    assert dict(dense.named_buffers()) == buffers
    assert not dense._non_persistent_buffers_set
    assert all(p is parameters[n] for n, p in dense.named_parameters())
    assert torch.equal(dense(x), expected)


def test_equal_modules_share_one_class() -> None:
    assert type(sparse_mlp(dense_mlp())) is type(sparse_mlp(dense_mlp()))
    assert type(sparse_mlp(dense_mlp())).__name__ == "SparseLlamaMLP"


# The compensation's bias


def fresh_bias(mlp: SparseMLP) -> Tensor:
    assert mlp.catsparse_mean is not None
    return mlp.down_proj.weight.float() @ mlp.catsparse_mean


def check_bias(mlp: SparseMLP) -> None:
    x = torch.randn(4, H)
    with torch.enable_grad():
        masked = mlp(x)
    torch.testing.assert_close(mlp(x), masked, rtol=1e-4, atol=1e-4)
    assert mlp.catsparse_bias is not None
    torch.testing.assert_close(mlp.catsparse_bias, fresh_bias(mlp), rtol=1e-5, atol=1e-5)


def test_bias_is_down_of_mean() -> None:
    mlp = sparse_mlp(dense_mlp())
    assert mlp.catsparse_bias is not None
    torch.testing.assert_close(mlp.catsparse_bias, fresh_bias(mlp))
    assert sparse_mlp(dense_mlp(), compensate=False).catsparse_bias is None


def test_bias_follows_a_change_in_place() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    mlp.down_proj.weight.mul_(-3)
    check_bias(mlp)


def test_bias_follows_load_state_dict() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    mlp.load_state_dict({k: torch.randn_like(v) for k, v in mlp.state_dict().items()})
    check_bias(mlp)


def test_bias_follows_load_state_dict_by_assignment() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    state = {k: torch.randn_like(v) for k, v in mlp.state_dict().items()}
    mlp.load_state_dict(state, assign=True)
    check_bias(mlp)


def test_bias_follows_an_optimizer_step_in_training() -> None:
    mlp = sparse_mlp(dense_mlp())
    optimizer = torch.optim.SGD(mlp.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        mlp(torch.randn(40, H)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            check_bias(mlp)


def test_bias_follows_a_new_child() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    mlp.down_proj = nn.Linear(I, H, bias=False)
    check_bias(mlp)


def test_bias_follows_dtype_changes() -> None:
    mlp = sparse_mlp(dense_mlp()).bfloat16()
    check = mlp(torch.randn(1, H, dtype=torch.bfloat16))
    assert check.dtype == torch.bfloat16
    torch.testing.assert_close(mlp.catsparse_bias, fresh_bias(mlp), rtol=1e-5, atol=1e-5)


def test_eval_refreshes_the_bias() -> None:
    """A compiled forward does not look at the weights: calling eval() is the way to tell it."""
    mlp = sparse_mlp(dense_mlp())
    mlp.down_proj.weight.mul_(2)
    mlp.eval()
    torch.testing.assert_close(mlp.catsparse_bias, fresh_bias(mlp), rtol=1e-5, atol=1e-5)


def test_eval_refreshes_the_bias_after_steps_that_leave_no_trace() -> None:
    """Fused optimizers change weights behind the version counter."""
    mlp = sparse_mlp(dense_mlp()).train()
    mlp.down_proj.weight.data.mul_(2)
    mlp.eval()
    torch.testing.assert_close(mlp.catsparse_bias, fresh_bias(mlp), rtol=1e-5, atol=1e-5)


# Training


def test_training_uses_the_masked_path(spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp()).train()
    for tokens in (4, 40):
        assert mlp(torch.randn(tokens, H)).requires_grad
    assert not spy


def test_training_gradients_are_zero_for_dropped_neurons() -> None:
    dense = dense_mlp()
    site = match_gated_mlp(dense)
    threshold = torch.full((I,), -1.0)
    threshold[::3] = 3e38  # always dropped
    mlp = add_sparsity(dense, site, threshold, None, "masked")
    mlp(torch.randn(10, H)).square().sum().backward()
    names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (mlp.get_submodule(name).weight.grad for name in names)
    for gradient in (gate, up, down.t()):
        live = gradient.abs().sum(1) > 0
        assert not bool(live[::3].any())
        assert bool(live[1::3].all())
        assert bool(live[2::3].all())


def test_training_gradients_by_hand() -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense))
    x = torch.randn(12, H)
    mlp(x).square().sum().backward()
    by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean).square().sum().backward()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(mlp.get_parameter(name).grad, parameter.grad)


def test_training_with_gradient_checkpointing(sparse_llama: Any) -> None:
    ids = tiny.tokens(2, 24)

    def gradients() -> dict[str, Tensor]:
        sparse_llama.zero_grad()
        sparse_llama(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in sparse_llama.named_parameters()}

    sparse_llama.train()
    plain = gradients()
    # The second is its name in older versions of transformers.
    enable = getattr(sparse_llama, "activation_checkpointing_enable", None)
    (enable or sparse_llama.gradient_checkpointing_enable)()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


# The decision is the same in every path


def agreement(model: Any, ids: Tensor) -> tuple[float, float, float]:
    """Share of equal keep decisions: prefill against the op as decode runs it and against fp32.

    The op's decisions are read off its output: up is zero, every mean is -1 and down the identity.
    The third number is the share of neurons kept.
    """
    inputs: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    modules = sparse_modules(model)
    handles = []
    for name, mlp in modules.items():
        handles.append(
            mlp.register_forward_pre_hook(lambda m, a, name=name: inputs.update({name: a[0]}))
        )
        mlp.catsparse_counter = lambda keep, kept, name=name: masks.update({name: keep})
    model(input_ids=ids, use_cache=False)
    for mlp in modules.values():
        mlp.catsparse_counter = None
    for handle in handles:
        handle.remove()
    same_op = same_exact = kept = total = 0
    for name, mlp in modules.items():
        x, mask = inputs[name].flatten(0, -2), masks[name].flatten(0, -2)
        gate = mlp.gate_proj.weight
        assert gate.dtype == torch.bfloat16
        up, identity = torch.zeros_like(gate), torch.eye(len(gate), dtype=x.dtype)
        minus = -torch.ones(len(gate))
        threshold = mlp.catsparse_threshold
        op = torch.cat(
            [
                gated_mlp(few, gate, up, identity, threshold, mlp.site_act, minus)
                for few in x.split(MAX_OP_TOKENS)
            ]
        )
        assert bool(((op == 0) | (op == 1)).all())
        same_op += int((op.bool() == mask).sum())
        exact = F.silu(x.float() @ gate.float().t()).abs() > mlp.catsparse_threshold
        same_exact += int((exact == mask).sum())
        kept += int(mask.sum())
        total += mask.numel()
    return same_op / total, same_exact / total, kept / total


@pytest.mark.parametrize("method", ["cats", "chess", "energy"])
def test_prefill_and_decode_decide_alike(llama: Any, calibration: Any, method: str) -> None:
    model = catsparse.sparsify(llama, calibration, method=method).bfloat16()
    op, exact, kept = agreement(model, tiny.tokens(2, 64, seed=9))
    assert 0.3 < kept < 0.7
    assert op >= 0.999
    assert exact >= 0.999


@pytest.mark.parametrize("method", ["cats", "chess"])
def test_prefill_and_decode_decide_alike_in_the_bundled_model(method: str) -> None:
    model = hub.load_dense_model(hub.DEFAULT_MODEL)
    tokenizer = hub.load_tokenizer(hub.DEFAULT_MODEL)
    windows = load_windows(hub.bundled_text("heldout"), tokenizer, tokens=2048, seq_len=256)
    calibration = catsparse.calibrate(model, windows[1:], progress=False)
    catsparse.sparsify(model, calibration, method=method).bfloat16()
    op, exact, kept = agreement(model, windows[:1])
    assert 0.4 < kept < 0.6
    assert op >= 0.999
    assert exact >= 0.999


def test_prefill_and_decode_decide_alike_in_the_reference_model(books: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(books).eval()
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (1, 32))
    catsparse.sparsify(model, catsparse.calibrate(model, ids, progress=False), method="cats")
    op, exact, kept = agreement(model, ids[:1, :8])
    assert 0.4 < kept < 0.6
    assert op >= 0.999
    assert exact >= 0.999


def test_prefill_and_decode_give_the_same_logits(sparse_llama: Any) -> None:
    """A prompt at once, and the same tokens one by one through the cache."""
    ids = tiny.tokens(1, 24)
    whole = sparse_llama(input_ids=ids, use_cache=False).logits[0]
    cache, single = None, []
    for token in ids[0]:
        out = sparse_llama(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        single.append(out.logits[0, -1])
    torch.testing.assert_close(torch.stack(single), whole, rtol=1e-3, atol=1e-3)


# The transposed copy of down


def copy_of_down(mlp: SparseMLP) -> Tensor | None:
    return mlp._catsparse_down_t


def is_fresh(mlp: SparseMLP) -> bool:
    """Decodes as a module made sparse now would, bit for bit."""
    dense = dense_mlp(hasattr(mlp, "gate_up_proj")).to(mlp.down_proj.weight.dtype)
    dense.load_state_dict(mlp.state_dict())
    fresh = add_sparsity(
        dense, match_gated_mlp(dense), mlp.catsparse_threshold, mlp.catsparse_mean, "masked"
    )
    fresh.set_backend(mlp.catsparse_backend, mlp.catsparse_down_copy)
    xs = [torch.randn(tokens, H).to(mlp.down_proj.weight.dtype) for tokens in (1, 4)]
    return all(torch.equal(mlp(x), fresh(x)) for x in xs)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_copy_is_made_by_the_first_decode(fused: bool) -> None:
    """Not by what reads the weights in torch: evaluation, prefill, a meter, a dense run."""
    mlp = sparse_mlp(dense_mlp(fused))
    mlp(torch.randn(MAX_OP_TOKENS + 1, H))
    mlp(torch.randn(0, H))
    with torch.enable_grad():
        mlp(torch.randn(1, H))
    mlp.catsparse_counter = lambda keep, kept: None
    mlp(torch.randn(1, H))
    mlp.catsparse_counter = None
    mlp.catsparse_enabled = False
    mlp(torch.randn(1, H))
    mlp.catsparse_enabled = True
    assert copy_of_down(mlp) is None
    mlp(torch.randn(1, H))
    made = copy_of_down(mlp)
    assert made is not None
    assert made.is_contiguous()
    assert not made.requires_grad
    assert torch.equal(made, mlp.down_proj.weight.t())
    mlp(torch.randn(4, H))
    assert copy_of_down(mlp) is made
    assert is_fresh(mlp)


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.TORCH, Backend.C])
@pytest.mark.parametrize("down_copy", [False, True])
def test_copy_is_made_where_it_is_wanted(backend: Backend, down_copy: bool) -> None:
    dense = dense_mlp()
    mlp = sparse_mlp(copy.deepcopy(dense))
    mlp.set_backend(backend, down_copy)
    for tokens in (0, 1, 4):
        x = torch.randn(tokens, H)
        y = mlp(x)
        assert y.shape == x.shape
        if tokens:
            expected = by_hand(dense, x, mlp.catsparse_threshold, mlp.catsparse_mean)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert (copy_of_down(mlp) is not None) == (down_copy and backend is not Backend.TORCH)
    mlp.set_backend(Backend.AUTO, False)
    assert copy_of_down(mlp) is None


@pytest.mark.parametrize("dtype", AUTO_TOKENS, ids=str)
def test_auto_runs_the_kernel_up_to_its_crossover(dtype: torch.dtype, spy: list[int]) -> None:
    mlp = sparse_mlp(dense_mlp()).to(dtype)
    for tokens in range(1, MAX_OP_TOKENS + 1):
        mlp(torch.randn(tokens, H, dtype=dtype))
    assert spy == list(range(1, AUTO_TOKENS[dtype] + 1))
    spy.clear()
    mlp.set_backend(Backend.C, True)
    for tokens in (1, MAX_OP_TOKENS, MAX_OP_TOKENS + 1):
        mlp(torch.randn(tokens, H, dtype=dtype))
    assert spy == [1, MAX_OP_TOKENS]


def sgd_step(mlp: SparseMLP) -> None:
    with torch.enable_grad():
        mlp(torch.randn(40, H)).square().mean().backward()
    torch.optim.SGD(mlp.parameters(), lr=1.0).step()


def fused_step(mlp: SparseMLP) -> None:
    with torch.enable_grad():
        mlp(torch.randn(40, H)).square().mean().backward()
    torch.optim.AdamW(mlp.parameters(), lr=0.1, fused=True).step()


def replace_data(mlp: SparseMLP) -> None:
    weight = mlp.down_proj.weight
    for _ in range(2):  # the second lies where the first weight lay
        weight.data = weight.data * 2


def new_parameter(mlp: SparseMLP) -> None:
    for _ in range(2):
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight * 2, requires_grad=False)


def new_state(mlp: SparseMLP, assign: bool) -> None:
    state = {key: torch.randn_like(value) for key, value in mlp.state_dict().items()}
    mlp.load_state_dict(state, assign=assign)


def set_vector(mlp: SparseMLP) -> None:
    vector = nn.utils.parameters_to_vector(mlp.parameters())
    nn.utils.vector_to_parameters(vector * 2, mlp.parameters())


EDITS: dict[str, Callable[[SparseMLP], Any]] = {
    "nothing": lambda mlp: None,
    "in place": lambda mlp: mlp.down_proj.weight.mul_(2),
    "one element": lambda mlp: mlp.down_proj.weight[3, 5].fill_(2),
    "initialization": lambda mlp: nn.init.normal_(mlp.down_proj.weight),
    "load_state_dict": lambda mlp: new_state(mlp, False),
    "load_state_dict by assignment": lambda mlp: new_state(mlp, True),
    "new data": replace_data,
    "new parameter": new_parameter,
    "new child": lambda mlp: setattr(mlp, "down_proj", nn.Linear(I, H, bias=False)),
    "vector_to_parameters": set_vector,
    "a step": sgd_step,
    "a fused step": fused_step,
    "bf16 and back": lambda mlp: mlp.bfloat16().float(),
    "fp16": lambda mlp: mlp.half(),
    "in place, then new thresholds": lambda mlp: (
        mlp.down_proj.weight.mul_(2),
        mlp.set_threshold(torch.tensor(0.1), mlp.catsparse_mean),
    ),
    "without effect on the version counter, then eval": lambda mlp: (
        mlp.train(),
        mlp.down_proj.weight.data.mul_(2),
        mlp.eval(),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decoded", [False, True], ids=["before decode", "after decode"])
def test_decode_follows_the_weights(edit: str, decoded: bool) -> None:
    mlp = sparse_mlp(dense_mlp())
    if decoded:
        mlp(torch.randn(1, H))
    EDITS[edit](mlp)
    assert is_fresh(mlp)
    assert is_fresh(mlp)


def test_gate_and_up_may_change_under_the_copy() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    made = copy_of_down(mlp)
    mlp.gate_proj.weight.mul_(2)
    mlp.up_proj.weight.data = torch.randn(I, H)
    assert is_fresh(mlp)
    assert copy_of_down(mlp) is made


def test_several_threads_decode_after_a_change() -> None:
    """Whoever is first makes bias and copy again; the others never see half of it."""
    mlp = sparse_mlp(dense_mlp())
    x = torch.randn(1, H)
    expected = mlp(x)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8, initializer=lambda: torch.set_grad_enabled(False)) as pool:
            for _ in range(300):
                mlp._forget()
                for y in pool.map(mlp, [x] * 8):
                    # Whoever comes while the bias is missing masks between the children.
                    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    finally:
        sys.setswitchinterval(interval)


def test_copy_is_dropped_when_the_module_moves() -> None:
    for move in (lambda m: m.bfloat16(), lambda m: m.to("meta"), lambda m: m.double()):
        mlp = sparse_mlp(dense_mlp())
        mlp(torch.randn(1, H))
        assert copy_of_down(move(mlp)) is None


def test_copy_is_not_copied() -> None:
    mlp = sparse_mlp(dense_mlp())
    before = len(pickle.dumps(mlp))
    mlp(torch.randn(1, H))
    assert len(pickle.dumps(mlp)) == before
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert copy_of_down(other) is None
        assert is_fresh(other)
        other.down_proj.weight.mul_(2)
        assert is_fresh(other)
    assert is_fresh(mlp)


def test_copy_is_no_state() -> None:
    mlp = sparse_mlp(dense_mlp())
    names = [*mlp.state_dict()], [n for n, _ in mlp.named_parameters()], [*mlp._buffers]
    mlp(torch.randn(1, H))
    assert names == ([*mlp.state_dict()], [n for n, _ in mlp.named_parameters()], [*mlp._buffers])


def test_new_thresholds_share_the_copy() -> None:
    mlp = sparse_mlp(dense_mlp())
    mlp(torch.randn(1, H))
    made = copy_of_down(mlp)
    for threshold, mean in (
        (torch.tensor(0.1), None),
        (torch.rand(I), torch.randn(I)),
        (torch.tensor(-1.0), torch.zeros(I)),
    ):
        mlp.set_threshold(threshold, mean)
        assert torch.equal(mlp.catsparse_threshold, threshold)
        assert mlp.catsparse_mean is mean or torch.equal(mlp.catsparse_mean, mean)
        assert copy_of_down(mlp) is made
        assert is_fresh(mlp)
        assert copy_of_down(mlp) is made


def test_removal_frees_the_copy() -> None:
    dense = dense_mlp()
    before = set(dense.__dict__)
    mlp = sparse_mlp(dense)
    mlp.set_backend(Backend.C, True)
    mlp(torch.randn(1, H))
    made = copy_of_down(mlp)
    assert made is not None
    reference = weakref.ref(made)
    del made
    remove_sparsity(mlp)
    assert reference() is None
    assert set(dense.__dict__) == before
    assert not any("catsparse" in name for name in dir(dense))


def test_compiled_decode_follows_the_copy() -> None:
    """It makes none, and takes the one that an eager decode has made."""
    torch._dynamo.reset()
    mlp = sparse_mlp(dense_mlp())
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    x = torch.randn(1, H)
    first = compiled(x)
    assert copy_of_down(mlp) is None
    eager = mlp(x)
    assert copy_of_down(mlp) is not None
    assert torch.equal(compiled(x), eager)
    torch.testing.assert_close(first, eager, rtol=1e-5, atol=1e-5)
