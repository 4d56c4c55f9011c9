"""Captured decode on a GPU against ``model.generate``; run there with ``pytest -m gpu``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import decoding, hub
from catsparse.decoding import loop
from catsparse.decoding.step import CompiledStep, ModelStep
from catsparse.modules import sparse_modules
from test_decoding import CONFIGS, Recorder, padded
from tiny import build, calibrate, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NEW = 40


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Also: a step that cannot be captured, or a call that is passed on, fails the test."""
    decoding._WARNED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a step of this model cannot be captured")
        warnings.filterwarnings("error", message=r"model\.generate runs this call")
        yield
    loop._KEPT.clear()


@pytest.fixture
def dense() -> Any:
    model = hub.load_dense_model("default", dtype=torch.float32).cuda()
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = False
    return model


@pytest.fixture
def sparse(dense: Any) -> Any:
    return catsparse.sparsify(dense, calibrate(dense), sparsity=0.5)


def check(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Both ways from the same seed; they must agree, and leave the same random numbers."""
    ids = ids.cuda()
    torch.manual_seed(11)
    expected = model.generate(ids, **kwargs)
    after = torch.rand(4, device="cuda")
    torch.manual_seed(11)
    found = decoding.generate(model, ids, **kwargs)
    assert torch.equal(after, torch.rand(4, device="cuda"))
    assert found.device == ids.device
    assert torch.equal(found, expected)
    return found


def kept(model: Any) -> list[loop.Workspace]:
    return list(loop._KEPT[model].workspaces.values())


def captures(model: Any) -> int:
    return sum(one.graphs.captures for one in kept(model))


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy(dense: Any, rows: int) -> None:
    ids = tokens(rows, 30)
    check(dense, ids, max_new_tokens=NEW)
    assert captures(dense) == 1
    check(dense, ids, attention_mask=padded(ids, *range(0, 9 * rows, 9)).cuda(), max_new_tokens=NEW)


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_sparse(sparse: Any, rows: int) -> None:
    check(sparse, tokens(rows, 30), max_new_tokens=NEW)
    assert captures(sparse) == 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str) -> None:
    model = build(CONFIGS[name]).cuda()
    ids = tokens(2, 9)
    check(model, ids, max_new_tokens=NEW)
    check(model, ids, attention_mask=padded(ids, 0, 4).cuda(), max_new_tokens=NEW)
    assert captures(model) == 1


def test_windows(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FACTORIES", (ModelStep.try_build,))
    check(dense, tokens(1, 240), max_new_tokens=NEW)
    assert captures(dense) == 2
    check(dense, tokens(1, 500, seed=2), max_new_tokens=NEW)
    check(dense, tokens(1, 240), max_new_tokens=NEW)


def test_graphs_are_reused(dense: Any) -> None:
    for seed, length in ((1, 30), (2, 30), (3, 90), (4, 7)):
        check(dense, tokens(1, length, seed), max_new_tokens=NEW)
        assert captures(dense) == 1
    (one,) = kept(dense)
    assert len(one.graphs) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.3},
        {"num_return_sequences": 3},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_sampling(dense: Any, options: dict[str, Any]) -> None:
    for seed in (1, 2):
        check(dense, tokens(1, 30, seed), do_sample=True, max_new_tokens=NEW, **options)
    assert captures(dense) == 1


def test_sampling_that_ends_early(dense: Any) -> None:
    ids = tokens(1, 30)
    drawn = check(dense, ids, do_sample=True, max_new_tokens=NEW)
    eos = drawn[0, 40:45].tolist()
    found = check(dense, ids, do_sample=True, max_new_tokens=NEW, eos_token_id=eos)
    assert found.shape[1] < 30 + NEW


def test_eos_and_the_least_length(dense: Any) -> None:
    ids = tokens(3, 30)
    new = check(dense, ids, max_new_tokens=NEW)[:, 30:]
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": new[:, 10].tolist()}
    check(dense, ids, **options)
    check(dense, ids, min_new_tokens=20, **options)


def test_stop_strings(dense: Any) -> None:
    tokenizer = hub.load_tokenizer("default")
    ids = tokenizer("The captain looked", return_tensors="pt").input_ids
    text = tokenizer.decode(check(dense, ids, max_new_tokens=NEW)[0, ids.shape[1] :])
    stop = text[len(text) // 2 :][:6]
    options = {"max_new_tokens": NEW, "stop_strings": [stop], "tokenizer": tokenizer}
    assert check(dense, ids, **options).shape[1] < ids.shape[1] + NEW
    theirs, ours = Recorder(), Recorder()
    dense.generate(ids.cuda(), streamer=theirs, **options)
    decoding.generate(dense, ids.cuda(), streamer=ours, **options)
    assert ours.calls == theirs.calls


def test_a_changed_model(sparse: Any) -> None:
    ids = tokens(1, 30)
    check(sparse, ids, max_new_tokens=NEW)
    for module in sparse_modules(sparse).values():
        module.set_threshold(module.catsparse_threshold * 2, module.catsparse_mean)
    check(sparse, ids, max_new_tokens=NEW)
    with torch.no_grad():
        next(iter(sparse_modules(sparse).values())).down_proj.weight.mul_(-1)
    check(sparse, ids, max_new_tokens=NEW)
    catsparse.densify(sparse)
    check(sparse, ids, max_new_tokens=NEW)
    assert captures(sparse) == 4


def test_memory(dense: Any) -> None:
    check(dense, tokens(1, 30), max_new_tokens=NEW)
    (one,) = kept(dense)
    assert one.graphs.nbytes > 0
    assert decoding.memory_bytes(dense) == one.nbytes > one.state.nbytes + one.graphs.nbytes
    before = torch.cuda.memory_allocated()
    del one
    decoding.forget(dense)
    assert decoding.memory_bytes(dense) == 0
    assert torch.cuda.memory_allocated() < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_captured_and_not(dtype: torch.dtype) -> None:
    model = hub.load_dense_model("default", dtype=dtype).cuda()
    catsparse.sparsify(model, calibrate(model), sparsity=0.5)
    ids = tokens(1, 30).cuda()
    asked = decoding.resolve(model, ids, {"max_new_tokens": NEW, "do_sample": False})
    assert not isinstance(asked, str)
    eager = loop.run(asked, capture=False)
    for _ in range(2):
        assert torch.equal(loop.run(asked), eager)


def test_inference_mode_and_after(dense: Any) -> None:
    ids = tokens(1, 30)
    with torch.inference_mode():
        check(dense, ids, max_new_tokens=NEW)
    check(dense, ids, max_new_tokens=NEW)


def test_a_prompt_on_the_host_is_moved(dense: Any) -> None:
    ids = tokens(1, 30)
    expected = dense.generate(ids.cuda(), max_new_tokens=NEW)
    assert torch.equal(decoding.generate(dense, ids, max_new_tokens=NEW), expected)


def test_the_compiled_step(sparse: Any) -> None:
    ids = tokens(1, 30).cuda()
    expected = sparse.generate(ids, max_new_tokens=NEW)
    for _ in range(2):
        found = decoding.generate(sparse, ids, step="compile", max_new_tokens=NEW)
        assert torch.equal(found, expected)
    assert captures(sparse) == 1
    (workspace,) = kept(sparse)
    assert isinstance(workspace.step, CompiledStep)
