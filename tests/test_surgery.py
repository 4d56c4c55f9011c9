"""sparsify, densify and what lies between, on whole models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import catsparse
import tiny
from catsparse import Calibration, CatsparseError, SparsityConfig, densify, explain, sparsify
from catsparse.config import SiteConfig
from catsparse.kernels.backend import AUTO_TOKENS
from catsparse.methods import METHODS
from catsparse.modules import SparseMLP, sparse_modules
from catsparse.surgery import base_model_of, run_dense, state_of

SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]


def one_line(error: pytest.ExceptionInfo[CatsparseError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def is_dense(model: nn.Module) -> bool:
    """No trace of sparsity anywhere."""
    return not any(
        isinstance(m, SparseMLP) or any("catsparse" in key for key in [*m.__dict__, *m._buffers])
        for m in model.modules()
    )


# sparsify


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("length", [tiny.SHORT, tiny.LONG])
def test_sparse_logits_by_hand(
    llama: Any, calibration: Calibration, method: str, compensate: bool, length: int
) -> None:
    dense = copy.deepcopy(llama)
    sparsify(llama, calibration, 0.5, method, compensate)
    expected = tiny.logits(tiny.masked_by_hand(llama, dense), length)
    torch.testing.assert_close(tiny.logits(llama, length), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected, tiny.logits(dense, length), atol=0.1)


def test_sparsify_works_in_place_and_returns_the_model(
    llama: Any, calibration: Calibration
) -> None:
    parameters = dict(llama.named_parameters())
    assert sparsify(llama, calibration) is llama
    assert list(sparse_modules(llama)) == SITES
    assert all(p is parameters[n] for n, p in llama.named_parameters())


def test_thresholds_on_the_model_are_the_calibration_s(
    llama: Any, calibration: Calibration
) -> None:
    sparsify(llama, calibration, 0.6, "chess", prefill="dense")
    for name, t in calibration.thresholds(0.6, "chess").items():
        mlp = llama.get_submodule(name)
        assert torch.equal(mlp.catsparse_threshold, t.threshold)
        assert torch.equal(mlp.catsparse_mean, t.mean)
        assert mlp.catsparse_prefill == "dense"


def test_state_describes_the_model(llama: Any, calibration: Calibration) -> None:
    llama.config._name_or_path = "some/model"
    state = state_of(sparsify(llama, calibration, 0.4, "cats", compensate=False))
    config = state.config
    assert (config.method, config.compensate, config.sparsity) == ("cats", False, 0.4)
    assert config.measured_sparsity == pytest.approx(0.4, abs=0.01)
    assert config.prefill == "masked"
    assert config.base_model == catsparse.config.BaseModel("some/model", "llama")
    assert config.calibration == calibration.provenance
    assert config.catsparse_version == catsparse.__version__
    assert list(config.sites) == SITES
    for name, site in config.sites.items():
        assert site.threshold == float(state.thresholds[name].threshold)
        assert (site.act, site.hidden_size, site.intermediate_size) == ("silu", 32, 48)
    assert state.calibration is calibration
    assert SparsityConfig.from_json(config.to_json()) == config


def test_measured_sparsity_weighs_sites_by_neurons(llama: Any, calibration: Calibration) -> None:
    config = state_of(sparsify(llama, calibration, 0.5)).config
    shares = [site.sparsity for site in config.sites.values()]
    assert config.measured_sparsity == pytest.approx(sum(shares) / 2)
    assert config.bytes_skipped == pytest.approx(2 / 3 * sum(shares) / 2)


def with_sensitivities(calibration: Calibration) -> Calibration:
    """Made up: the second MLP costs ten times what the first does."""
    rows = ([0.1, 0.5], [1.0, 5.0])
    losses = {n: torch.tensor(r).double() for n, r in zip(calibration.sites, rows, strict=True)}
    table = catsparse.Sensitivities("energy", True, None, 64, (0.5, 0.9), losses)
    return replace(calibration, sensitivities=table)


def test_sparsity_by_layer(llama: Any, calibration: Calibration) -> None:
    wanted = dict(zip(SITES, (0.2, 0.7), strict=True))
    state = state_of(sparsify(llama, calibration, wanted))
    assert [s.sparsity for s in state.config.sites.values()] == pytest.approx([0.2, 0.7], abs=0.01)
    assert state.config.sparsity == pytest.approx(0.45)  # over all neurons
    assert state.config.measured_sparsity == pytest.approx(0.45, abs=0.01)
    for name, s in wanted.items():
        mlp = llama.get_submodule(name)
        alone = calibration.thresholds(s)[name]
        assert torch.equal(mlp.catsparse_threshold, alone.threshold)
        assert torch.equal(mlp.catsparse_mean, alone.mean)


@pytest.mark.parametrize("allocation", ["uniform", "greedy", "optimal"])
def test_bytes_skipped_is_a_budget(llama: Any, calibration: Calibration, allocation: str) -> None:
    calibration = with_sensitivities(calibration)
    sparsify(llama, calibration, bytes_skipped=0.4, allocation=allocation)
    config = state_of(llama).config
    assert config.bytes_skipped == pytest.approx(0.4, abs=0.005)
    assert config.sparsity == pytest.approx(0.6)
    one, two = (site.sparsity for site in config.sites.values())
    assert one - two > 0.1 if allocation != "uniform" else abs(one - two) < 0.01
    assert SparsityConfig.from_json(config.to_json()) == config


def test_half_is_dropped_where_nothing_is_said(llama: Any, calibration: Calibration) -> None:
    assert state_of(sparsify(llama, calibration)).config.sparsity == 0.5


def test_sparsify_twice_is_refused(sparse_llama: Any, calibration: Calibration) -> None:
    state = state_of(sparse_llama)
    with pytest.raises(CatsparseError, match=r"already sparse.*densify") as caught:
        sparsify(sparse_llama, calibration, 0.7)
    one_line(caught)
    assert state_of(sparse_llama) is state


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": -0.1}, "at least 0"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"method": "topk"}, "cats, chess"),
        ({"prefill": "sparse"}, "masked, dense"),
        ({"sparsity": {SITES[0]: 0.5}}, f"{SITES[1]} is missing"),
        ({"sparsity": 0.5, "bytes_skipped": 0.3}, "not both"),
        ({"bytes_skipped": 0.7}, "it can be"),
        ({"bytes_skipped": 0.3, "down_sparsity": 0.6}, "second decision"),
        ({"bytes_skipped": 0.3, "allocation": "best"}, "uniform, greedy, optimal"),
        ({"bytes_skipped": 0.3, "allocation": "greedy", "method": "cats"}, "not with cats"),
        ({"allocation": "optimal"}, "needs bytes_skipped"),
        ({"sparsity": 0.5, "allocation": "optimal"}, "needs bytes_skipped"),
    ],
)
def test_bad_argument_changes_nothing(
    llama: Any, calibration: Calibration, options: dict[str, Any], says: str
) -> None:
    calibration = with_sensitivities(calibration)
    with pytest.raises(CatsparseError, match=says) as caught:
        sparsify(llama, calibration, **options)
    one_line(caught)
    assert is_dense(llama)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1}, "no gated MLP named 'model.layers.1.mlp'"),
        ({"intermediate_size": 40}, "layers.0.mlp is .*40.* in the model but .*48"),
        ({"hidden_size": 64}, "layers.0.mlp is .*64.* in the model but .*32"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_wrong_model_is_refused(
    calibration: Calibration, changes: dict[str, Any], says: str
) -> None:
    model = tiny.build(tiny.llama_config(**changes))
    with pytest.raises(CatsparseError, match=says) as caught:
        sparsify(model, calibration)
    assert "use the model that was calibrated" in one_line(caught)
    assert is_dense(model)


def test_nothing_is_changed_if_one_site_does_not_fit(llama: Any, calibration: Calibration) -> None:
    """The last site is the bad one: those before it must not have been made sparse."""
    llama.model.layers[1].mlp = (
        tiny.build(tiny.llama_config(intermediate_size=40)).model.layers[1].mlp
    )
    before = tiny.logits(llama)
    with pytest.raises(CatsparseError):
        sparsify(llama, calibration)
    assert is_dense(llama)
    assert torch.equal(tiny.logits(llama), before)


def test_model_without_sites(calibration: Calibration) -> None:
    with pytest.raises(CatsparseError, match="no gated MLP"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), calibration)


def test_some_sites_only(llama: Any, calibration: Calibration) -> None:
    del calibration.statistics[SITES[0]], calibration.sites[SITES[0]]
    sparsify(llama, calibration)
    assert list(sparse_modules(llama)) == SITES[1:]
    densify(llama)
    assert is_dense(llama)


# A config alone


def plain_config(model: Any, calibration: Calibration) -> SparsityConfig:
    sparsify(model, calibration, 0.5, "cats", compensate=False)
    config = state_of(model).config
    densify(model)
    return SparsityConfig.from_json(config.to_json())


def test_config_alone_equals_the_calibration(llama: Any, calibration: Calibration) -> None:
    config = plain_config(llama, calibration)
    for length in (tiny.SHORT, tiny.LONG):
        sparsify(llama, calibration, 0.5, "cats", compensate=False)
        expected = tiny.logits(llama, length)
        densify(llama)
        sparsify(llama, config)
        assert torch.equal(tiny.logits(llama, length), expected)
        assert state_of(llama).config == config
        densify(llama)


def test_config_s_prefill_policy_counts(llama: Any, calibration: Calibration) -> None:
    config = replace(plain_config(llama, calibration), prefill="dense")
    dense = tiny.logits(llama, tiny.LONG)
    sparsify(llama, config)
    assert torch.equal(tiny.logits(llama, tiny.LONG), dense)
    assert not torch.equal(
        tiny.logits(llama, tiny.SHORT), tiny.logits(tiny.build(tiny.llama_config()), tiny.SHORT)
    )


@pytest.mark.parametrize("changes", [{"method": "chess"}, {"compensate": True}])
def test_config_that_needs_its_calibration(
    llama: Any, calibration: Calibration, changes: dict[str, Any]
) -> None:
    config = replace(plain_config(llama, calibration), **changes)
    with pytest.raises(CatsparseError, match=r"catsparse\.load") as caught:
        sparsify(llama, config)
    one_line(caught)
    assert is_dense(llama)


def test_config_written_by_hand(llama: Any) -> None:
    """Nothing but thresholds; the first layer keeps everything, the second nothing."""
    sites = {
        SITES[0]: SiteConfig(-1.0, 0.0, "silu", 32, 48),
        SITES[1]: SiteConfig(1e30, 1.0, "silu", 32, 48),
    }
    dense = copy.deepcopy(llama)
    sparsify(llama, SparsityConfig(sites=sites))
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(tiny.logits(llama), tiny.logits(dense))


def test_config_with_a_threshold_that_is_no_fp32_number(llama: Any, tmp_path: Path) -> None:
    """It is rounded to the number that kernels compare with, and so it is saved."""
    sites = {name: SiteConfig(0.1, 0.5, "silu", 32, 48) for name in SITES}
    sparsify(llama, SparsityConfig(sites=sites))
    rounded = float(torch.tensor(0.1))
    assert {s.threshold for s in state_of(llama).config.sites.values()} == {rounded}
    catsparse.save(llama, tmp_path, merge=True)
    loaded = catsparse.load(tmp_path)
    assert tiny.close(tiny.logits(loaded), tiny.logits(llama), 1e-5)


@pytest.mark.parametrize("method", ["energy", "chess"])
def test_config_of_another_method_is_not_one_of_cats(
    llama: Any, calibration: Calibration, method: str
) -> None:
    """Its scalars are on another scale, and its thresholds are tensors."""
    sparsify(llama, calibration, 0.5, method, compensate=False)
    config = replace(state_of(llama).config, method="cats")
    densify(llama)
    with pytest.raises(CatsparseError, match=r"sparsify\(model, calibration") as caught:
        sparsify(llama, config)
    one_line(caught)
    assert is_dense(llama)


def test_config_that_names_an_unknown_module(llama: Any) -> None:
    sites = {"model.layers.7.mlp": SiteConfig(0.1, 0.5, "silu", 32, 48)}
    with pytest.raises(CatsparseError, match=r"'model\.layers\.7\.mlp'") as caught:
        sparsify(llama, SparsityConfig(sites=sites))
    assert f"(it has {', '.join(SITES)}" in one_line(caught)


# densify


def test_densify_restores_everything(llama: Any, calibration: Calibration) -> None:
    parameters = dict(llama.named_parameters())
    keys = {name: set(m.__dict__) for name, m in llama.named_modules()}
    classes = [type(m) for m in llama.modules()]
    before = {length: tiny.logits(llama, length) for length in (tiny.SHORT, tiny.LONG)}
    for _ in range(2):
        sparsify(llama, calibration)
        assert densify(llama) is llama
        assert is_dense(llama)
        assert [type(m) for m in llama.modules()] == classes
        assert {name: set(m.__dict__) for name, m in llama.named_modules()} == keys
        assert all(p is parameters[n] for n, p in llama.named_parameters())
        for length, logits in before.items():
            assert torch.equal(tiny.logits(llama, length), logits)


def test_densify_a_dense_model(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="not sparse") as caught:
        densify(llama)
    one_line(caught)


def test_state_of_a_dense_model(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="sparsify") as caught:
        state_of(llama)
    one_line(caught)


# run_dense


def test_run_dense(sparse_llama: Any) -> None:
    dense = tiny.build(tiny.llama_config())
    for length in (tiny.SHORT, tiny.LONG):
        sparse = tiny.logits(sparse_llama, length)
        with run_dense(sparse_llama):
            assert torch.equal(tiny.logits(sparse_llama, length), tiny.logits(dense, length))
        assert torch.equal(tiny.logits(sparse_llama, length), sparse)


def test_run_dense_ends_with_an_error(sparse_llama: Any) -> None:
    sparse = tiny.logits(sparse_llama)
    with pytest.raises(KeyboardInterrupt), run_dense(sparse_llama):
        raise KeyboardInterrupt
    assert torch.equal(tiny.logits(sparse_llama), sparse)


def test_run_dense_within_run_dense(sparse_llama: Any) -> None:
    dense = tiny.logits(tiny.build(tiny.llama_config()))
    with run_dense(sparse_llama):
        with run_dense(sparse_llama):
            pass
        assert torch.equal(tiny.logits(sparse_llama), dense)
    assert not torch.equal(tiny.logits(sparse_llama), dense)


# explain


def test_explain_a_sparse_model(sparse_llama: Any) -> None:
    lines = explain(sparse_llama).split("\n")
    assert lines == [
        f"{name}: sparse, per-neuron thresholds, compensated; decode by the c kernel "
        f"(faster than torch up to {AUTO_TOKENS[torch.float32]} tokens), "
        "reading kept rows of up and down"
        for name in SITES
    ]


def test_explain_says_why_children_are_called(llama: Any, calibration: Calibration) -> None:
    sparsify(llama, calibration, method="cats", compensate=False)
    llama.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, out: None)
    first, second = explain(llama).split("\n")
    threshold = state_of(llama).config.sites[SITES[0]].threshold
    assert f"sparse, threshold {threshold:.4g}; decode by the c kernel" in first
    assert second.endswith("decode by masked children (up_proj is hooked)")


def test_explain_dense_and_refused_modules(llama: Any, calibration: Calibration) -> None:
    assert explain(llama).split("\n") == [f"{name}: dense gated MLP (silu)" for name in SITES]
    llama.model.layers[1].mlp.forward = lambda x: x
    lines = explain(llama).split("\n")
    assert lines[0] == f"{SITES[0]}: dense gated MLP (silu)"
    assert lines[1].startswith(f"refused: LlamaMLP ({SITES[1]}): its forward was replaced")
    assert explain(nn.Linear(2, 2)) == "Linear: no gated MLP found"


def test_explain_finds_nothing_refused_in_a_sparse_model(sparse_llama: Any) -> None:
    assert "refused" not in explain(sparse_llama)


# base_model_of


def test_base_model_of() -> None:
    model = tiny.build(tiny.llama_config())
    model.config._name_or_path = "owner/name"
    model.config._commit_hash = "abc"
    assert base_model_of(model) == catsparse.config.BaseModel("owner/name", "llama", "abc")
    assert base_model_of(nn.Linear(1, 1)) is None


# Preview and second decision


def test_config_of_preview_and_second_decision(llama: Any, windows: Any) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    thresholds = calibration.thresholds(0.4, down_sparsity=0.6)
    config = state_of(sparsify(llama, calibration, 0.4, down_sparsity=0.6, preview=4)).config
    assert (config.preview, config.down_sparsity) == (4, 0.6)
    for name, t in thresholds.items():
        site, mlp = config.sites[name], llama.get_submodule(name)
        assert (site.product_threshold, site.down_sparsity) == (t.product_scalar, t.down_sparsity)
        assert torch.equal(mlp.catsparse_product_threshold, t.product)
        assert mlp.catsparse_preview_bits == 4
    shares = [site.down_sparsity for site in config.sites.values()]
    assert config.measured_down_sparsity == pytest.approx(sum(shares) / 2)
    assert config.measured_down_sparsity == pytest.approx(0.6, abs=0.01)


def test_preview_other_than_calibrated(llama: Any, calibration: Calibration, windows: Any) -> None:
    eight = catsparse.calibrate(llama, windows, preview=8, progress=False)
    for given in (calibration, eight):
        with pytest.raises(CatsparseError, match="calibrate again with preview=4") as caught:
            sparsify(llama, given, preview=4)
        assert f"was made with preview={given.preview};" in one_line(caught)
        assert is_dense(llama)
    with pytest.raises(CatsparseError, match="calibrate again with products_at"):
        sparsify(llama, calibration, down_sparsity=0.6)
    sparsify(llama, eight)
    assert llama.catsparse.config.preview == 8


def test_config_alone_with_a_preview(llama: Any, windows: Any) -> None:
    calibration = catsparse.calibrate(
        llama, windows, preview=4, products_at=0.4, method="cats", progress=False
    )
    sparsify(llama, calibration, 0.4, "cats", compensate=False)
    config, expected = llama.catsparse.config, tiny.logits(llama)
    densify(llama)
    sparsify(llama, config)
    assert torch.equal(tiny.logits(llama), expected)
    densify(llama)
    sparsify(llama, calibration, 0.4, "cats", compensate=False, down_sparsity=0.6)
    config = llama.catsparse.config
    densify(llama)
    with pytest.raises(CatsparseError, match="second decision") as caught:
        sparsify(llama, config)
    one_line(caught)


# Method product


def test_preview_decides_on_the_product_by_default(llama: Any, windows: Any) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    thresholds = calibration.thresholds(0.6, "product")
    config = state_of(sparsify(llama, calibration, 0.6)).config
    assert (config.method, config.preview, config.down_sparsity) == ("product", 4, None)
    for name, t in thresholds.items():
        site, mlp = config.sites[name], llama.get_submodule(name)
        assert (site.threshold, site.sparsity) == (t.scalar, t.sparsity)
        assert (site.product_threshold, site.down_sparsity) == (None, None)
        assert torch.equal(mlp.catsparse_threshold, t.threshold)
        assert torch.equal(mlp.catsparse_mean, t.mean)
        assert mlp.catsparse_of_products
        assert mlp.catsparse_preview.shape[0] == 2 * 48
    for options, method in (
        ({"method": "energy"}, "energy"),
        ({"method": "cats"}, "cats"),
        ({"down_sparsity": 0.6}, "energy"),
    ):
        densify(llama)
        sparsify(llama, calibration, 0.4, **options)
        assert llama.catsparse.config.method == method
        for mlp in sparse_modules(llama).values():
            assert not mlp.catsparse_of_products
            assert mlp.catsparse_preview.shape[0] == 48


def test_exact_gate_keeps_its_method(llama: Any, calibration: Calibration) -> None:
    assert state_of(sparsify(llama, calibration)).config.method == "energy"


def test_method_product_that_cannot_be(llama: Any, calibration: Calibration, windows: Any) -> None:
    with pytest.raises(CatsparseError, match="calibrate with preview=4") as caught:
        sparsify(llama, calibration, method="product")
    one_line(caught)
    previewed = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    with pytest.raises(CatsparseError, match="takes no down_sparsity; leave that out") as caught:
        sparsify(llama, previewed, 0.4, "product", down_sparsity=0.6)
    one_line(caught)
    assert is_dense(llama)
    sparsify(llama, previewed, 0.4)
    config = llama.catsparse.config
    densify(llama)
    with pytest.raises(CatsparseError, match="enough only for method 'cats'"):
        sparsify(llama, config)


def test_explain_says_that_the_product_decides(llama: Any, windows: Any) -> None:
    sparsify(llama, catsparse.calibrate(llama, windows, preview=4, progress=False))
    for line in explain(llama).split("\n"):
        assert "compensated, 4-bit product preview; decode by" in line
        if "kernel" in line:
            assert "kept rows of gate, up and down" in line
    llama.train()  # which decides as inference will
    assert "not in use" not in explain(llama)
    llama.eval()
    for mlp in sparse_modules(llama).values():
        handle = mlp.gate_proj.register_forward_hook(lambda *_: None)
    assert "product preview (not in use: gate_proj is hooked; the exact product decides)" in (
        explain(llama)
    )
    handle.remove()
    for mlp in sparse_modules(llama).values():
        mlp.set_backend(mlp.catsparse_backend, down_copy=False)
    for line in explain(llama).split("\n"):
        if "kernel" in line:
            assert line.endswith("reading kept rows of gate and up, all of down (no copy)")
