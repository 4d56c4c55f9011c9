"""The sparse linear layer: which path a call takes, what follows from its weight, its undoing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import catsparse
from catsparse import CatsparseError, linears
from catsparse.kernels import Backend
from catsparse.linears import SparseLinear, add_input_sparsity, remove_input_sparsity
from tiny import build, close, llama_config, logits, tokens

INPUTS, OUTPUTS = 40, 24
SHORT, LONG = 3, 20


def layer(
    mean: bool = True, bias: bool = True, prefill: str = "masked", dtype: torch.dtype | None = None
) -> SparseLinear:
    torch.manual_seed(0)
    dense = nn.Linear(INPUTS, OUTPUTS, bias=bias).eval()
    means = torch.randn(INPUTS) * 0.1 if mean else None
    made = add_input_sparsity(dense, torch.rand(INPUTS), means, prefill)
    return made if dtype is None else made.to(dtype)  # type: ignore[return-value]


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, rows, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def expected(module: SparseLinear, x: Tensor) -> Tensor:
    mean = module.catsparse_mean
    fill = torch.zeros(()) if mean is None else mean
    kept = x.float().abs() > module.catsparse_threshold
    masked = torch.where(kept, x.double(), fill.double())
    y = masked @ module.weight.double().t()
    return y if module.bias is None else y + module.bias.double()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which implementation each call takes."""
    seen: list[str] = []
    for name in ("sparse_linear", "sparse_linear_reference", "masked_input"):
        real = getattr(linears, name)

        def note(*args: Any, name: str = name, real: Any = real) -> Any:
            seen.append(name)
            return real(*args)

        monkeypatch.setattr(linears, name, note)
    return seen


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [SHORT, LONG])
def test_few_tokens_and_many_give_the_same(rows: int, bias: bool, mean: bool) -> None:
    module = layer(mean, bias)
    with torch.no_grad():
        assert close(module(inputs(rows)).double(), expected(module, inputs(rows)))


def test_paths(calls: list[str]) -> None:
    module = layer()
    with torch.no_grad():
        module(inputs(SHORT))
        module(inputs(LONG))
    assert calls == ["sparse_linear", "masked_input"]
    module.set_backend(Backend.TORCH, True)
    with torch.no_grad():
        module(inputs(SHORT))
    assert calls[2:] == ["sparse_linear_reference"]
    module(inputs(SHORT))  # gradients
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(inputs(SHORT))
    module.catsparse_counter = lambda keep: None
    with torch.no_grad():
        module(inputs(SHORT))
    assert calls[3:] == ["masked_input"] * 3


def test_dense_prefill_masks_few_tokens_only() -> None:
    module = layer(prefill="dense")
    with torch.no_grad():
        dense = nn.functional.linear(inputs(LONG), module.weight, module.bias)
        assert torch.equal(module(inputs(LONG)), dense)
        assert close(module(inputs(SHORT)).double(), expected(module, inputs(SHORT)))
        module.catsparse_enabled = False
        dense = nn.functional.linear(inputs(SHORT), module.weight, module.bias)
        assert torch.equal(module(inputs(SHORT)), dense)


def test_gradient_passes_kept_inputs_only() -> None:
    module, x = layer(), inputs(SHORT).requires_grad_()
    module(x).sum().backward()
    kept = x.detach().abs() > module.catsparse_threshold
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept)


@pytest.mark.parametrize("how", ["in place", ".data", "load_state_dict", "optimizer"])
def test_a_changed_weight_is_followed(how: str) -> None:
    module, x = layer(), inputs(SHORT)
    with torch.no_grad():
        before = module(x)
    if how == "in place":
        with torch.no_grad():
            module.weight.mul_(2)
    elif how == ".data":  # as a LoRA merge does
        module.weight.data += torch.randn(OUTPUTS, 1) @ torch.randn(1, INPUTS)
    elif how == "load_state_dict":
        module.load_state_dict({k: 2 * v for k, v in module.state_dict().items()})
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        module.train()
        module(x).square().mean().backward()
        optimizer.step()
        module.eval()
    with torch.no_grad():
        after = module(x)
    assert not close(after, before, 1e-2)
    assert close(after.double(), expected(module, x))


def test_merged_lora_is_followed() -> None:
    peft = pytest.importorskip("peft")
    model = build(llama_config())
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), progress=False, inputs="attention")
    catsparse.sparsify(model, calibration, 0.4, "energy", scope="all")
    logits(model, 3)  # copies are made
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    apart = logits(wrapped, 3)
    merged = wrapped.merge_and_unload()
    # LoRA's own product has no dropped input, so they agree only roughly; with the layers' decode
    # and prefill paths on the merged weights exactly.
    assert not torch.equal(logits(merged, 3), apart)
    for module in linears.sparse_linears(merged).values():
        x = torch.randn(1, 3, module.in_features)
        with torch.no_grad():
            assert close(module(x).double(), expected(module, x))


def test_casting_rounds_no_threshold() -> None:
    module = layer()
    threshold = module.catsparse_threshold.clone()
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.catsparse_threshold, threshold)
    assert module.catsparse_mean is not None
    assert module.catsparse_mean.dtype == torch.float32
    x = inputs(SHORT, torch.bfloat16)
    with torch.no_grad():
        assert close(module(x).double(), expected(module, x), 2e-2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Any) -> None:
    module = layer()
    with torch.no_grad():
        y = module(inputs(SHORT))
        other = copied(module)
        other.weight.mul_(3)
        assert torch.equal(module(inputs(SHORT)), y)
        assert close(other(inputs(SHORT)).double(), expected(other, inputs(SHORT)))


def test_state_dict_is_the_dense_one() -> None:
    assert set(layer().state_dict()) == {"weight", "bias"}


def test_no_copy_if_none_is_allowed() -> None:
    module = layer()
    module.set_backend(Backend.AUTO, False)
    with torch.no_grad():
        assert close(module(inputs(SHORT)).double(), expected(module, inputs(SHORT)))
    assert module._catsparse_copy is None


def test_undone() -> None:
    module = layer()
    weight = module.weight
    module.weight.data = module.weight.data.t().contiguous().t()  # a GPU's layout
    values = weight.detach().clone()
    dense = remove_input_sparsity(module)
    assert type(dense) is nn.Linear
    assert dense.weight is weight
    assert weight.is_contiguous()
    assert torch.equal(weight, values)


def test_compiled_forward_agrees() -> None:
    module = layer()
    module.prepare_decode()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        for rows in (SHORT, LONG):
            assert close(compiled(inputs(rows)), module(inputs(rows)))


def test_generate_agrees_with_the_loop_by_hand() -> None:
    model = build(llama_config())
    calibration = catsparse.calibrate(
        model, tokens(8, 32, 7), progress=False, preview=4, inputs="attention"
    )
    catsparse.sparsify(model, calibration, 0.4, "product", scope="all")
    ids = tokens(1, 12)
    found = catsparse.generate(model, ids, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_explained_and_asked_for() -> None:
    model = build(llama_config())
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), progress=False, inputs="all")
    catsparse.sparsify(model, calibration, 0.4, "wina", scope="all")
    lines = catsparse.explain(model).splitlines()
    assert len(lines) == 14
    assert "q_proj: sparse inputs, per-input thresholds, compensated; decode by" in lines[0]
    catsparse.set_backend(model, "torch")
    assert "torch, dense matmuls (asked for)" in catsparse.explain(model)
    with pytest.raises(CatsparseError, match="cannot run the backend cuda"):
        catsparse.set_backend(model, "cuda")
