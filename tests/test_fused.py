"""The fused decode step: which models it takes, and that it decodes as ``model.generate`` does.

On a GPU with its kernels and graphs; on a CPU with the kernels' maths in torch.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import catsparse
import kernels_in_torch
from catsparse import decoding
from catsparse.decoding import fused, loop
from catsparse.decoding.fused import FusedStep
from catsparse.decoding.request import Request, resolve
from catsparse.decoding.step import State, prefill
from catsparse.kernels import Backend, Call, Choice
from catsparse.kernels.cuda import AUTO_TOKENS
from catsparse.modules import SparseMLP, sparse_modules
from catsparse.surgery import run_dense
from tiny import SMALL, build, calibrate, llama_config, tokens

SIZES: dict[str, Any] = SMALL | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "initializer_range": 0.1,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "llama": llama_config(**SIZES),
    "llama, tied": llama_config(**SIZES, tie_word_embeddings=True),
    "llama, biases": llama_config(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, sliding": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, sliding by turns": Qwen3Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
}
NEW = 40


GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ],
)


@pytest.fixture(autouse=True, params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        kernels_in_torch.install(monkeypatch)
    fused._WARNED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decode runs the model's own forward")
        yield request.param
    loop._KEPT.clear()


def make(name: str, device: str, sparse: bool = False) -> PreTrainedModel:
    model = build(CONFIGS[name]).to(device)
    return catsparse.sparsify(model, calibrate(model)) if sparse else model


def step_of(model: Any, batch: int = 1) -> FusedStep | str:
    state = State.empty(model.config, batch, 256, model.device)
    state.begin(torch.zeros(batch, dtype=torch.int64))
    with torch.no_grad():
        prefill(model, state, tokens(batch, 20).to(model.device), False, 2048)
    return fused.build(model, state.cache, batch)


def decode(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options |= {"max_new_tokens": NEW, "do_sample": False}
    if ids.is_cuda:
        return decoding.generate(model, ids, **options)
    asked = resolve(model, ids, options)
    assert isinstance(asked, Request)
    return loop.run(asked, capture=False)


def check(model: Any, ids: Tensor, **options: Any) -> None:
    """The same tokens as the model's own loop, from our step."""
    ids = ids.to(model.device)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    found = decode(model, ids, **options)
    assert torch.equal(found, expected)
    assert isinstance(last_step(model), FusedStep)


def last_step(model: Any) -> Any:
    return next(reversed(loop._KEPT[model].workspaces.values())).step


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens(name: str, sparse: bool, device: str) -> None:
    check(make(name, device, sparse), tokens(1, 30))


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama, biases", "qwen3", "phi3"])
@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
def test_packed_weights(weights: str, name: str, batch: int, device: str) -> None:
    model = catsparse.quantize_weights(make(name, device), weights)
    ids = tokens(batch, 30)
    check(model, ids)
    calibration = calibrate(model)
    check(catsparse.sparsify(model, calibration, 0.6), ids)
    catsparse.densify(model)
    if weights != "int4":
        calibration = catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False)
        check(catsparse.sparsify(model, calibration, 0.6, "energy"), ids)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls of the kernel from now on."""
    calls: list[Call] = []
    launch = fused.launch

    def note(call: Call, **options: Any) -> Tensor:
        calls.append(call)
        return launch(call, **options)

    monkeypatch.setattr(fused, "launch", note)
    return calls


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("down", [None, 0.7])
def test_preview_and_second_decision(
    down: float | None, batch: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", device)
    calibration = catsparse.calibrate(
        model, tokens(8, 32, 7), preview=4, products_at=0.5, progress=False
    )
    catsparse.sparsify(model, calibration, 0.5, "energy", down_sparsity=down)
    calls = noted(monkeypatch)
    check(model, tokens(batch, 30))
    module = next(iter(sparse_modules(model).values()))
    assert calls[-1].preview is not None
    assert (calls[-1].product_threshold is None) == (down is None)
    assert module.catsparse_preview is not None


# Above it torch's matmuls read everything anyway.
@pytest.mark.parametrize(
    ("batch", "in_use"), [(1, True), (5, True), (AUTO_TOKENS[torch.float32] + 1, False)]
)
def test_many_sequences_are_decided_by_the_exact_gate(
    batch: int, in_use: bool, device: str
) -> None:
    model = make("llama", device)
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False)
    step = step_of(catsparse.sparsify(model, calibration, 0.5, "energy"), batch)
    assert isinstance(step, FusedStep)
    for of in step._decisions:
        assert (of.preview is not None) == (of.preview_scale is not None) == in_use


@pytest.mark.parametrize("batch", [1, 7, 9])
def test_method_product(batch: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", device)
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False)
    catsparse.sparsify(model, calibration, 0.6)
    assert model.catsparse.config.method == "product"
    calls = noted(monkeypatch)
    check(model, tokens(batch, 30))
    in_use = batch <= AUTO_TOKENS[torch.float32]
    assert all((w.preview is not None) == in_use for w in last_step(model)._decisions)
    assert not calls or calls[-1].previews_products


@pytest.mark.parametrize("device", [pytest.param("cpu")], indirect=True)
@pytest.mark.parametrize("method", ["energy", "product"])
def test_a_preview_that_is_left_out_decides_nowhere(
    method: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt, step and module are decided by the exact weights, and by the same ones."""
    model = make("llama", device)
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), preview=4, progress=False)
    choice = Choice(Backend.CUDA, 8, "stands in for a GPU", "no room for its tiles")
    monkeypatch.setattr(SparseMLP, "choose_backend", lambda *_: choice)
    catsparse.sparsify(model, calibration, 0.6, method)
    calls = noted(monkeypatch)
    check(model, tokens(1, 30))
    assert calls[-1].preview is None
    assert (calls[-1].product_threshold is not None) == (method == "product")
    assert "not in use: no room for its tiles" in catsparse.explain(model)
    for module in sparse_modules(model).values():
        assert module.catsparse_preview is None
    # Not an accident of these weights: by the preview other tokens would come out.
    exact = decode(model, tokens(4, 60, 3))
    monkeypatch.setattr(
        SparseMLP, "choose_backend", lambda *_: replace(choice, without_preview=None)
    )
    for module in sparse_modules(model).values():
        module.refresh()
        assert module.catsparse_preview is not None
    assert not torch.equal(decode(model, tokens(4, 60, 3)), exact)


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("name", ["llama", "llama, biases", "qwen3", "phi3"])
@pytest.mark.parametrize("method", ["energy", "product"])
def test_attention_inputs(name: str, method: str, batch: int, device: str) -> None:
    """Of q, k, v and o in scope all: the same decisions as the layers' own, dense ones too."""
    model = make(name, device)
    with torch.no_grad():
        for layer in model.model.layers:
            for child in layer.self_attn.modules():
                if getattr(child, "bias", None) is not None:
                    child.bias.normal_()
    calibration = catsparse.calibrate(
        model,
        tokens(8, 32, 7),
        preview=4 if method == "product" else None,
        progress=False,
        inputs="attention",
    )
    catsparse.sparsify(model, calibration, 0.5, method, scope="all")
    check(model, tokens(batch, 30))
    assert all(None not in inputs for inputs in last_step(model)._inputs)
    with run_dense(model):
        check(model, tokens(batch, 30))


def test_inputs_that_are_not_shared(device: str) -> None:
    model = make("llama", device)
    calibration = catsparse.calibrate(model, tokens(8, 32, 7), progress=False, inputs="attention")
    catsparse.sparsify(model, calibration, 0.5, scope="all")
    linear = model.model.layers[1].self_attn.k_proj
    linear.set_threshold(linear.catsparse_threshold * 2, None)
    assert "do not share their thresholds" in str(step_of(model))


@pytest.mark.parametrize("batch", [2, 4, 7])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral, sliding"])
def test_padded_batches(name: str, batch: int, device: str) -> None:
    ids = tokens(batch, 20)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids[1, :9] = 0
    check(make(name, device, sparse=True), ids, attention_mask=mask.to(device))


def test_bf16_up_to_ties(device: str) -> None:
    """Where a token differs from the loop's, its logit was within rounding of the best one."""
    model = make("llama", device, sparse=True).bfloat16()
    ids = tokens(1, 30).to(device)
    found = decode(model, ids)
    with torch.no_grad():
        logits = model(found).logits[0, 29:-1].float()
    chosen = logits.gather(1, found[0, 30:, None])[:, 0]
    assert ((logits.max(1).values - chosen) <= 0.05 * logits.abs().max(1).values).all()


def test_thresholds_and_dense_runs_are_followed(device: str) -> None:
    model = make("llama", device, sparse=True)
    ids = tokens(1, 30)
    check(model, ids)
    with run_dense(model):
        check(model, ids)
    for module in sparse_modules(model).values():
        module.set_threshold(module.catsparse_threshold * 2, module.catsparse_mean)
    check(model, ids)
    with torch.no_grad():
        for module in sparse_modules(model).values():
            module.down_proj.weight.mul_(1.5)
    check(model, ids)


@pytest.mark.parametrize("device", [GPU], indirect=True)
def test_another_backend_is_respected(device: str) -> None:
    model = make("llama", device, sparse=True)
    catsparse.set_backend(model, "torch")
    assert "run in torch" in str(step_of(model))
    catsparse.set_backend(model, "auto", down_copy=False)
    assert "copy" in str(step_of(model))


def test_what_is_built_otherwise(device: str) -> None:
    gemma2 = Gemma2Config(**SIZES, sliding_window=7)
    assert "softcap" in str(step_of(build(gemma2).to(device)))
    assert "no RMS norm" in str(step_of(make("llama", device).apply(centre)))
    assert "17 sequences" in str(step_of(make("llama", device), batch=17))
    odd = llama_config(**SIZES | {"head_dim": 48})
    assert "48" in str(step_of(build(odd).to(device)))
    model = make("llama", device)
    model.model.layers[1].extra = torch.nn.Linear(4, 4, device=device)
    assert "extra" in str(step_of(model))


def centre(module: torch.nn.Module) -> None:
    if type(module).__name__ == "LlamaRMSNorm":
        module.forward = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]) * module.weight


def test_the_same_parts_put_together_otherwise(device: str) -> None:
    """Granite scales what it adds: no part tells, the comparison does, and a warning says so."""
    few = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = GraniteConfig(**few, residual_multiplier=0.7)
    model = build(config).to(device)
    with pytest.warns(UserWarning, match="layer 0 computes otherwise"):
        assert "computes otherwise" in str(step_of(model))
    plain = GraniteConfig(**few, attention_multiplier=64**-0.5)
    assert isinstance(step_of(build(plain).to(device)), FusedStep)


def test_gemma_norms(device: str) -> None:
    model = build(GemmaConfig(**SIZES)).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.5, 0.5)
    check(model, tokens(1, 30))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("data", [False, True])
def test_changed_weights_are_followed(sparse: bool, data: bool, device: str) -> None:
    """Ours runs first, so that nothing has looked at the weights since."""
    if sparse and data:
        pytest.skip("a sparse layer follows what the version counter tells")
    model = make("llama", device, sparse)
    ids = tokens(1, 30).to(device)
    before = decode(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            (weight.data if data else weight).mul_(-1.0)
    found = decode(model, ids)
    assert not torch.equal(found, before)
    assert torch.equal(found, model.generate(ids, max_new_tokens=NEW, do_sample=False))
    assert isinstance(last_step(model), FusedStep)


def test_batch_sizes_share_the_copies_of_dense_weights(device: str) -> None:
    model = make("llama", device)
    one, two = step_of(model, 1), step_of(model, 2)
    assert isinstance(one, FusedStep)
    assert isinstance(two, FusedStep)
    for mine, other in zip(one._weights, two._weights, strict=True):
        assert mine.down_t.data_ptr() == other.down_t.data_ptr()
    halves = step_of(model.bfloat16(), 3)
    assert isinstance(halves, FusedStep)
    assert halves._weights[0].down_t.dtype == torch.bfloat16
    del halves
    weights = [layer.mlp.down_proj.weight for layer in model.model.layers]
    model.float()
    three = step_of(model, 3)
    assert all(fused._COPIES[weight]() is not None for weight in weights)
    del one, two, three, mine, other
    gc.collect()
    assert all(fused._COPIES[weight]() is None for weight in weights)


def outsized(model: Any) -> Any:
    """One dimension of every embedding far above the others, in bf16."""
    model = model.bfloat16()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 3] = 3000 * embedding.float().norm(dim=1).mean()
    return model


def test_outsized_activations_do_not_hide_a_difference(device: str) -> None:
    few = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = GraniteConfig(**few | {"initializer_range": 0.05}, residual_multiplier=0.7)
    model = outsized(build(config).to(device))
    with pytest.warns(UserWarning, match="computes otherwise"):
        assert "computes otherwise" in str(step_of(model))


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_outsized_activations_are_no_difference(name: str, device: str) -> None:
    assert isinstance(step_of(outsized(make(name, device))), FusedStep)


def test_results_without_bounds_are_a_difference(device: str) -> None:
    model = make("llama", device)
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    with pytest.warns(UserWarning, match="output layer computes otherwise"):
        assert "output layer" in str(step_of(model))


def test_what_depends_on_the_position_shows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is scaled from some position on, as Ministral3's, far behind the prompt."""
    model = make("llama", device)
    attention = type(model.model.layers[0].self_attn)
    own = attention.forward

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        out, weights = own(self, hidden_states, **kwargs)
        cache = kwargs["past_key_values"]
        return out * torch.where(cache.cursor.position > 200, 1.3, 1.0), weights

    monkeypatch.setattr(attention, "forward", forward)
    with pytest.warns(UserWarning, match="layer 0 computes otherwise"):
        assert "layer 0" in str(step_of(model))


def test_the_check_leaves_the_cache_as_it_was(device: str) -> None:
    model = make("llama", device)
    state = State.empty(model.config, 1, 256, model.device)
    state.begin(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        prefill(model, state, tokens(1, 20).to(model.device), False, 2048)
    before = [layer.keys[:, :, :20].clone() for layer in state.cache.layers]
    assert isinstance(fused.build(model, state.cache, 1), FusedStep)
    assert int(state.position) == 20
    for layer, keys in zip(state.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :20], keys)
        assert not layer.keys[:, :, 20:].any()
        assert not layer.values[:, :, 20:].any()


def test_parts_that_do_not_fit(device: str) -> None:
    model = make("llama", device)
    state = State.empty(model.config, 1, 64, model.device)
    state.begin(torch.zeros(1, dtype=torch.int64))
    with torch.no_grad():
        prefill(model, state, tokens(1, 20).to(model.device), False, 2048)
    attention = model.model.layers[0].self_attn
    size, attention.head_dim = attention.head_dim, "many"
    with pytest.warns(UserWarning, match="do not fit"):
        assert "ValueError" in str(fused.build(model, state.cache, 1))
    attention.head_dim = size
    model.model.norm.to(torch.bfloat16)
    assert "weights of torch.bfloat16" in str(fused.build(model, state.cache, 1))
    del model.model.layers[1]
    assert "1 layers" in str(fused.build(model, state.cache, 1))


def test_the_reason_is_kept(device: str) -> None:
    model = make("llama", device)
    ids = tokens(1, 5).to(device)
    assert decoding.why_not_fused(model) is None
    assert decoding.last_step(model) is None
    model.model.layers[1].extra = torch.nn.Linear(4, 4, device=device).eval()
    decode(model, ids)
    assert "extra" in str(decoding.why_not_fused(model))
    assert "the model's own forward in one CUDA graph (it has a" in str(decoding.last_step(model))
    del model.model.layers[1].extra
    decode(model, ids)
    assert decoding.why_not_fused(model) is None
    assert decoding.last_step(model) == "our kernels in one CUDA graph"


def test_no_copy_is_made_where_none_is_allowed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama", device, sparse=True)
    choice = Choice(Backend.TORCH, 0, "the copy is not allowed")
    monkeypatch.setattr(SparseMLP, "choose_backend", lambda *_: choice)
    for module in sparse_modules(model).values():
        module.catsparse_down_copy = False
    with run_dense(model):
        assert "not allowed" in str(step_of(model))
