"""Checkpoints that another library quantized: masked as they are, repacked, or rounded again."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config, Qwen2Config

import catsparse
import tiny
from catsparse import CatsparseError, checkpoints, hub
from catsparse.checkpoints import floats_of, own_codes, quantized_by
from catsparse.decoding import structure
from catsparse.kernels.preview import dequantize, pack_int4
from catsparse.modules import sparse_modules
from catsparse.quantized import quantize_weights
from catsparse.quantized_linear import QuantizedLinear, weights_of_model
from command import run

# The words are those of the bundled tokenizer.
SIZES = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "vocab_size": 4096}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = INT8 | {"type": "float"}
GROUPS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
TOKEN = {"strategy": "token", "dynamic": True}
STATIC = {"strategy": "tensor", "dynamic": False}

# Name: library, how; what ``own`` gives, None where it refuses.
KINDS: dict[str, tuple[str, Any, str | None]] = {
    "torchao-int8": ("torchao", "Int8WeightOnlyConfig", "own-int8"),
    "torchao-int8-dynamic": ("torchao", "Int8DynamicActivationInt8WeightConfig", "own-int8"),
    "torchao-fp8": ("torchao", "Float8WeightOnlyConfig", "own-fp8"),
    "w8a16": ("compressed_tensors", ("pack-quantized", INT8, None), "own-int8"),
    "w8a8": ("compressed_tensors", ("int-quantized", INT8, INT8 | TOKEN), "own-int8"),
    "w8a8-static": ("compressed_tensors", ("int-quantized", INT8, INT8 | STATIC), None),
    "w8-asymmetric": (
        "compressed_tensors",
        ("int-quantized", INT8 | {"symmetric": False}, INT8 | TOKEN),
        None,
    ),
    "fp8-dynamic": ("compressed_tensors", ("float-quantized", FP8, FP8 | TOKEN), "own-fp8"),
    "fp8-static": ("compressed_tensors", ("float-quantized", FP8, FP8 | STATIC), None),
    "w4a16": ("compressed_tensors", ("pack-quantized", GROUPS, None), "own-int4"),
    "w4a16-32": (
        "compressed_tensors",
        ("pack-quantized", GROUPS | {"group_size": 32}, None),
        None,
    ),
    "bnb8": ("bitsandbytes", {"load_in_8bit": True}, None),
    "bnb4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
}
OWN = [kind for kind, (_, _, own) in KINDS.items() if own is not None]
WHOLE = [kind for kind in OWN if kind != "w4a16"]  # the MLPs, too
LEFT = [kind for kind in KINDS if kind not in OWN]


def _round(linear: Any, weights: dict[str, Any]) -> None:
    """Give a layer scales and zero points, by hand; the library makes codes of them."""
    w = linear.weight.detach().float()
    groups = w.view(w.shape[0], -1, weights.get("group_size") or w.shape[1])
    least, most = groups.amin(-1), groups.amax(-1)
    bits = weights["num_bits"]
    if weights["symmetric"]:
        top = 448 if weights["type"] == "float" else 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1) / top
    else:
        scale = (most - least) / (2**bits - 1)
        zero = (-(2 ** (bits - 1)) - least / scale).round().clamp(-128, 127)
        linear.weight_zero_point.data.copy_(zero)
    linear.weight_scale.data.copy_(scale)
    if hasattr(linear, "input_scale"):
        linear.input_scale.data.fill_(0.05)


def _compressed(base: Path, folder: Path, how: tuple[str, dict[str, Any], Any]) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    name, weights, inputs = how
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(
        config_groups={"all": group | {"format": name}}, ignore=["lm_head"], format=name
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            _round(module, weights)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=name)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a quantized checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    base = root / "base"
    config = tiny.llama_config(**SIZES)
    tiny.build(config).to(torch.bfloat16).save_pretrained(base)

    def folder(kind: str) -> Path:
        library, how, _ = KINDS[kind]
        pytest.importorskip(library)
        target = root / kind
        if target.exists():
            return target
        if library == "compressed_tensors":
            _compressed(base, target, how)
            return target
        if library == "torchao":
            from torchao import quantization
            from transformers import TorchAoConfig

            quantizer = TorchAoConfig(getattr(quantization, how)())
        else:
            from transformers import BitsAndBytesConfig

            quantizer = BitsAndBytesConfig(**how)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=quantizer
        )
        model.save_pretrained(target)
        return target

    return folder


def load(folder: Path) -> Any:
    return hub.load_dense_model(str(folder), dtype=torch.bfloat16)


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if quantized_by(m) is not None}


# Masked


@pytest.mark.parametrize("kind", KINDS)
def test_masked_children_are_called_and_it_is_said(
    kind: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    model, dense = load(make(kind)), load(make(kind))
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    told = catsparse.explain(model)
    library = KINDS[kind][0].replace("_", "-")
    assert told.count(f"masked children (gate_proj is quantized by {library} ") == 2
    for module in sparse_modules(model).values():
        assert module.raw_weights(torch.bfloat16) is None
        assert module.weight_bytes in (1, 2)
    for length in (1, tiny.SHORT, tiny.LONG):
        truth = tiny.masked_by_hand_in_place(model, dense, length)
        assert tiny.close(tiny.logits(model, length), truth, 0.02)
    assert not torch.equal(tiny.logits(model), tiny.logits(dense))
    catsparse.save(model, tmp_path / "sparse")
    again = catsparse.load(tmp_path / "sparse", dtype=torch.bfloat16)
    assert weights_of_model(again) is None
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    with pytest.raises(CatsparseError, match="cannot be merged"):
        catsparse.save(model, tmp_path / "merged", merge=True)
    assert torch.equal(tiny.logits(catsparse.densify(model)), tiny.logits(dense))


@pytest.mark.parametrize("kind", ["w8a8", "fp8-dynamic", "w4a16"])
def test_packed_codes_are_never_read_as_floats(kind: str, make: Callable[[str], Path]) -> None:
    """Before the first forward the layers hold codes, in plain nn.Linear modules."""
    other = load(make("torchao-int8"))
    calibration = tiny.calibrate(other)
    model = load(make(kind))
    catsparse.sparsify(model, calibration, 0.5)
    assert catsparse.explain(model).count("quantized by compressed-tensors") == 2
    one = tiny.logits(model, 1)
    assert torch.equal(one, tiny.logits(model, 1))
    assert one.isfinite().all()


# Repacked


@pytest.mark.parametrize("kind", OWN)
def test_own_codes_are_the_library_s_weights_bit_for_bit(
    kind: str, make: Callable[[str], Path]
) -> None:
    model, dense = load(make(kind)), load(make(kind))
    before = linears(dense)
    assert quantize_weights(model) is model
    assert weights_of_model(model) == KINDS[kind][2]
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    left = {n for n in before if ".mlp." in n} if kind == "w4a16" else set()
    assert packed == set(before) - left
    assert set(linears(model)) == left
    for name in packed:
        layer = model.get_submodule(name)
        theirs = floats_of(before[name])
        assert torch.equal(layer.dequantized(torch.bfloat16), theirs), name
        assert layer.by_input is name.endswith("down_proj")
        assert (layer.output_scale is not None) is layer.by_input
    tiny.logits(dense)  # compressed-tensors unpacks at the first forward: to the same floats
    for name in packed:
        after = dense.get_submodule(name)
        weight = after.weight.dequantize() if "torchao" in kind else after.weight
        assert torch.equal(model.get_submodule(name).dequantized(torch.bfloat16), weight), name
    rounds_inputs = kind == "w8a8" or "dynamic" in kind
    theirs = tiny.logits(dense).float()
    error = (tiny.logits(model).float() - theirs).norm() / theirs.norm()
    assert error < (0.2 if rounds_inputs else 0.04)


@pytest.mark.parametrize("kind", WHOLE)
def test_repacked_models_decode_by_rows(
    kind: str, make: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantize_weights(load(make(kind)))
    calibration = tiny.calibrate(model)
    assert calibration.provenance.weights == KINDS[kind][2]
    catsparse.sparsify(model, calibration, 0.5)
    assert "masked children" not in catsparse.explain(model)
    for module in sparse_modules(model).values():
        assert module.why_not_raw() is None
        gate, up, down = (
            getattr(module, n).dequantized(torch.float32).double()
            for n in ("gate_proj", "up_proj", "down_proj")
        )
        x = torch.randn(12, 128).bfloat16()
        with torch.no_grad():
            few, many = torch.cat([module(part) for part in x.split(1)]), module(x)
        g = nn.functional.silu(x.double() @ gate.T)
        kept = g.abs() > module.catsparse_threshold
        h = torch.where(kept, g * (x.double() @ up.T), module.catsparse_mean.double())
        truth = h @ down.T
        near = (g.abs() - module.catsparse_threshold).abs() < 0.02 * module.catsparse_threshold
        slack = (near * (g * (x.double() @ up.T) - module.catsparse_mean).abs()) @ down.T.abs()
        bound = slack + 0.02 * truth.abs().max()
        assert ((few - truth).abs() <= bound).all()
        assert ((many - truth).abs() <= bound).all()
    catsparse.save(model, tmp_path / "sparse")
    again = catsparse.load(tmp_path / "sparse", dtype=torch.bfloat16)
    assert weights_of_model(again) == KINDS[kind][2]
    for length in (tiny.SHORT, tiny.LONG):
        assert torch.equal(tiny.logits(again, length), tiny.logits(model, length))
    with pytest.raises(CatsparseError, match="cannot be merged"):
        catsparse.save(model, tmp_path / "merged", merge=True)
    plain = load(make(kind))
    with pytest.raises(CatsparseError, match=r"quantize_weights\(model\)"):
        catsparse.sparsify(plain, calibration, 0.5)


@pytest.mark.parametrize("family", [Phi3Config, Qwen2Config])  # fused rows; biases
def test_other_families_are_repacked_in_memory(family: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    sizes = {k: v for k, v in (tiny.SMALL | SIZES).items() if k != "head_dim"}
    model = tiny.build(family(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    masked = tiny.logits(model)
    calibration = tiny.calibrate(model)
    sparse = catsparse.sparsify(model, calibration, 0.5)
    truth = [tiny.logits(sparse, n) for n in (tiny.SHORT, tiny.LONG)]
    catsparse.densify(sparse)
    quantize_weights(model)
    assert tiny.close(tiny.logits(model), masked, 1e-3)
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    assert "masked children" not in catsparse.explain(model)
    for length, other in zip((tiny.SHORT, tiny.LONG), truth, strict=True):
        assert tiny.close(tiny.logits(model, length), other, 0.02)


def test_int4_mlps_stay_masked_and_attention_is_packed(
    make: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantize_weights(load(make("w4a16")))
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    told = catsparse.explain(model)
    assert told.count("gate_proj is quantized by compressed-tensors pack-quantized") == 2
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    catsparse.save(model, tmp_path / "sparse")
    again = catsparse.load(tmp_path / "sparse", dtype=torch.bfloat16)
    assert torch.equal(tiny.logits(again), tiny.logits(model))


REASONS = {
    "w8a8-static": "static scale of activations",
    "w8-asymmetric": "zero points",
    "fp8-static": "static scale of activations",
    "w4a16-32": "groups of 32",
    "bnb8": "bitsandbytes Linear8bitLt",
    "bnb4": "bitsandbytes Linear4bit",
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_has_no_rows_of_its_own_is_refused_and_untouched(
    kind: str, make: Callable[[str], Path]
) -> None:
    model, other = load(make(kind)), load(make(kind))
    with pytest.raises(CatsparseError, match=REASONS[kind]):
        quantize_weights(model)
    assert set(linears(model)) == set(linears(other))
    assert torch.equal(tiny.logits(model), tiny.logits(other))


def test_an_unpacked_model_is_to_be_loaded_again(make: Callable[[str], Path]) -> None:
    model = load(make("w8a8"))
    tiny.logits(model)
    with pytest.raises(CatsparseError, match="load the model again"):
        quantize_weights(model)


def test_one_layer_of_floats_leaves_its_mlp_and_the_rest_is_packed(
    make: Callable[[str], Path],
) -> None:
    model, dense = load(make("w8a8")), load(make("w8a8"))
    for one in (model, dense):
        first = one.model.layers[0].mlp
        plain = nn.Linear(128, 384, bias=False, dtype=torch.bfloat16)
        plain.weight = nn.Parameter(floats_of(first.up_proj))
        first.up_proj = plain
    quantize_weights(model)
    mlps = [[type(m).__name__ for m in x.mlp.children()][:3] for x in model.model.layers]
    assert mlps == [["Linear"] * 3, ["QuantizedLinear"] * 3]
    calibration = tiny.calibrate(model)
    catsparse.sparsify(model, calibration, 0.0)
    told = catsparse.explain(model).splitlines()
    assert "masked children (gate_proj is quantized by compressed-tensors" in told[0]
    assert "masked children" not in told[1]
    theirs = tiny.logits(dense).float()
    assert (tiny.logits(model).float() - theirs).norm() / theirs.norm() < 0.2


def test_codes_of_several_formats_are_refused(make: Callable[[str], Path]) -> None:
    model, other = load(make("torchao-int8")), load(make("torchao-fp8"))
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(CatsparseError, match=r"several formats \(fp8, int8\)"):
        quantize_weights(model)
    assert weights_of_model(model) is None


@pytest.mark.parametrize("kind", ["torchao-int8", "w8a8", "bnb4"])
def test_what_needs_the_weights_is_refused_in_words(kind: str, make: Callable[[str], Path]) -> None:
    for options in ({"preview": 4}, {"inputs": "all"}):
        model = load(make(kind))
        with pytest.raises(CatsparseError, match=r"gate_proj is quantized by|q_proj is quantized"):
            catsparse.calibrate(model, tiny.tokens(8, 32), progress=False, **options)


@pytest.mark.parametrize("kind", ["torchao-int8", "w8a8", "w8a16", "bnb8"])
@pytest.mark.parametrize("own", [False, True])
def test_the_fused_step_never_reads_codes_as_floats(
    kind: str, own: bool, make: Callable[[str], Path]
) -> None:
    model = load(make(kind))
    said = "is quantized by"
    if own and KINDS[kind][2] is not None:
        quantize_weights(model)
        said = "checkpoint's scales by output"
    layer = model.model.layers[0]
    with pytest.raises(structure.NotPlain, match=said):
        structure._matrix(layer.mlp.down_proj, "down_proj", by_input=True)
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    with pytest.raises(structure.NotPlain, match=said):
        structure._mlp(layer, torch.bfloat16)
    ids, options = tiny.tokens(1, 12), {"max_new_tokens": 8, "do_sample": False}
    ours = catsparse.generate(model, ids, **options)
    assert torch.equal(ours, model.generate(ids, **options))


@pytest.mark.parametrize("kind", ["torchao-int8", None])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_adapters_are_added_after_packing(
    weights: str | None, kind: str | None, make: Callable[[str], Path]
) -> None:
    """Else they would be packed as if they were layers of the model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj", "q_proj"], init_lora_weights=False)
    model = tiny.build(tiny.llama_config(**SIZES)) if kind is None else load(make(kind))
    wrapped = peft.get_peft_model(model, config)
    before = tiny.logits(wrapped)
    with pytest.raises(CatsparseError, match="holds PEFT adapters"):
        quantize_weights(wrapped, weights)
    assert torch.equal(tiny.logits(wrapped), before)


@pytest.mark.parametrize("kind", ["torchao-fp8", "w8a16"])
def test_an_adapter_on_a_repacked_model_is_added_to_it(
    kind: str, make: Callable[[str], Path]
) -> None:
    peft = pytest.importorskip("peft")
    model = quantize_weights(load(make(kind)))
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    before = tiny.logits(model).float()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"])).eval()
    after = tiny.logits(wrapped).float()  # nothing is trained: the scales by output are in it
    assert (after - before).norm() / before.norm() < 0.05


@pytest.mark.parametrize("kind", WHOLE)
def test_repacked_models_compile(kind: str, make: Callable[[str], Path]) -> None:
    model = quantize_weights(load(make(kind)))
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    module = model.model.layers[0].mlp
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for tokens in (2, 40):
        x = torch.randn(1, tokens, 128).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


def test_a_missing_library_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPTQ's is one that no test installs."""
    if importlib.util.find_spec("gptqmodel") or importlib.util.find_spec("optimum"):
        pytest.skip("the library is here")
    folder = tiny.save_base(tmp_path / "base", tiny.llama_config(**SIZES))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, said = run(capsys, "sparsify", folder, "-o", tmp_path / "out")
    assert code == 2
    assert "cannot load the model" in said
    assert "optimum" in said or "gptqmodel" in said


def test_floats_have_no_codes_of_their_own() -> None:
    with pytest.raises(CatsparseError, match="name a format"):
        quantize_weights(tiny.build(tiny.llama_config(**SIZES)))


# Layouts, by hand


def scheme(**changes: Any) -> SimpleNamespace:
    weights = SimpleNamespace(num_bits=8, symmetric=True, strategy="channel", group_size=None)
    inputs = changes.pop("input_activations", None)
    weights.__dict__.update({k: v for k, v in changes.items() if k != "format"})
    return SimpleNamespace(
        weights=weights,
        input_activations=inputs,
        output_activations=None,
        format=changes.get("format", "int-quantized"),
    )


def coded(codes: Tensor, scale: Tensor, **changes: Any) -> nn.Linear:
    """A layer of a compressed-tensors checkpoint that no forward has unpacked."""
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.quantization_scheme = scheme(**changes)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_input", [False, True])
def test_every_code_and_hostile_scales_are_exact(by_input: bool, dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).repeat(7, 1)
    scale = torch.tensor([1e-30, 0.0, 3e-3, 1.0, 1e-8, 700.0, 0.3])[:, None]
    got = own_codes(coded(codes, scale))
    assert not isinstance(got, str)
    layer = QuantizedLinear.of_codes(coded(codes, scale), got, dtype, by_input)
    truth = (codes.float() * scale).to(dtype)
    assert torch.equal(layer.dequantized(dtype), truth)
    moved = layer.to(torch.bfloat16)
    assert moved.weight_scale.dtype == torch.float32
    assert not by_input or moved.output_scale.dtype == torch.float32
    assert torch.equal(moved.dequantized(dtype), truth)
    x = torch.randn(3, 256, dtype=torch.float64)
    exact = x @ (codes.double() * scale.double()).T
    with torch.no_grad():
        y = moved(x.float()).double()
    assert tiny.close(y[:, 2:], exact[:, 2:], 1e-5)  # in fp32, but for what underflows
    assert (y[:, 1] == 0).all()


@pytest.mark.parametrize("columns", [64, 192, 512, 640])
def test_int4_codes_keep_their_places(columns: int) -> None:
    codes = torch.randint(-8, 8, (24, columns)).to(torch.int8)
    scale = torch.randn(24, columns // 64).bfloat16()
    truth = torch.empty(24, columns)
    for row in range(24):
        for column in range(columns):
            truth[row, column] = float(codes[row, column]) * float(scale[row, column // 64])
    assert torch.equal(dequantize(*pack_int4(codes, scale), columns, torch.float32), truth)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"symmetric": False}, "zero points"),
        ({"input_activations": SimpleNamespace(dynamic=False)}, "static scale"),
        ({"input_activations": SimpleNamespace(dynamic="local")}, "static scale"),
        ({"strategy": "block"}, "scales are by block"),
        ({"format": "nvfp4-pack-quantized"}, "another layout"),
        ({"num_bits": 6}, "6 bits"),
    ],
)
def test_other_layouts_are_told(changes: dict[str, Any], words: str) -> None:
    codes, scale = torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1)
    assert words in str(own_codes(coded(codes, scale, **changes)))


def test_hostile_layers_are_told() -> None:
    codes, scale = torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1)
    assert "not finite" in str(own_codes(coded(codes, scale * torch.nan)))
    assert "not one a row" in str(own_codes(coded(codes, torch.ones(8, 2))))
    assert "none of ours" in str(own_codes(coded(codes.to(torch.uint8), scale)))
    ordered = coded(codes, scale)
    ordered.weight_g_idx = torch.arange(64)
    assert "act-order" in str(own_codes(ordered))
    by_group = checkpoints._by_group(codes[:, :64], torch.full((8, 1), 0.1), 64)
    assert "not exact in bf16" in str(by_group)


# Rounded again


@pytest.mark.parametrize(
    ("weights", "forward_before"),
    [("int8", False), ("int8", True), ("fp8", False), ("int4", False)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rounded_again_on_request(
    kind: str, weights: str, forward_before: bool, make: Callable[[str], Path]
) -> None:
    model, dense = load(make(kind)), load(make(kind))
    if forward_before:
        tiny.logits(model)
    quantize_weights(model, weights)
    assert weights_of_model(model) == weights
    assert linears(model) == {}
    for name, theirs in linears(dense).items():
        floats = nn.Linear(theirs.in_features, theirs.out_features, bias=False)
        floats.weight = nn.Parameter(floats_of(theirs))
        ours = model.get_submodule(name)
        expected = QuantizedLinear.of(floats, weights, ours.by_input)
        same = torch.equal(ours.weight.view(torch.uint8), expected.weight.view(torch.uint8))
        assert same, name
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    assert "masked children" not in catsparse.explain(model)
    assert tiny.logits(model, 1).isfinite().all()


@pytest.mark.parametrize("kind", ["bnb8", "bnb4"])
def test_bitsandbytes_floats_are_what_the_layer_multiplies_by(
    kind: str, make: Callable[[str], Path]
) -> None:
    layer = next(iter(linears(load(make(kind))).values()))
    x = torch.randn(16, layer.in_features).bfloat16()
    with torch.no_grad():
        assert tiny.close(layer(x).float(), x.float() @ floats_of(layer).float().T, 0.03)


class Stranger(nn.Module):
    """A stand-in for a GPTQ or AWQ layer: no nn.Linear, no weight, integers named qweight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1) / 7
        codes = (linear.weight.detach() / scale[:, None]).round().to(torch.int32)
        self.register_buffer("qweight", codes.t().contiguous())
        self.register_buffer("scales", scale)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype))


def strange() -> Any:
    model = tiny.build(tiny.llama_config(**SIZES))
    for layer in model.model.layers:
        for owner in (layer.mlp, layer.self_attn):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, Stranger(child))
    return model


def test_layers_that_are_no_linear_are_masked_or_rounded_again() -> None:
    model, dense = strange(), strange()
    with pytest.raises(CatsparseError, match="is not read by rows"):
        quantize_weights(model)
    catsparse.sparsify(model, tiny.calibrate(model), 0.5)
    assert catsparse.explain(model).count("quantized by test_checkpoints Stranger") == 2
    truth = tiny.masked_by_hand_in_place(model, dense, tiny.SHORT)
    assert tiny.close(tiny.logits(model, tiny.SHORT), truth)
    packed = quantize_weights(strange(), "int8")
    assert weights_of_model(packed) == "int8"
    assert tiny.close(tiny.logits(packed), tiny.logits(dense), 0.1)


# The command line


@pytest.mark.parametrize("kind", ["torchao-int8", "w8a8", "bnb4"])
@pytest.mark.parametrize("weights", [None, "own", "int8"])
def test_the_command(
    kind: str,
    weights: str | None,
    make: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    shutil.copytree(make(kind), base)
    hub.load_tokenizer("default").save_pretrained(base)
    more = [] if weights is None else ["--weights", weights]
    arguments = ("sparsify", base, "-o", tmp_path / "out", "--tokens", 1024, "--json", *more)
    code, told, said = run(capsys, *arguments)
    if weights == "own" and KINDS[kind][2] is None:
        assert code == 2
        assert "cannot be packed" in " ".join(said.split())
        return
    assert code == 0
    assert json.loads(told)["weights"] == (KINDS[kind][2] if weights == "own" else weights)
    masked = json.loads(told)["masked"]
    assert bool(masked) or weights is not None
    assert all("quantized by" in why for why in masked.values())
    assert not masked or weights in (None, "own")
    assert run(capsys, "evaluate", tmp_path / "out", "--tokens", 512, "--json")[0] == 0
    merge = (*arguments[:2], "-o", tmp_path / "merged", "--merge", "--tokens", 512, *more)
    code, _, said = run(capsys, *merge)
    assert code == 2
    assert "cannot be merged" in " ".join(said.split())
    assert not (tmp_path / "merged" / "catsparse.json").exists()
