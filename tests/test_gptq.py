"""Rounding with data: the solver against a textbook one, and models rounded by it."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

import catsparse
import tiny
from cases import unpacked
from catsparse import CatsparseError, gptq, quantize_weights
from catsparse.gptq import round_with
from catsparse.kernels import FORMATS, quantize
from catsparse.kernels.preview import round_groups
from catsparse.quantized_linear import QuantizedLinear, weights_of_model
from command import run

WIDE = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
IDS = tiny.tokens(6, 32, seed=3)
CASES = list(itertools.product(FORMATS, (False, True)))


def make(fused: bool = False, **changes: Any) -> Any:
    config = Phi3Config if fused else tiny.llama_config
    sizes = {k: v for k, v in WIDE.items() if not (fused and k == "head_dim")}
    return tiny.build(config(**(sizes | changes)))


def problem(out: int = 128, inputs: int = 192, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and H of inputs that go together."""
    torch.manual_seed(out + inputs)
    mixed = torch.randn(inputs, inputs) / inputs**0.5 + 0.3
    x = torch.randn(tokens, inputs) @ mixed
    return torch.randn(out, inputs), x.T @ x


def values(packed: Tensor, scale: Tensor, by_input: bool) -> Tensor:
    """``[out, in]`` in fp64, by the format's definition."""
    found = unpacked(packed, scale)
    return found.T if by_input else found


def loss(w: Tensor, q: Tensor, h: Tensor) -> float:
    missed = w.double() - q
    return float((missed @ h.double() * missed).sum())


def textbook(w: Tensor, h: Tensor, weights: str, by_input: bool) -> Tensor:
    """Algorithm 1 as section 3 of the paper derives it: after each input the inverse of what is
    left of H, by elimination, in fp64."""
    w, h = w.double().clone(), h.double().clone()
    mean = h.diagonal().mean()
    h.diagonal()[h.diagonal() == 0] = mean
    h.diagonal().add_(0.01 * mean)
    inverse, q = torch.linalg.inv(h), torch.zeros_like(w)
    of_rows, of_groups = quantize(w.float(), "int8" if weights == "int4" else weights)[1], None
    for i in range(w.shape[1]):
        column = w[:, i].float()
        if by_input:
            q[:, i] = values(*quantize(column[None], weights), by_input=False)[0]
        elif weights == "int4":
            if i % 64 == 0:
                of_groups = round_groups(w[:, i : i + 64].float())[1][:, 0].double()
            assert of_groups is not None
            q[:, i] = (w[:, i] / of_groups).nan_to_num(0).round().clamp(-8, 7) * of_groups
        else:
            code = column / of_rows
            code = code.round() if weights == "int8" else code.to(FORMATS["fp8"]).float()
            q[:, i] = code.double() * of_rows.double()
        error = (w[:, i] - q[:, i]) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
        inverse -= inverse[:, i, None] * inverse[None, i] / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
    return q


# The solver


@pytest.mark.parametrize(("weights", "by_input"), CASES)
def test_it_is_the_textbooks(weights: str, by_input: bool) -> None:
    """Up to values between two codes, whose rounding fp32 may turn: the objective is the same."""
    w, h = problem()
    q = values(*round_with(w, h, weights, by_input), by_input)
    truth = textbook(w, h, weights, by_input)
    differs = (q - truth).abs().gt(1e-4).double()
    assert float(differs[:, :64].mean()) < 0.02
    assert float(differs.mean()) < 0.1  # what follows from one that was turned
    assert loss(w, q, h) == pytest.approx(loss(w, truth, h), rel=0.02)


@pytest.mark.parametrize(("weights", "by_input"), CASES)
def test_it_beats_round_to_nearest(weights: str, by_input: bool) -> None:
    w, h = problem()
    nearest = quantize(w.T.contiguous() if by_input else w, weights)
    found = round_with(w, h, weights, by_input)
    better = loss(w, values(*found, by_input), h) / loss(w, values(*nearest, by_input), h)
    assert better < (0.9 if weights == "fp8" else 0.7)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in nearest]


@pytest.mark.parametrize(("weights", "by_input"), CASES)
def test_of_independent_inputs_it_is_round_to_nearest(weights: str, by_input: bool) -> None:
    w, h = problem(64, 128)[0], torch.eye(128) * 7
    nearest = quantize(w.T.contiguous() if by_input else w, weights)
    for mine, theirs in zip(round_with(w, h, weights, by_input), nearest, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("weights", FORMATS)
def test_inputs_that_are_never_there_take_no_part(weights: str) -> None:
    w, h = problem(64, 128)
    dead = torch.arange(128) % 5 == 0
    h[dead], h[:, dead] = 0, 0
    q = values(*round_with(w, h, weights), by_input=False)
    assert bool(q.isfinite().all())
    if weights != "int4":  # whose groups' scales follow what the others became
        nearest = values(*quantize(w, weights), by_input=False)
        assert torch.equal(q[:, dead], nearest[:, dead])


@pytest.mark.parametrize(("weights", "by_input"), CASES)
def test_hostile_weights(weights: str, by_input: bool) -> None:
    h = problem(64, 64)[1]
    for w in (torch.zeros(64, 64), torch.randn(64, 64) * 1e20, torch.randn(64, 64) * 1e-20):
        for hessian in (h, torch.zeros(64, 64), torch.ones(64, 64), h * 1e-20):
            q = values(*round_with(w, hessian, weights, by_input), by_input)
            assert bool(q.isfinite().all())
            assert float((q - w).norm()) <= 2 * float(w.double().norm())
    for bad in (float("nan"), float("inf")):
        w, other = torch.ones(64, 64), h.clone()
        w[3, 4], other[5, 6] = bad, bad
        for pair in ((w, h), (torch.ones(64, 64), other)):
            with pytest.raises(CatsparseError, match="not finite"):
                round_with(*pair, weights, by_input)


# Models


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_layers_are_rounded_with_what_reaches_them(weights: str, fused: bool) -> None:
    """By hand: H of the inputs that the partly packed model gives, block by block."""
    model = make(fused, attention_bias=True) if not fused else make(fused)
    by_hand = copy.deepcopy(model)
    assert quantize_weights(model, weights, IDS, progress=False) is model
    assert weights_of_model(model) == f"gptq-{weights}"
    for group in ("layers.0.", "layers.1.", "lm_head"):
        names = [name for name in linears(by_hand) if group in name]
        inputs: dict[str, Tensor] = {}
        hooks = [
            by_hand.get_submodule(n).register_forward_pre_hook(
                lambda m, args, n=n, to=inputs: to.update({n: args[0].flatten(0, -2)})
            )
            for n in names
        ]
        with torch.no_grad():
            by_hand(IDS)
        for hook in hooks:
            hook.remove()
        for name in names:
            mine = model.get_submodule(name)
            x = inputs[name].float()
            packed, scale = round_with(
                by_hand.get_submodule(name).weight, x.T @ x, weights, mine.by_input
            )
            theirs = values(packed, scale, mine.by_input)
            ours = values(mine.weight.detach(), mine.weight_scale, mine.by_input)
            assert float((ours - theirs).abs().gt(1e-4).double().mean()) < 0.01
            parent, _, child = name.rpartition(".")
            setattr(by_hand.get_submodule(parent), child, mine)


def test_padding_is_not_counted() -> None:
    mask = torch.ones_like(IDS)
    mask[:, 20:] = 0
    ids = IDS.clone()
    found = []
    for filler in (5, 7):
        ids[:, 20:] = filler
        model = quantize_weights(
            make(), "int4", [{"input_ids": ids, "attention_mask": mask}], progress=False
        )
        found.append(model.model.layers[0].mlp.down_proj.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("tied", [False, True])
def test_a_failure_leaves_the_model_as_it_was(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tie_word_embeddings=tied)
    layers, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    done = []

    def failing(*args: Any) -> Any:
        done.append(args)
        if len(done) == 9:
            raise KeyboardInterrupt
        return round_with(*args)

    monkeypatch.setattr(gptq, "round_with", failing)
    with pytest.raises(KeyboardInterrupt):
        quantize_weights(model, "int4", IDS, progress=False)
    assert dict(model.named_modules()) == layers
    assert model.config.tie_word_embeddings is tied
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_refused() -> None:
    with pytest.raises(CatsparseError, match="leave data out"):
        quantize_weights(make(), None, IDS)
    with pytest.raises(CatsparseError, match="some windows"):
        quantize_weights(make(), "int8", [])
    with pytest.raises(CatsparseError, match="tokenizer"):
        quantize_weights(make(), "int8", ["some text"])
    model = quantize_weights(make(), "int4", IDS, progress=False)
    calibration = catsparse.calibrate(model, IDS, progress=False, preview=4)
    with pytest.raises(CatsparseError, match="own preview"):
        catsparse.sparsify(model, calibration, 0.5)


def test_only_a_merged_folder_holds_them(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    quantize_weights(model, "int4", IDS, progress=False)
    calibration = catsparse.calibrate(model, IDS, progress=False)
    catsparse.sparsify(model, calibration, 0.5)
    with pytest.raises(CatsparseError, match="merge=True"):
        catsparse.save(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    catsparse.save(model, tmp_path / "merged", merge=True)
    again = catsparse.load(tmp_path / "merged")
    assert weights_of_model(again) == "gptq-int4"
    for name, layer in linears(model).items():
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(again.get_submodule(name).weight, layer.weight)
        assert torch.equal(again.get_submodule(name).weight_scale, layer.weight_scale)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    # Without its weights the folder cannot be used: nothing else has these.
    (tmp_path / "merged" / "config.json").unlink()
    with pytest.raises(CatsparseError, match="merged folder"):
        catsparse.load(tmp_path / "merged", base_model=str(tmp_path / "base"))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    make(vocab_size=8192).save_pretrained(base)
    catsparse.hub.load_tokenizer("default").save_pretrained(base)
    options = ["--weights", "int4", "--tokens", "256", "--seq-len", "32"]
    wrong = (["--rounding", "gptq"], ["--rounding", "magic"])
    for extra in wrong:
        code, _, error = run(
            capsys, "sparsify", base, "-o", str(tmp_path / "out"), *options, *extra
        )
        assert code == 2
        assert "merge" in error or "magic" in error
    code, text, error = run(
        *(capsys, "sparsify", base, "-o", str(tmp_path / "out"), *options),
        *("--rounding", "gptq", "--merge", "--json"),
    )
    assert code == 0, error
    assert json.loads(text)["weights"] == "gptq-int4"
    assert weights_of_model(catsparse.load(tmp_path / "out")) == "gptq-int4"
