"""Models with packed weights: the layer, the verb, sparse decode, and what is saved of them."""

from __future__ import annotations

import copy
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
from catsparse import CatsparseError
from catsparse.config import WEIGHTS
from catsparse.footprint import PACKED_BYTES
from catsparse.kernels import FORMATS, quantize, stream
from catsparse.modules import sparse_modules
from catsparse.quantized import quantize_weights
from catsparse.quantized_linear import QuantizedLinear, weights_of_model
from command import run

WIDE = tiny.SMALL | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}


def make(fused: bool = False, seed: int = 0, **changes: Any) -> Any:
    config = Phi3Config if fused else tiny.llama_config
    sizes = {k: v for k, v in WIDE.items() if not (fused and k == "head_dim")}
    return tiny.build(config(**(sizes | changes)), seed)


def exact(layer: QuantizedLinear) -> Tensor:
    """``[out, in]`` in fp64, by the format's definition."""
    weight = unpacked(layer.weight.detach(), layer.weight_scale)
    return weight.T if layer.by_input else weight


# The layer


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_the_layer_multiplies_by_what_it_holds(weights: str, bias: bool, by_input: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=bias)
    layer = QuantizedLinear.of(linear, weights, by_input)
    assert (layer.in_features, layer.out_features, layer.weights) == (128, 64, weights)
    assert f"weights={weights}" in repr(layer)
    added = 0 if linear.bias is None else linear.bias.double()
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, 128)
        truth = x.double() @ exact(layer).T + added
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(layer(x).double(), truth, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.dequantized(torch.float32).double(), exact(layer), rtol=1e-6)
    assert torch.allclose(exact(layer), linear.weight.double(), atol=0.02)


@pytest.mark.parametrize("weights", FORMATS)
def test_moving_and_casting_change_no_packed_bit(weights: str) -> None:
    layer = QuantizedLinear.of(nn.Linear(64, 64, bias=True), weights)
    kept = layer.weight.detach().clone(), layer.weight_scale.clone()
    for moved in (layer.to(torch.bfloat16), layer.half(), copy.deepcopy(layer).double()):
        assert torch.equal(moved.weight.view(torch.uint8), kept[0].view(torch.uint8))
        assert torch.equal(moved.weight_scale, kept[1])
        assert moved.weight_scale.dtype == kept[1].dtype
        assert moved.bias is not None
        assert moved.bias.dtype == moved.compute_dtype
    assert layer.compute_dtype == torch.float16
    assert layer(torch.randn(2, 64).half()).dtype == torch.float16


@pytest.mark.parametrize("weights", FORMATS)
def test_an_empty_layer_takes_a_state_dict(weights: str) -> None:
    layer = QuantizedLinear.of(nn.Linear(64, 128, bias=True), weights, by_input=True)
    other = QuantizedLinear(64, 128, weights, by_input=True, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), other(x))


def test_gradients_reach_the_input() -> None:
    layer = QuantizedLinear.of(nn.Linear(64, 64, bias=False), "int8")
    x = torch.randn(1, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), exact(layer).sum(0), atol=1e-4)
    assert not layer.weight.requires_grad


# The verb


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_layer_that_decode_reads_is_packed(weights: str, fused: bool, tied: bool) -> None:
    model = make(fused, tie_word_embeddings=tied)
    dense = tiny.logits(model)
    embedding = model.get_input_embeddings().weight.clone()
    assert weights_of_model(model) is None
    assert quantize_weights(model, weights) is model
    left = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert left == []
    downs = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.by_input}
    assert downs == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert weights_of_model(model) == weights
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert model.dtype == torch.float32
    error = float((tiny.logits(model) - dense).norm() / dense.norm())
    assert 0 < error < {"int8": 0.1, "fp8": 0.3, "int4": 0.6}[weights]


def test_what_cannot_be_packed_is_refused_and_untouched() -> None:
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for weights, said in (("int3", "int8, fp8, int4"), ("nf4", "weights")):
        with pytest.raises(CatsparseError, match=said):
            quantize_weights(model, weights)
    odd = make(hidden_size=48, head_dim=12)
    with pytest.raises(CatsparseError, match=r"rows of 48 .* groups of 64"):
        quantize_weights(odd, "int4")
    assert weights_of_model(odd) is None
    sparse = catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    with pytest.raises(CatsparseError, match="sparse already"):
        quantize_weights(sparse, "int8")
    catsparse.densify(sparse)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quantize_weights(model, "int8")
    with pytest.raises(CatsparseError, match=r"cannot be packed in fp8: .*QuantizedLinear"):
        quantize_weights(model, "fp8")


def test_adapters_are_not_packed_beneath() -> None:
    peft = pytest.importorskip("peft")
    model = make()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))
    before = copy.deepcopy(model.state_dict())
    for one in (wrapped, model):
        with pytest.raises(CatsparseError, match="PEFT adapters; pack it before"):
            quantize_weights(one, "int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_formats_are_the_same_everywhere() -> None:
    """By their names; one that is missing somewhere would fail only when it is first met there."""
    names = set(FORMATS)
    assert names == set(WEIGHTS) == set(PACKED_BYTES)
    assert names == {name for name in stream._WEIGHT_NUMBERS if name is not None}
    torch.manual_seed(0)
    for name in names:
        weight, scale = quantize(torch.randn(64, 1024), name)
        stored = weight.nbytes + scale.nbytes * (name == "int4")  # a row's one scale is not counted
        assert stored == PACKED_BYTES[name] * 64 * 1024


def test_thresholds_of_other_weights_are_refused() -> None:
    dense, packed = make(), quantize_weights(make(), "int8")
    of_dense, of_packed = tiny.calibrate(dense), tiny.calibrate(packed)
    assert of_packed.provenance.weights == "int8"
    with pytest.raises(CatsparseError, match="those of floats, the model holds int8"):
        catsparse.sparsify(packed, of_dense, 0.5)
    with pytest.raises(CatsparseError, match=r"quantize_weights\(model, 'int8'\)"):
        catsparse.sparsify(dense, of_packed, 0.5)
    four = quantize_weights(make(), "int4")
    calibration = catsparse.calibrate(four, tiny.tokens(8, 32), preview=4, progress=False)
    with pytest.raises(CatsparseError, match="own preview"):
        catsparse.sparsify(four, calibration, 0.5)
    with pytest.raises(CatsparseError, match="scope mlp"):
        catsparse.calibrate(packed, tiny.tokens(8, 32), inputs="all", progress=False)


# Sparse


SETTINGS: dict[str, dict[str, Any]] = {
    "gate": {},
    "cats": {"method": "cats", "compensate": False},
    "preview": {"preview": 4, "method": "energy"},
    "product": {"preview": 8},
    "second": {"down_sparsity": 0.7},
}


def sparse(weights: str, setting: str, fused: bool = False) -> Any:
    options = dict(SETTINGS[setting])
    model = quantize_weights(make(fused), weights)
    preview, down = options.pop("preview", None), options.get("down_sparsity")
    calibration = catsparse.calibrate(
        *(model, tiny.tokens(8, 32, 7)),
        preview=preview,
        products_at=None if down is None else 0.5,
        progress=False,
    )
    return catsparse.sparsify(model, calibration, 0.5, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("weights", FORMATS)
def test_few_tokens_are_masked_as_many_are(weights: str, setting: str, fused: bool) -> None:
    if weights == "int4" and "preview" in SETTINGS[setting]:
        pytest.skip("int4 weights are their own preview")
    model = sparse(weights, setting, fused)
    assert model.catsparse.config.weight_format == weights
    for module in sparse_modules(model).values():
        assert module.why_not_raw() is None
        x = torch.randn(40, 64)
        with torch.no_grad():
            many = module(x)
            few = torch.cat([module(part) for part in x.split(8)])
        assert tiny.close(few, many)
        module.catsparse_enabled = False
        with torch.no_grad():
            assert not tiny.close(module(x), many, 1e-2)  # the mask does something
        module.catsparse_enabled = True
    assert "packed weights" in str(catsparse.explain(model))


def test_nothing_is_copied_for_decode() -> None:
    model = sparse("int8", "gate")
    for module in sparse_modules(model).values():
        with torch.no_grad():
            module(torch.randn(1, 64))
        assert module.down_transposed() is module.down_proj.weight
        assert module._catsparse_down_t is None


@pytest.mark.parametrize("weights", FORMATS)
def test_generation_is_that_of_the_same_weights_in_floats(weights: str) -> None:
    model = sparse(weights, "gate")
    floats = make()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            with torch.no_grad():
                floats.get_submodule(name).weight.copy_(layer.dequantized(torch.float32))
    catsparse.sparsify(floats, tiny.calibrate(floats), 0.5)
    ids = tiny.tokens(1, 12)
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), floats.generate(ids, **options))
    assert torch.equal(catsparse.generate(model, ids, **options), floats.generate(ids, **options))


def test_bytes_are_counted_in_the_format() -> None:
    assert sparse("int8", "gate").catsparse.config.bytes_skipped == pytest.approx(1 / 3, abs=0.01)
    config = sparse("int8", "preview").catsparse.config
    site = config.sites["model.layers.0.mlp"]
    preview = (64 / 2 + 16) / 64  # a row and its scales, of 64 int8 weights
    assert config.bytes_skipped == pytest.approx((3 * 0.5 - preview) / 3, abs=0.01)
    assert site.hidden_size == 64


# Saved


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_base(tmp_path / "base", tiny.llama_config(**WIDE))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_saved_and_loaded(weights: str, merge: bool, tied: bool, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        config = tiny.llama_config(**WIDE, tie_word_embeddings=tied)
        folder = tmp_path / str(dtype)
        tiny.build(config).to(dtype).save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).eval()
        quantize_weights(model, weights)
        catsparse.sparsify(model, tiny.calibrate(model), 0.5)
        catsparse.save(model, folder / "sparse", merge=merge)
        loaded = catsparse.load(folder / "sparse", dtype=dtype)
        assert weights_of_model(loaded) == weights
        assert loaded.dtype == dtype
        for (name, one), other in zip(
            model.state_dict().items(), loaded.state_dict().values(), strict=True
        ):
            assert one.dtype == other.dtype, name
            assert torch.equal(one.float(), other.float()), name
        assert torch.equal(tiny.logits(model), tiny.logits(loaded))
        assert torch.equal(tiny.logits(model, tiny.SHORT), tiny.logits(loaded, tiny.SHORT))
        if merge:
            again = AutoModelForCausalLM.from_pretrained(folder / "sparse", dtype=dtype).eval()
            assert torch.equal(tiny.logits(model), tiny.logits(again))
        catsparse.densify(loaded)
        assert weights_of_model(loaded) == weights


def test_an_adapter_trains_on_packed_weights_and_is_not_merged(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    quantize_weights(model, "int8")
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped(input_ids=tiny.tokens(1, 8), labels=tiny.tokens(1, 8)).loss.backward()
    trained = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    assert trained
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    catsparse.save(wrapped, tmp_path / "tuned")
    loaded = catsparse.load(tmp_path / "tuned")
    assert tiny.close(tiny.logits(loaded), tiny.logits(wrapped.eval()))
    with pytest.raises(CatsparseError, match="merged into packed weights"):
        catsparse.load(tmp_path / "tuned", merge_adapter=True)


# The command line


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("weights", FORMATS)
def test_the_command_packs_calibrates_and_reads_it_again(
    weights: str, merge: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    more = ["--merge"] if merge else []
    code, told, _ = run(
        *(capsys, "sparsify", "default", "-o", folder, "--weights", weights, "--json"),
        *("--tokens", 2000, *more),
    )
    assert code == 0
    assert json.loads(told)["weights"] == weights
    assert weights_of_model(catsparse.load(folder)) == weights
    code, told, _ = run(capsys, "generate", folder, "--prompt", "The river", "--tokens", 4)
    assert code == 0
    assert told.strip()
    code, told, _ = run(capsys, "info", folder)
    assert code == 0
    assert f"{weights} weights" in " ".join(told.split())
    # Another sparsity of the same calibration.
    code, told, _ = run(
        capsys, "sparsify", folder, "-o", tmp_path / "two", "--sparsity", 0.7, "--json"
    )
    assert json.loads(told)["weights"] == weights
    code, _, said = run(capsys, "sparsify", folder, "-o", tmp_path / "three", "--weights", "int8")
    assert code == 2
    assert "brings its own calibration" in said


def test_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--weights", "int3"], "int8, fp8, int4"),
        (["--weights", "int4", "--preview", "4"], "their own preview"),
        (["--weights", "int8", "--scope", "all"], "scope mlp"),
    ):
        code, _, said = run(capsys, "sparsify", "default", "-o", tmp_path / "x", *options)
        assert code == 2
        assert words in " ".join(said.split())
        assert not (tmp_path / "x" / "catsparse.json").exists()
