"""Inputs of linear layers: which share one, what is counted, thresholds by hand, the whole path."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Qwen2Config

import catsparse
from catsparse import Calibration, CatsparseError
from catsparse.inputs import block_of, find_inputs, inputs_needed, weight_norm
from catsparse.methods import input_threshold
from catsparse.sites import find_sites
from catsparse.statistics import InputStatistics
from tiny import SMALL, build, close, llama_config, logits, save_base, tokens

LAYERS = ("model.layers.0", "model.layers.1")
DATA = tokens(8, 32, 7)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return catsparse.calibrate(build(llama_config()), DATA, preview=4, progress=False, inputs="all")


# -- finding


def test_layers_that_are_given_the_same_tensor_share_an_input() -> None:
    model = build(llama_config())
    before = copy.deepcopy(model.state_dict())
    found = find_inputs(model, find_sites(model)[0])
    first = [site for site in found if site.name.startswith(LAYERS[0])]
    short = [tuple(n.rsplit(".", 1)[1] for n in site.linears) for site in first]
    assert short == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert [site.of_mlp for site in first] == [False, False, True, True]
    assert [(s.in_features, s.out_features) for s in first] == [
        (32, 64),
        (32, 32),
        (32, 96),
        (48, 32),
    ]
    assert len(found) == 8
    assert "lm_head" not in {name for site in found for name in site.linears}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_fused_projections() -> None:
    model = build(Phi3Config(**SMALL))
    names = [site.linears for site in find_inputs(model, find_sites(model)[0])]
    assert names[0] == ("model.layers.0.self_attn.o_proj",) or len(names[0]) == 1
    assert all(len(linears) == 1 for linears in names)


def test_training_flags_return() -> None:
    model = build(llama_config()).train()
    model.model.layers[0].eval()
    find_inputs(model, find_sites(model)[0])
    assert model.training
    assert not model.model.layers[0].training


def test_block_of_a_model_without_a_list() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert block_of(model, "1.0") == "1"


def test_wrapped_layers_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(llama_config()), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CatsparseError, match="q_proj is peft's Linear"):
        catsparse.calibrate(model, DATA, progress=False, inputs="attention")


def test_weight_norm() -> None:
    model = build(llama_config())
    site = find_inputs(model, find_sites(model)[0])[0]
    stacked = torch.cat([model.get_submodule(name).weight for name in site.linears])
    assert torch.allclose(weight_norm(model, site), stacked.norm(dim=0))


@pytest.mark.parametrize(
    ("method", "scope", "expected"),
    [
        ("energy", "mlp", None),
        ("product", "all", "attention"),
        ("teal", "mlp", "mlp"),
        ("wina", "all", "all"),
    ],
)
def test_inputs_needed(method: str, scope: str, expected: str | None) -> None:
    assert inputs_needed(method, scope) == expected


# -- counting


def seen_by(model: Any, name: str, data: Tensor) -> Tensor:
    """``[T, H]``: what a layer is given."""
    given: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: given.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=data)
    handle.remove()
    return torch.cat(given)


@pytest.mark.parametrize("name", [f"{LAYERS[1]}.self_attn.o_proj", f"{LAYERS[0]}.mlp.down_proj"])
def test_thresholds_drop_what_is_asked(calibration: Calibration, name: str) -> None:
    x = seen_by(build(llama_config()), name, DATA)
    statistics = calibration.input_statistics[name]
    assert statistics.tokens == DATA.numel()
    for method, weight in (("teal", torch.ones(x.shape[1])), ("wina", statistics.weight_norm)):
        for share in (0.25, 0.5, 0.8):
            t = input_threshold(statistics, method, share, compensate=True)
            assert (t.threshold.dim() == 0) == (method == "teal")
            dropped = x.abs() <= t.threshold
            assert float(dropped.float().mean()) == pytest.approx(share, abs=0.02)
            assert t.sparsity == pytest.approx(float(dropped.float().mean()), abs=0.02)
            # What is dropped are the smallest scores.
            score = x.abs() * weight
            assert (
                float((dropped != (score <= score.flatten().quantile(share))).float().mean()) < 0.03
            )
            assert t.mean is not None
            total = torch.where(dropped, x, 0.0).sum(0)
            often = dropped.sum(0) > 30
            mean = (total / dropped.sum(0).clamp(min=1))[often]
            assert float((t.mean[often] - mean).abs().mean()) < 0.1 * float(x.abs().mean())


def test_statistics_add_up() -> None:
    x, norm = torch.randn(50, 6), torch.rand(6)
    parts = [InputStatistics.empty(norm) for _ in range(3)]
    for part, rows in zip(parts, (x[:20], x[20:], x), strict=True):
        part.update(rows)
    both = parts[0] + parts[1]
    assert both.tokens == parts[2].tokens == 50
    assert torch.equal(both.histogram, parts[2].histogram)
    assert torch.allclose(both.bucket_sum, parts[2].bucket_sum, atol=1e-5)
    assert torch.equal(both.weight_norm, norm)


def test_padding_does_not_count() -> None:
    model, ids = build(llama_config()), DATA.clone()
    mask = torch.ones_like(ids)
    mask[:, :12] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    found = catsparse.calibrate(model, batches, progress=False, inputs="all")
    assert {s.tokens for s in found.input_statistics.values()} == {int(mask.sum())}


def test_calibrations_add_up_and_are_saved(calibration: Calibration, tmp_path: Path) -> None:
    model = build(llama_config())
    halves = [
        catsparse.calibrate(model, part, preview=4, progress=False, inputs="all")
        for part in DATA.split(4)
    ]
    both = halves[0] + halves[1]
    both.save(tmp_path / "both")
    again = Calibration.load(tmp_path / "both")
    assert again.inputs == calibration.inputs
    for name, statistics in calibration.input_statistics.items():
        assert torch.equal(again.input_statistics[name].histogram, statistics.histogram)
        assert again.input_statistics[name].tokens == statistics.tokens
    without = catsparse.calibrate(model, DATA, preview=4, progress=False)
    with pytest.raises(CatsparseError, match="different models"):
        both + without


def test_interrupted_calibration_goes_on(tmp_path: Path, calibration: Calibration) -> None:
    model, path = build(llama_config()), tmp_path / "partial"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    batches = [{"input_ids": part} for part in DATA.split(2)]
    first = catsparse.observation
    before = first._SAVE_SECONDS
    first._SAVE_SECONDS = -1.0
    handle = None
    calls = 0

    def third(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first call finds the inputs
            stop()

    try:
        handle = model.register_forward_pre_hook(third)
        with pytest.raises(KeyboardInterrupt):
            catsparse.calibrate(
                model, batches, preview=4, progress=False, inputs="all", checkpoint=path
            )
    finally:
        first._SAVE_SECONDS = before
        assert handle is not None
        handle.remove()
    assert path.exists()
    again = catsparse.calibrate(
        model, batches, preview=4, progress=False, inputs="all", checkpoint=path
    )
    for name, statistics in calibration.input_statistics.items():
        assert torch.equal(again.input_statistics[name].histogram, statistics.histogram)


def damaged(field: str, change: Any, calibration: Calibration, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {k: v.clone() for k, v in calibration.tensors().items()}
    name = next(iter(calibration.inputs))
    tensors[f"{name}.input_{field}"] = change(tensors[f"{name}.input_{field}"])
    save_file(tensors, path, calibration.metadata())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("histogram", lambda v: v + 1),
        ("bucket_count", lambda v: -v),
        ("bucket_sum", lambda v: v * float("nan")),
        ("weight_norm", lambda v: v[:-1]),
        ("weight_norm", lambda v: v.double()),
    ],
)
def test_damaged_statistics_are_refused(
    field: str, change: Any, calibration: Calibration, tmp_path: Path
) -> None:
    damaged(field, change, calibration, tmp_path / "bad")
    with pytest.raises(CatsparseError, match="not a readable calibration") as caught:
        Calibration.load(tmp_path / "bad")
    assert "\n" not in str(caught.value)


# -- the whole path


def masked_by_hand(model: Any, config: Any, thresholds: Any, ids: Tensor) -> Tensor:
    """The dense model with hooks that leave inputs out."""
    handles = []
    for name, part in config.inputs.items():
        t = thresholds[name]

        def leave_out(_: Any, args: Any, t: Any = t) -> tuple[Tensor]:
            fill = torch.zeros(()) if t.mean is None else t.mean
            return (torch.where(args[0].abs() > t.threshold, args[0], fill),)

        handles += [
            model.get_submodule(n).register_forward_pre_hook(leave_out) for n in part.linears
        ]
    with torch.no_grad():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return result


@pytest.mark.parametrize("length", [5, 24])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("scope", ["mlp", "all"])
@pytest.mark.parametrize("method", ["teal", "wina"])
def test_logits_are_those_by_hand(
    calibration: Calibration, method: str, scope: str, compensate: bool, length: int
) -> None:
    dense, model = build(llama_config()), build(llama_config())
    catsparse.sparsify(model, calibration, 0.4, method, compensate, scope=scope)
    state = model.catsparse
    expected = masked_by_hand(dense, state.config, state.thresholds, tokens(1, length, 3))
    assert len(state.config.inputs) == (8 if scope == "all" else 4)
    assert not state.config.sites
    assert close(logits(model, length), expected)


def test_scope_all_beside_neurons(calibration: Calibration) -> None:
    model, only = build(llama_config()), build(llama_config())
    catsparse.sparsify(model, calibration, 0.4, "product", scope="all")
    config = model.catsparse.config
    assert len(config.sites) == 2
    assert len(config.inputs) == 4
    assert config.input_method == "teal"
    assert all(t.mean is None for n, t in model.catsparse.thresholds.items() if n in config.inputs)
    # With the neurons dense again, what is left are attention's inputs.
    for name in LAYERS:
        model.get_submodule(f"{name}.mlp").catsparse_enabled = False
    expected = masked_by_hand(only, config, model.catsparse.thresholds, tokens(1, 24, 3))
    assert close(logits(model), expected)


@pytest.mark.parametrize("method", ["teal", "wina", "product"])
def test_sparsity_0_is_dense_bit_for_bit(calibration: Calibration, method: str) -> None:
    dense, model = build(llama_config()), build(llama_config())
    catsparse.sparsify(model, calibration, 0.0, method, scope="all")
    assert torch.equal(logits(model), logits(dense))


def test_densify_returns_the_very_parameters(calibration: Calibration) -> None:
    model = build(llama_config())
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    catsparse.sparsify(model, calibration, 0.5, "teal", scope="all")
    logits(model, 3)  # decode makes copies
    catsparse.densify(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert not any("catsparse" in n for m in model.modules() for n in {**m.__dict__, **m._buffers})


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("method", ["wina", "energy"])
def test_saved_and_loaded(tmp_path: Path, method: str, merge: bool) -> None:
    base = save_base(tmp_path / "base")
    model = catsparse.hub.load_dense_model(str(base))
    calibration = catsparse.calibrate(model, DATA, progress=False, inputs="all")
    catsparse.sparsify(model, calibration, bytes_skipped=0.4, method=method, scope="all")
    logits(model, 3)
    catsparse.save(model, tmp_path / "out", merge=merge)
    again = catsparse.load(tmp_path / "out")
    assert again.catsparse.config == model.catsparse.config or merge
    assert torch.equal(logits(again), logits(model))
    assert again.catsparse.config.bytes_skipped == pytest.approx(0.4, abs=0.01)
    raw = json.loads((tmp_path / "out" / "catsparse.json").read_text())
    assert raw["scope"] == "all"
    assert raw["inputs"][f"{LAYERS[0]}.self_attn.q_proj"]["out_features"] == 64
    # From the saved calibration, at once.
    catsparse.densify(again)
    catsparse.sparsify(again, again_calibration(tmp_path), 0.3, "teal")


def again_calibration(folder: Path) -> Calibration:
    return Calibration.load(folder / "out" / "calibration.safetensors")


def test_artifact_for_another_model_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = catsparse.hub.load_dense_model(str(base))
    calibration = catsparse.calibrate(model, DATA, progress=False, inputs="attention")
    catsparse.sparsify(model, calibration, 0.4, "cats", scope="all")
    catsparse.save(model, tmp_path / "out")
    other = save_base(tmp_path / "other", llama_config(num_key_value_heads=4))
    with pytest.raises(CatsparseError, match="64 in the calibration"):
        catsparse.load(tmp_path / "out", base_model=str(other))


def test_achieved_sparsity_and_bytes(calibration: Calibration) -> None:
    model = build(llama_config())
    catsparse.sparsify(model, calibration, bytes_skipped=0.45, method="product", scope="all")
    with catsparse.achieved_sparsity(model) as meter:
        logits(model, 64, seed=7)
    config = model.catsparse.config
    assert len(meter.inputs) == 8  # q, k and v each
    assert meter.input_sparsity == pytest.approx(config.input_sparsity, abs=0.05)
    assert meter.bytes_skipped == pytest.approx(config.bytes_skipped, abs=0.05)
    assert config.bytes_skipped == pytest.approx(0.45, abs=0.01)
    catsparse.densify(model)
    catsparse.sparsify(model, calibration, 0.3, method="teal")
    with catsparse.achieved_sparsity(model) as meter:
        logits(model, 64, seed=7)
    assert meter.sparsity == meter.bytes_skipped == pytest.approx(0.3, abs=0.05)
    assert meter.sites == {}


@pytest.mark.parametrize("allocation", ["uniform", "greedy", "optimal"])
@pytest.mark.parametrize("method", ["teal", "product", "energy"])
def test_allocation_over_all_linears(
    calibration: Calibration, allocation: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(llama_config())
    chosen = calibration
    if method == "energy":
        chosen = catsparse.calibrate(model, DATA, progress=False, inputs="attention")
    if allocation != "uniform":
        chosen.sensitivities = catsparse.measure_sensitivities(
            model,
            chosen,
            tokens(2, 24, 9),
            method,
            True,
            "all",
            progress=False,
            sparsities=(0.2, 0.5, 0.9),
        )
        assert set(chosen.sensitivities.losses) == set(chosen.parts(method, "all"))
    catsparse.sparsify(
        model, chosen, bytes_skipped=0.4, method=method, allocation=allocation, scope="all"
    )
    assert model.catsparse.config.bytes_skipped == pytest.approx(0.4, abs=0.02)
    shares = {round(p.sparsity, 2) for p in model.catsparse.config.inputs.values()}
    assert (len(shares) < 3) == (allocation == "uniform")


def test_a_table_of_another_scope_is_refused(calibration: Calibration) -> None:
    model = build(llama_config())
    calibration.sensitivities = catsparse.measure_sensitivities(
        model, calibration, tokens(1, 24, 9), "product", progress=False, sparsities=(0.5, 0.9)
    )
    with pytest.raises(CatsparseError, match=r"lack model\.layers\.0\.self_attn\.q_proj"):
        catsparse.sparsify(model, calibration, bytes_skipped=0.3, allocation="greedy", scope="all")


def test_what_was_not_counted_is_refused() -> None:
    model = build(llama_config())
    calibration = catsparse.calibrate(model, DATA, progress=False)
    for method, scope, inputs in (
        ("teal", "mlp", "mlp"),
        ("energy", "all", "attention"),
        ("wina", "all", "all"),
    ):
        with pytest.raises(CatsparseError, match=f"calibrate again with inputs='{inputs}'"):
            catsparse.sparsify(model, calibration, 0.5, method, scope=scope)
    with pytest.raises(CatsparseError, match="inputs must be one of"):
        catsparse.calibrate(model, DATA, progress=False, inputs="some")
    with pytest.raises(CatsparseError, match="takes neither preview"):
        calibration.thresholds(0.5, "teal", down_sparsity=0.6)


def test_biases_of_a_layer_stay() -> None:
    dense, model = build(Qwen2Config(**SMALL)), build(Qwen2Config(**SMALL))
    for one in (dense, model):
        torch.manual_seed(3)
        for layer in one.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias)
    calibration = catsparse.calibrate(model, DATA, progress=False, inputs="all")
    for length in (5, 24):
        catsparse.sparsify(model, calibration, 0.4, "teal", scope="all")
        state = model.catsparse
        expected = masked_by_hand(dense, state.config, state.thresholds, tokens(1, length, 3))
        assert close(logits(model, length), expected)
        catsparse.densify(model)
