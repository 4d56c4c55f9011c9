"""The sparse forward with a gate preview and a second decision, against both by hand."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catsparse
import tiny
from catsparse import modules as module_under_test
from catsparse import weights as module_weights
from catsparse.kernels import MAX_OP_TOKENS, Backend, Choice, gated_mlp
from catsparse.modules import SparseMLP, add_sparsity, remove_sparsity, sparse_modules
from catsparse.sites import match_gated_mlp
from test_modules import H, I, dense_mlp

BUFFERS = ("catsparse_preview", "catsparse_preview_scale", "catsparse_product_threshold")


@pytest.fixture(autouse=True)
def no_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inference, unless the test is marked as training."""
    with torch.set_grad_enabled("training" in request.node.name):
        yield


def sparse(
    dense: nn.Module, preview: int | None = 4, second: bool = True, compensate: bool = True
) -> SparseMLP:
    torch.manual_seed(1)
    threshold = 0.2 + 0.3 * torch.rand(I)
    product = 0.1 + 0.3 * torch.rand(I) if second else None
    mean = 0.3 * torch.randn(I) if compensate else None
    site = match_gated_mlp(dense)
    return add_sparsity(dense, site, threshold, mean, "masked", product, preview)


def preview_by_hand(w: Tensor, bits: int) -> Tensor:
    """To nearest in groups of 64 inputs: the extreme over the lowest number, away from zero to
    9 - bits significant bits; in 4 bits the best of three such scales."""
    least = 2 ** (bits - 1)
    groups = []
    for group in w.float().split(64, dim=1):
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        reach = torch.where(high > -low, -high, -low).double() / least
        tries = []
        for part in (1, 0.94, 0.88) if bits == 4 else (1,):
            step = 2.0 ** ((reach * part).abs().log2().floor() - (8 - bits))
            scale = ((reach * part).abs() / step).ceil() * step * reach.sign()
            tries.append((group / scale).round().clamp(-least, least - 1) * scale)
        missed = torch.stack([(t - group).square().sum(1) for t in tries])
        best = missed.argmin(0)
        groups.append(torch.stack(tries)[best, torch.arange(len(w))].to(w.dtype))
    return torch.cat(groups, 1)


def weights(dense: Any) -> tuple[Tensor, Tensor, Tensor]:
    if hasattr(dense, "gate_up_proj"):
        gate, up = dense.gate_up_proj.weight.split(I)
    else:
        gate, up = dense.gate_proj.weight, dense.up_proj.weight
    return gate, up, dense.down_proj.weight


def by_hand(mlp: SparseMLP, x: Tensor, preview: int | None) -> Tensor:
    """What ``mlp`` ought to compute, ``preview`` deciding."""
    gate, up, down = weights(mlp)
    g = F.silu(x @ gate.t())
    decides = g if preview is None else F.silu(x @ preview_by_hand(gate, preview).to(x.dtype).t())
    h = g * (x @ up.t())
    kept = decides.abs() > mlp.catsparse_threshold
    if mlp.catsparse_product_threshold is not None:
        kept &= h.abs() > mlp.catsparse_product_threshold
    if x.numel() > 100:
        assert 0.1 < float(kept.float().mean()) < 0.9
    fill = torch.zeros(I) if mlp.catsparse_mean is None else mlp.catsparse_mean
    return torch.where(kept, h, fill) @ down.t()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Tokens of each call of the op, and whether it had a preview."""
    calls: list[tuple[int, bool]] = []

    def watched(x: Tensor, *arguments: Any, backend: str) -> Tensor:
        calls.append((x.numel() // x.shape[-1], arguments[8] is not None))
        return gated_mlp(x, *arguments, backend=backend)

    monkeypatch.setattr(module_under_test, "gated_mlp", watched)
    return calls


def check(mlp: SparseMLP, preview: int | None) -> None:
    """Decode, prefill and counting do what is written out by hand."""
    masks: list[tuple[Tensor, Tensor]] = []
    for tokens in (1, 5, MAX_OP_TOKENS + 9):
        x = torch.randn(tokens, H)
        expected = by_hand(mlp, x, preview)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
        mlp.catsparse_counter = lambda keep, kept: masks.append((keep, kept))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
        mlp.catsparse_counter = None
    for keep, kept in masks:
        assert not bool((kept & ~keep).any())
        assert (kept is keep) == (mlp.catsparse_product_threshold is None)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("preview", [None, 4, 8])
@pytest.mark.parametrize("second", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_every_path_against_hand(
    fused: bool, preview: int | None, second: bool, compensate: bool, spy: list[Any]
) -> None:
    check(sparse(dense_mlp(fused), preview, second, compensate), preview)
    assert spy == [(1, preview is not None), (5, preview is not None)]


def test_preview_decides_otherwise_than_the_gate() -> None:
    """Else the tests here would show nothing."""
    mlp, x = sparse(dense_mlp()), torch.randn(64, H)
    assert not torch.allclose(mlp(x), by_hand(mlp, x, None), atol=1e-2)
    assert not torch.allclose(by_hand(mlp, x, 8), by_hand(mlp, x, 4), atol=1e-2)


def test_set_threshold() -> None:
    mlp = sparse(dense_mlp())
    made = mlp.catsparse_preview
    mlp.set_threshold(torch.tensor(0.3), None, torch.tensor(0.2))
    check(mlp, 4)
    mlp.set_threshold(torch.tensor(0.3), None)
    assert mlp.catsparse_product_threshold is None
    check(mlp, 4)
    mlp.set_backend(Backend.TORCH, True)
    assert mlp.catsparse_preview is made  # its weight has not changed
    check(mlp, 4)


# Which call gets the preview


@pytest.mark.parametrize("tokens", [1, 4, 5, 16])
def test_dense_matmuls_on_a_gpu_decide_by_the_gate(tokens: int, spy: list[Any]) -> None:
    mlp = sparse(dense_mlp())
    mlp._catsparse_choice = Choice(Backend.CUDA, 4, "as on a GPU")
    mlp(torch.randn(tokens, H))
    assert spy == [(tokens, tokens <= 4)]


@pytest.mark.parametrize("tokens", [1, MAX_OP_TOKENS + 1])
def test_compiled(tokens: int) -> None:
    mlp, x = sparse(dense_mlp()), torch.randn(tokens, H)
    expected = mlp(x)
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


# What the preview follows


def test_preview_follows_the_gate(spy: list[Any]) -> None:
    for fused in (False, True):
        mlp = sparse(dense_mlp(fused))
        gate = weights(mlp)[0]
        gate.mul_(-1.5)
        gate[:, 3] += 0.5
        check(mlp, 4)


def test_preview_follows_the_gate_in_prefill() -> None:
    mlp, x = sparse(dense_mlp()), torch.randn(40, H)
    mlp.gate_proj.weight.mul_(torch.linspace(0.5, 2, H))
    torch.testing.assert_close(mlp(x), by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)


def test_preview_follows_load_state_dict_and_new_children() -> None:
    mlp = sparse(dense_mlp())
    state = {k: 0.25 * torch.randn_like(v) for k, v in mlp.state_dict().items()}
    mlp.load_state_dict(state)
    check(mlp, 4)
    mlp.load_state_dict({k: v.flip(0) for k, v in state.items()}, assign=True)
    check(mlp, 4)
    mlp.gate_proj = nn.Linear(H, I, bias=False)
    with torch.no_grad():
        mlp.gate_proj.weight.normal_(std=0.25)
    check(mlp, 4)


def test_preview_follows_steps_in_training() -> None:
    """Fused optimizers leave no trace in the weights' version."""
    mlp = sparse(dense_mlp())
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        mlp(torch.randn(40, H)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            check(mlp, 4)


def test_preview_is_kept_while_the_down_projection_changes() -> None:
    mlp = sparse(dense_mlp())
    made = mlp.catsparse_preview
    mlp.down_proj.weight.mul_(2)
    check(mlp, 4)
    assert mlp.catsparse_preview is made


# In training


def test_training_decides_by_the_preview() -> None:
    mlp, x = sparse(dense_mlp()), torch.randn(40, H)
    for tokens in (x, x[:3]):
        y = mlp(tokens)
        assert y.requires_grad
        torch.testing.assert_close(y, by_hand(mlp, tokens, 4), rtol=1e-4, atol=1e-4)
    gate, *_ = weights(mlp)
    never = (F.silu(x @ preview_by_hand(gate, 4).t()).abs() <= mlp.catsparse_threshold).all(0)
    never[0] = True
    mlp.catsparse_threshold = torch.where(never, 3e38, mlp.catsparse_threshold)
    mlp(x).square().sum().backward()  # the gradient passes kept neurons only
    assert not bool(mlp.gate_proj.weight.grad[never].any())
    assert bool(mlp.gate_proj.weight.grad[~never].any())


def test_training_keeps_no_preview_of_weights_that_a_step_changes() -> None:
    """Fused optimizers step past the weights' versions, and nothing calls eval()."""
    mlp, x = sparse(dense_mlp()), torch.randn(40, H)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=0.05, fused=True)
    mlp(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(mlp(x), by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)


def test_compiled_training_decides_by_the_gate() -> None:
    mlp, x = sparse(dense_mlp()), torch.randn(40, H)
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), by_hand(mlp, x, None), rtol=1e-4, atol=1e-4)


def test_module_in_train_mode_decides_by_the_preview() -> None:
    mlp = sparse(dense_mlp()).train()
    check(mlp, 4)
    assert mlp.why_not_preview() is None


# Where the gate itself decides


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_hooked_children_decide_by_the_gate(child: str) -> None:
    mlp = sparse(dense_mlp())
    handle = getattr(mlp, child).register_forward_hook(lambda *_: None)
    check(mlp, None)
    assert mlp.why_not_preview() == f"{child} is hooked"
    handle.remove()
    check(mlp, 4)


def left_out(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """As where the kernel that serves all else does not take the preview, unless torch decodes."""

    def choose(asked: Backend, *_: Any) -> Choice:
        gpu = asked is not Backend.TORCH
        return Choice(asked, 0, "as on a GPU", reason if gpu else None)

    monkeypatch.setattr(module_weights, "choose_backend", choose)


@pytest.mark.parametrize("products", [False, True])
def test_a_preview_that_is_left_out_decides_in_no_path(
    products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out(monkeypatch, "no room")
    mlp = sparse_of_products(dense_mlp(64)) if products else sparse(dense_mlp(64))
    check_any = check_products if products else check
    assert mlp.why_not_preview() == "no room"
    assert mlp.catsparse_preview is None
    check_any(mlp, None)
    # It comes and goes with what decodes, the weights being the same.
    mlp.set_backend(Backend.TORCH, True)
    assert mlp.why_not_preview() is None
    check_any(mlp, 4)
    mlp.set_backend(Backend.AUTO, True)
    check_any(mlp, None)
    left_out(monkeypatch, None)
    mlp.refresh()
    check_any(mlp, 4)


def test_training_leaves_it_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out(monkeypatch, "no room")
    mlp = sparse(dense_mlp(64), second=False)
    x = torch.randn(60, H)
    torch.testing.assert_close(mlp(x), by_hand(mlp, x, None), rtol=1e-4, atol=1e-4)
    left_out(monkeypatch, None)
    torch.testing.assert_close(mlp(x), by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)


def test_lora_leaves_out_what_its_merge_will(
    previewed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out(monkeypatch, "no room")
    mlp = previewed.model.layers[0].mlp
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj"])
    adapted = peft.get_peft_model(previewed, config).eval()
    assert mlp.why_not_preview() == "no room"
    assert "4-bit gate preview (not in use: no room" in catsparse.explain(adapted)
    adapted.merge_and_unload()
    assert mlp.why_not_preview() == "no room"


@pytest.fixture
def previewed(llama: Any, windows: Tensor) -> Any:
    calibration = catsparse.calibrate(
        llama, windows, preview=4, products_at=0.4, method="energy", progress=False
    )
    return catsparse.sparsify(llama, calibration, 0.4, down_sparsity=0.6)


def lora_by_hand(mlp: Any, x: Tensor, bits: int | None) -> Tensor:
    """A preview of gate_proj as the adapter changes it decides; None: the exact gate."""
    weight = mlp.gate_proj.get_delta_weight("default") + mlp.gate_proj.weight
    g = F.silu(x @ weight.t())
    decides = g if bits is None else F.silu(x @ preview_by_hand(weight, bits).t())
    h = g * mlp.up_proj(x)
    kept = decides.abs() > mlp.catsparse_threshold
    kept &= h.abs() > mlp.catsparse_product_threshold
    return mlp.down_proj(torch.where(kept, h, mlp.catsparse_mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_decides_as_its_merge_will(previewed: Any, dtype: torch.dtype) -> None:
    config = peft.LoraConfig(target_modules=["gate_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(previewed).to(dtype), config).eval()
    assert "4-bit gate preview, second" in catsparse.explain(wrapped)
    mlp = next(iter(sparse_modules(wrapped).values()))
    x = torch.randn(20, H, dtype=dtype)
    if dtype is torch.float32:
        torch.testing.assert_close(mlp(x), lora_by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # an adapter that changes, as by load_state_dict
        mlp.gate_proj.lora_B["default"].weight.mul_(-2)
    mlp(x)
    before = mlp.catsparse_preview.clone(), mlp.catsparse_preview_scale.clone()
    if dtype is torch.float32:
        torch.testing.assert_close(mlp(x), lora_by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)
    merged = next(iter(sparse_modules(wrapped.merge_and_unload()).values()))
    merged(x)
    assert torch.equal(merged.catsparse_preview, before[0])  # bit for bit, in bf16 too
    assert torch.equal(merged.catsparse_preview_scale, before[1])
    if dtype is torch.float32:
        check(merged, 4)


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_lora_that_is_off_or_merged_in_place(previewed: Any, state: str) -> None:
    config = peft.LoraConfig(target_modules=["gate_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(previewed), config).eval()
    mlp, x = next(iter(sparse_modules(wrapped).values())), torch.randn(20, H)
    on = mlp(x)
    if state == "merged":
        wrapped.merge_adapter()
        torch.testing.assert_close(mlp(x), on, rtol=1e-4, atol=1e-4)
        wrapped.unmerge_adapter()
        torch.testing.assert_close(mlp(x), on, rtol=1e-4, atol=1e-4)
    else:
        with wrapped.disable_adapter():
            expected = next(iter(sparse_modules(previewed).values()))(x)
            torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(expected, on, atol=1e-2)


def test_a_variant_of_lora_decides_by_the_gate(previewed: Any) -> None:
    """DoRA's weight is no plain sum."""
    config = peft.LoraConfig(target_modules=["gate_proj"], r=2, use_dora=True)
    wrapped = peft.get_peft_model(copy.deepcopy(previewed), config).eval()
    words = catsparse.explain(wrapped)
    assert "4-bit gate preview (not in use: gate_proj is peft's Linear; the exact gate" in words
    mlp, x = next(iter(sparse_modules(wrapped).values())), torch.randn(20, H)
    assert mlp.why_not_preview() == "gate_proj is peft's Linear"
    torch.testing.assert_close(mlp(x), lora_free_by_hand(mlp, x), rtol=1e-4, atol=1e-4)


def lora_free_by_hand(mlp: Any, x: Tensor) -> Tensor:
    """DoRA begins as the identity."""
    g = F.silu(x @ mlp.gate_proj.weight.t())
    h = g * mlp.up_proj(x)
    kept = g.abs() > mlp.catsparse_threshold
    kept &= h.abs() > mlp.catsparse_product_threshold
    return mlp.down_proj(torch.where(kept, h, mlp.catsparse_mean))


def test_explain_says_what_decides(previewed: Any) -> None:
    for line in catsparse.explain(previewed).split("\n"):
        assert "compensated, 4-bit gate preview, second decision; decode by" in line
        if "kernel" in line:
            assert "kept rows of gate, up and down" in line


# Moving, copying, undoing


def exact(mlp: SparseMLP) -> dict[str, Tensor]:
    return {name: getattr(mlp, name).clone() for name in BUFFERS}


def test_changing_dtype_rounds_nothing() -> None:
    # A weight that bf16 holds: the preview is the same in both dtypes.
    dense = dense_mlp().bfloat16().float()
    mlp = sparse(dense)
    before = exact(mlp)
    for convert in (SparseMLP.bfloat16, SparseMLP.float, SparseMLP.double, SparseMLP.float):
        convert(mlp)
        for name, value in before.items():
            assert getattr(mlp, name).dtype == value.dtype
            assert torch.equal(getattr(mlp, name), value), name
        x = torch.randn(20, H, dtype=mlp.gate_proj.weight.dtype)
        assert mlp(x[:2]).dtype == mlp(x).dtype == x.dtype
        for name, value in before.items():
            assert torch.equal(getattr(mlp, name), value), name
    check(mlp, 4)


@pytest.mark.parametrize("fused", [False, True])
def test_copies_are_independent(fused: bool) -> None:
    mlp = sparse(dense_mlp(fused))
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    x = torch.randn(20, H)
    for other in (copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        assert other.catsparse_preview_bits == 4
        assert torch.equal(other(x), mlp(x))
        assert torch.equal(other(x[:2]), mlp(x[:2]))
        weights(other)[0].mul_(-2)
        check(other, 4)
        check(mlp, 4)


def test_densify_leaves_the_model_bit_for_bit(llama: Any, windows: Tensor) -> None:
    state = {k: v.clone() for k, v in llama.state_dict().items()}
    attributes = [sorted(m.__dict__) for m in llama.modules()]
    expected = [tiny.logits(llama, n) for n in (tiny.SHORT, tiny.LONG)]
    calibration = catsparse.calibrate(llama, windows, preview=8, products_at=0.5, progress=False)
    catsparse.sparsify(llama, calibration, 0.5, down_sparsity=0.6)
    assert list(llama.state_dict()) == list(state)  # the preview is in no state dict
    tiny.logits(llama, tiny.SHORT)
    catsparse.densify(llama)
    assert [sorted(m.__dict__) for m in llama.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in llama.state_dict().items())
    for n, logits in zip((tiny.SHORT, tiny.LONG), expected, strict=True):
        assert torch.equal(tiny.logits(llama, n), logits)


def test_remove_sparsity_leaves_no_buffer() -> None:
    dense = dense_mlp()
    before = sorted(dense.__dict__)
    restored = remove_sparsity(sparse(dense))
    assert sorted(restored.__dict__) == before
    assert not dict(restored.named_buffers())
    assert not restored._non_persistent_buffers_set


@pytest.mark.parametrize("bits", [4, 8])
def test_sparsity_0_gives_the_dense_logits(llama: Any, windows: Tensor, bits: int) -> None:
    dense = {n: tiny.logits(llama, n) for n in (tiny.SHORT, tiny.LONG)}
    calibration = catsparse.calibrate(llama, windows, preview=bits, products_at=0.0, progress=False)
    for down in (None, 0.0):
        catsparse.sparsify(llama, calibration, 0.0, down_sparsity=down)
        assert tiny.close(tiny.logits(llama, tiny.SHORT), dense[tiny.SHORT], 1e-5)
        assert torch.equal(tiny.logits(llama, tiny.LONG), dense[tiny.LONG])
        catsparse.set_backend(llama, "torch")
        assert torch.equal(tiny.logits(llama, tiny.SHORT), dense[tiny.SHORT])
        catsparse.densify(llama)


# The decision is the same in every path


def test_prefill_and_decode_decide_alike_in_bf16(llama: Any, windows: Tensor) -> None:
    """Masks of a whole prompt against those read off the op, whose down is the identity."""
    model = llama.bfloat16()
    calibration = catsparse.calibrate(
        model, windows, preview=4, products_at=0.3, method="chess", progress=False
    )
    catsparse.sparsify(model, calibration, 0.3, "chess", down_sparsity=0.5)
    inputs: dict[str, Tensor] = {}
    masks: dict[str, tuple[Tensor, Tensor]] = {}
    for name, mlp in sparse_modules(model).items():
        mlp.register_forward_pre_hook(lambda m, a, name=name: inputs.update({name: a[0]}))
        mlp.catsparse_counter = lambda *both, name=name: masks.update({name: both})
    model(input_ids=tiny.tokens(2, 64, seed=9), use_cache=False)
    same = [0, 0]
    total = 0
    for name, mlp in sparse_modules(model).items():
        mlp.catsparse_counter = None
        x = inputs[name].flatten(0, -2)
        gate, up, _ = weights(mlp)
        identity = torch.eye(I, dtype=x.dtype)
        arguments = (mlp.catsparse_threshold, "silu", None, None)
        preview = (mlp.catsparse_preview, mlp.catsparse_preview_scale)
        for which, product in enumerate((None, mlp.catsparse_product_threshold)):
            h = torch.cat(
                [
                    gated_mlp(few, gate, up, identity, *arguments, product, *preview)
                    for few in x.split(MAX_OP_TOKENS)
                ]
            )
            # A kept product that rounds to 0 is next to none.
            same[which] += int(((h != 0) == masks[name][which].flatten(0, -2)).sum())
        total += x.shape[0] * I
    assert same[0] / total >= 0.999
    assert same[1] / total >= 0.999


# A preview of products


def sparse_of_products(dense: nn.Module, bits: int = 4, compensate: bool = True) -> SparseMLP:
    torch.manual_seed(1)
    threshold, mean = 0.1 + 0.3 * torch.rand(I), 0.3 * torch.randn(I) if compensate else None
    site = match_gated_mlp(dense)
    return add_sparsity(dense, site, threshold, mean, "masked", preview=bits, of_products=True)


def product_by_hand(mlp: SparseMLP, x: Tensor, bits: int | None) -> Tensor:
    """What ``mlp`` ought to compute, the preview of both (or both themselves) deciding."""
    gate, up, down = weights(mlp)
    h = F.silu(x @ gate.t()) * (x @ up.t())
    decides = h
    if bits is not None:
        gate, up = (preview_by_hand(w, bits).to(x.dtype) for w in (gate, up))
        decides = F.silu(x @ gate.t()) * (x @ up.t())
    kept = decides.abs() > mlp.catsparse_threshold
    if x.numel() > 100:
        assert 0.1 < float(kept.float().mean()) < 0.9
    fill = torch.zeros(I) if mlp.catsparse_mean is None else mlp.catsparse_mean
    return torch.where(kept, h, fill) @ down.t()


def check_products(mlp: SparseMLP, bits: int | None) -> None:
    masks: list[tuple[Tensor, Tensor]] = []
    for tokens in (1, 5, MAX_OP_TOKENS + 9):
        x = torch.randn(tokens, H)
        expected = product_by_hand(mlp, x, bits)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
        mlp.catsparse_counter = lambda *both: masks.append(both)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
        mlp.catsparse_counter = None
    assert masks
    assert all(keep is kept for keep, kept in masks)  # gate's and down's rows alike


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_product_in_every_path_against_hand(
    fused: bool, bits: int, compensate: bool, spy: list[Any]
) -> None:
    mlp = sparse_of_products(dense_mlp(fused), bits, compensate)
    assert mlp.catsparse_preview is not None
    assert mlp.catsparse_preview.shape[0] == 2 * I
    check_products(mlp, bits)
    assert spy == [(1, True), (5, True)]
    mlp.set_threshold(torch.tensor(0.25), None)
    check_products(mlp, bits)


def test_product_of_the_preview_is_not_the_exact_one() -> None:
    mlp, x = sparse_of_products(dense_mlp()), torch.randn(64, H)
    assert not torch.allclose(mlp(x), product_by_hand(mlp, x, None), atol=1e-2)
    assert not torch.allclose(mlp(x), product_by_hand(mlp, x, 8), atol=1e-2)


@pytest.mark.parametrize("which", [0, 1], ids=["gate", "up"])
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_preview_of_products_follows_both_weights(which: int, fused: bool, tokens: int) -> None:
    mlp = sparse_of_products(dense_mlp(fused))
    mlp(torch.randn(tokens, H))
    weights(mlp)[which].mul_(torch.linspace(0.5, 2, H))
    x = torch.randn(tokens, H)
    torch.testing.assert_close(mlp(x), product_by_hand(mlp, x, 4), rtol=1e-4, atol=1e-4)
    check_products(mlp, 4)


def test_preview_of_products_follows_new_children_and_steps() -> None:
    mlp = sparse_of_products(dense_mlp())
    for child in ("gate_proj", "up_proj"):
        linear = nn.Linear(H, I, bias=False)
        nn.init.normal_(linear.weight, std=0.25)
        setattr(mlp, child, linear)
        check_products(mlp, 4)
    mlp.up_proj.weight.data.mul_(1.5)  # as a LoRA merge writes: the version does not tell
    mlp.up_proj = mlp.up_proj
    check_products(mlp, 4)


def test_preview_of_the_gate_does_not_watch_up() -> None:
    mlp = sparse(dense_mlp())
    made = mlp.catsparse_preview
    mlp.up_proj.weight.mul_(2)
    check(mlp, 4)
    assert mlp.catsparse_preview is made


# Where the product itself decides


def test_training_decides_by_the_product_that_the_preview_foretells() -> None:
    mlp, x = sparse_of_products(dense_mlp()), torch.randn(40, H)
    for few in (x, x[:3]):
        y = mlp(few)
        assert y.requires_grad
        torch.testing.assert_close(y, product_by_hand(mlp, few, 4), rtol=1e-4, atol=1e-4)
    gate, up = (preview_by_hand(w, 4) for w in weights(mlp)[:2])
    kept = (F.silu(x @ gate.t()) * (x @ up.t())).abs() > mlp.catsparse_threshold
    never = ~kept.any(0)
    never[0] = True
    mlp.catsparse_threshold = torch.where(never, 3e38, mlp.catsparse_threshold)
    mlp(x).square().sum().backward()
    for child in (mlp.gate_proj, mlp.up_proj):  # the gradient passes kept neurons only
        assert not bool(child.weight.grad[never].any())
        assert bool(child.weight.grad[~never].any())


def test_module_in_train_mode_decides_by_the_product() -> None:
    mlp = sparse_of_products(dense_mlp()).train()
    check_products(mlp, 4)
    mlp.eval()
    check_products(mlp, 4)


@pytest.mark.parametrize("child", ["gate_proj", "up_proj", "down_proj"])
def test_hooked_children_decide_by_the_product(child: str) -> None:
    mlp = sparse_of_products(dense_mlp())
    handle = getattr(mlp, child).register_forward_hook(lambda *_: None)
    check_products(mlp, None)
    handle.remove()
    check_products(mlp, 4)


@pytest.mark.parametrize("tokens", [4, 5])
def test_dense_matmuls_on_a_gpu_decide_by_the_product(tokens: int, spy: list[Any]) -> None:
    mlp = sparse_of_products(dense_mlp())
    mlp._catsparse_choice = Choice(Backend.CUDA, 4, "as on a GPU")
    x = torch.randn(tokens, H)
    expected = product_by_hand(mlp, x, 4 if tokens == 4 else None)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
    assert spy == [(tokens, tokens == 4)]


@pytest.mark.parametrize("tokens", [1, MAX_OP_TOKENS + 1])
def test_product_compiled(tokens: int) -> None:
    mlp, x = sparse_of_products(dense_mlp()), torch.randn(tokens, H)
    expected = mlp(x)
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_copies_of_products_are_independent(fused: bool) -> None:
    mlp = sparse_of_products(dense_mlp(fused))
    file = io.BytesIO()
    torch.save(mlp, file)
    file.seek(0)
    for other in (copy.deepcopy(mlp), torch.load(file, weights_only=False)):
        weights(other)[1].mul_(-2)
        check_products(other, 4)
        check_products(mlp, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_product_at_sparsity_0_gives_the_dense_logits(
    llama: Any, windows: Tensor, bits: int
) -> None:
    dense = {n: tiny.logits(llama, n) for n in (tiny.SHORT, tiny.LONG)}
    attributes = [sorted(m.__dict__) for m in llama.modules()]
    calibration = catsparse.calibrate(llama, windows, preview=bits, progress=False)
    catsparse.sparsify(llama, calibration, 0.0)
    assert llama.catsparse.config.method == "product"
    assert tiny.close(tiny.logits(llama, tiny.SHORT), dense[tiny.SHORT], 1e-5)
    assert torch.equal(tiny.logits(llama, tiny.LONG), dense[tiny.LONG])
    for mode in (True, False):
        llama.train(mode)
        assert tiny.close(tiny.logits(llama, tiny.SHORT), dense[tiny.SHORT], 1e-5)
    catsparse.densify(llama)
    assert [sorted(m.__dict__) for m in llama.modules()] == attributes
