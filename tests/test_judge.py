"""The guard that refuses results of layers that ran dense, and batches that fit into memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

import catsparse
from catsparse import CatsparseError, evaluate, judge
from catsparse.judge import scored_sparse, while_it_fits
from catsparse.modules import remove_sparsity, sparse_modules
from tiny import SMALL, build, calibrate, logits, tokens


def run(model: Any, rows: int = 2, length: int = 24) -> None:
    with torch.no_grad():
        model(input_ids=tokens(rows, length), use_cache=False)


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_every_token_is_thresholded_and_counted(
    llama: Any, calibration: catsparse.Calibration, prefill: str
) -> None:
    catsparse.sparsify(llama, calibration, 0.5, prefill=prefill)
    before = logits(llama)
    with scored_sparse(llama) as meter:
        run(llama, 2, 24)
        run(llama, 1, 3)
    for name in sparse_modules(llama):
        assert meter.counter(name).total == (2 * 24 + 3) * 48
    assert torch.equal(logits(llama), before)
    for module in sparse_modules(llama).values():
        assert module.catsparse_prefill == prefill
        assert not module._forward_pre_hooks
        assert module.catsparse_counter is None


def test_fused_gate_and_up_count_their_neurons_once() -> None:
    model = build(Phi3Config(**SMALL))
    catsparse.sparsify(model, calibrate(model), 0.5)
    with scored_sparse(model) as meter:
        run(model)
    assert meter.sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("how", ["disabled", "dense policy"])
def test_a_layer_that_ran_dense_is_refused(sparse_llama: Any, how: str) -> None:
    name, module = list(sparse_modules(sparse_llama).items())[1]

    def run_and_break() -> None:
        run(sparse_llama, 1, 24)
        if how == "disabled":
            module.catsparse_enabled = False
        else:
            module.catsparse_prefill = "dense"
        run(sparse_llama, 2, 24)

    with (
        pytest.raises(CatsparseError, match=rf"{name} is meant .* dense for 48 of 72 tokens"),
        scored_sparse(sparse_llama),
    ):
        run_and_break()
    assert not module._forward_pre_hooks


def test_a_layer_that_was_made_dense_is_refused(sparse_llama: Any) -> None:
    name, module = list(sparse_modules(sparse_llama).items())[1]
    remove_sparsity(module)
    with (
        pytest.raises(CatsparseError, match=f"{name} is meant to be sparse and is dense"),
        scored_sparse(sparse_llama),
    ):
        run(sparse_llama)


def test_a_layer_that_saw_nothing_is_refused(sparse_llama: Any) -> None:
    name = list(sparse_modules(sparse_llama))[1]
    layer = sparse_llama.model.layers[1]
    layer.mlp, skipped = torch.nn.Identity(), layer.mlp
    layer.spare = skipped  # still in the model, never run
    with (
        pytest.raises(CatsparseError, match=f"{name} is meant to be sparse and is dense"),
        scored_sparse(sparse_llama),
    ):
        run(sparse_llama)
    with (
        pytest.raises(CatsparseError, match="no token went through"),
        scored_sparse(_without_state(sparse_llama)),
    ):
        run(sparse_llama)


def _without_state(model: Any) -> Any:
    del model.catsparse
    return model


def test_an_error_inside_is_not_hidden(sparse_llama: Any) -> None:
    with pytest.raises(KeyError), scored_sparse(sparse_llama):
        raise KeyError("mine")
    assert not any(m._forward_pre_hooks for m in sparse_modules(sparse_llama).values())


def test_a_dense_model_is_refused(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="not sparse"), scored_sparse(llama):
        run(llama)


def test_perplexity_of_a_layer_that_ran_dense_is_refused(sparse_llama: Any) -> None:
    last = list(sparse_modules(sparse_llama).values())[-1]
    # As a thread of somebody else's might, in the middle of it.
    last.register_forward_pre_hook(lambda module, _: setattr(module, "catsparse_enabled", False))
    with pytest.raises(CatsparseError, match="ran dense for 160 of 160"):
        evaluate.evaluate(sparse_llama, tokens(4, 40), progress=False)


def test_under_a_peft_wrapper(sparse_llama: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    model = peft.get_peft_model(sparse_llama, config).eval()
    with scored_sparse(model) as meter:
        run(model)
    assert len(meter.sites) == 2


# -- batches


def test_batches_are_halved_until_they_fit() -> None:
    sizes = []

    def attempt(size: int) -> str:
        sizes.append(size)
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    assert while_it_fits(40, attempt) == "done"
    assert sizes == [40, 20, 10, 5]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("x"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_what_never_fits_is_one_sentence(error: Exception) -> None:
    def attempt(size: int) -> None:
        raise error

    with pytest.raises(CatsparseError, match="does not fit into memory"):
        while_it_fits(3, attempt)


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def attempt(size: int) -> None:
        calls.append(size)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        while_it_fits(8, attempt)
    assert calls == [8]


def test_standard_error() -> None:
    values = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = np.std(values.numpy(), ddof=1) / np.sqrt(5)
    assert judge.standard_error(values) == pytest.approx(expected)
    assert math.isnan(judge.standard_error(Tensor([1.0])))
