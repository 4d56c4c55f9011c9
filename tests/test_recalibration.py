"""Thresholds set anew by what a sparse model itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import catsparse
import tiny
from catsparse import CatsparseError
from catsparse.meter import achieved_sparsity
from catsparse.modules import sparse_modules
from catsparse.recalibration import hold_thresholds, recalibrate, set_thresholds
from catsparse.statistics import magnitude_bins

DATA = tiny.tokens(24, 32, seed=11)
SETTINGS = {
    "cats": {"method": "cats", "compensate": False},
    "chess": {"method": "chess"},
    "energy": {"method": "energy"},
    "gate preview": {"method": "energy", "preview": 4},
    "product": {"method": "product", "preview": 4},
    "second decision": {"method": "energy", "down_sparsity": 0.7},
}


def sparse(preview: int | None = None, prefill: str = "masked", **options: Any) -> Any:
    model = tiny.build(tiny.llama_config())
    at = 0.5 if "down_sparsity" in options else None
    calibration = catsparse.calibrate(
        model, DATA, progress=False, preview=preview, products_at=at, method="energy"
    )
    return catsparse.sparsify(model, calibration, 0.5, prefill=prefill, **options)


def moved(model: Any) -> Any:
    """With an adapter that changes what is dropped."""
    torch.manual_seed(2)
    targets = ["gate_proj", "up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=40, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def achieved(model: Any) -> tuple[dict[str, float], dict[str, float]]:
    with achieved_sparsity(model) as meter:
        model(input_ids=DATA, use_cache=False)
    strip = len("base_model.model.") if isinstance(model, peft.PeftModel) else 0
    return (
        {name[strip:]: value for name, value in meter.sites.items()},
        {name[strip:]: value for name, value in meter.down_sites.items()},
    )


def asked(model: Any) -> dict[str, float]:
    return {name: site.sparsity for name, site in model.catsparse.config.sites.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_asked_is_dropped_again(setting: str) -> None:
    model = sparse(**SETTINGS[setting])
    wanted, means = asked(model), [m.catsparse_mean for m in sparse_modules(model).values()]
    wrapped = moved(model)
    off = [abs(value - wanted[name]) for name, value in achieved(wrapped)[0].items()]
    assert max(off) > 0.02  # else nothing is shown
    set_thresholds(wrapped, recalibrate(wrapped, DATA, progress=False), wanted)
    now, down = achieved(wrapped)
    # One pass: the first layer is exact, the second sees the first's new decision.
    for name, value in now.items():
        assert value == pytest.approx(wanted[name], abs=0.012), name
    config = model.catsparse.config
    for name, site in config.sites.items():
        assert site.sparsity == pytest.approx(now[name], abs=0.012)
        if setting == "second decision":
            assert site.down_sparsity == pytest.approx(0.7, abs=0.01)
            assert down[name] == pytest.approx(0.7, abs=0.02)
    assert config.measured_sparsity == pytest.approx(sum(wanted.values()) / 2, abs=0.005)
    # The model was trained with its means: they stay.
    for module, mean in zip(sparse_modules(model).values(), means, strict=True):
        assert (module.catsparse_mean is None) == (mean is None)
        assert mean is None or torch.equal(module.catsparse_mean, mean)


def test_statistics_by_hand() -> None:
    """The second layer's input is what the sparse first layer leaves, and nothing is masked of what
    is counted."""
    model = sparse(method="energy")
    calibration = recalibrate(model, DATA, progress=False, data_name="there", dtype="bfloat16")
    assert calibration.provenance.data == "there"
    assert calibration.provenance.dtype == "bfloat16"
    assert calibration.provenance.tokens == DATA.numel()
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
        for n, m in sparse_modules(model).items()
    ]
    with torch.no_grad():
        model(input_ids=DATA, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, module in sparse_modules(model).items():
        x = seen[name].flatten(0, 1)
        g = F.silu(F.linear(x, module.gate_proj.weight))
        u = F.linear(x, module.up_proj.weight)
        found = calibration.statistics[name]
        bins = torch.bincount(magnitude_bins(g).flatten().long(), minlength=32768)
        assert int((found.histogram - bins).abs().sum()) <= 0.002 * bins.sum()
        torch.testing.assert_close(found.bucket_sum.sum(0), (g * u).sum(0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.up_square.float(), u.square().sum(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("setting", ["energy", "product", "second decision"])
def test_adapter_or_merged_is_the_same(setting: str) -> None:
    wrapped = moved(sparse(**SETTINGS[setting]))
    one = recalibrate(wrapped, DATA, progress=False)
    other = recalibrate(wrapped.merge_and_unload(), DATA, progress=False)
    for name, statistics in one.statistics.items():
        total = int(statistics.histogram.sum())
        off = (statistics.histogram - other.statistics[name].histogram).abs().sum()
        assert int(off) < 0.02 * total
    assert one.foretold.keys() == other.foretold.keys()
    for name, products in one.foretold.items():
        torch.testing.assert_close(
            products.down_norm, other.foretold[name].down_norm, rtol=1e-4, atol=0
        )


def test_padding_is_not_counted() -> None:
    model = sparse(method="energy")
    short = DATA[:, :20]
    padded = F.pad(short, (0, 5))
    mask = F.pad(torch.ones_like(short), (0, 5))
    one = recalibrate(model, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    other = recalibrate(model, short, progress=False)
    for name, statistics in one.statistics.items():
        assert statistics.tokens == short.numel()
        theirs = other.statistics[name].gate_square
        torch.testing.assert_close(statistics.gate_square, theirs, rtol=1e-5, atol=0)


def test_the_dense_prefill_policy_does_not_hold() -> None:
    """Long calls would run dense, and the statistics be those of a model that decode is not."""
    one = recalibrate(sparse(prefill="dense", method="energy"), DATA, progress=False)
    other = recalibrate(sparse(method="energy"), DATA, progress=False)
    for name, statistics in one.statistics.items():
        assert torch.equal(statistics.histogram, other.statistics[name].histogram)


def test_holding_remembers_what_is_dropped_now(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    model = catsparse.hub.load_dense_model(str(base))
    catsparse.sparsify(model, tiny.calibrate(model), 0.5, "energy")
    before = {n: t.threshold for n, t in model.catsparse.thresholds.items()}
    calibration = recalibrate(model, DATA, progress=False)
    hold_thresholds(model, calibration, dict.fromkeys(before, (0.25, 0.25)))
    for name, t in model.catsparse.thresholds.items():
        assert torch.equal(t.threshold, before[name])
        assert model.catsparse.config.sites[name].sparsity == 0.25
    assert model.catsparse.config.measured_sparsity == 0.25
    assert model.catsparse.config.sparsity == 0.5  # asked
    catsparse.save(model, tmp_path / "out")
    loaded = catsparse.load(tmp_path / "out")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    # Other thresholds follow from the new statistics.
    statistics = loaded.catsparse.calibration
    catsparse.sparsify(catsparse.densify(loaded), statistics, 0.3)


def test_the_model_is_left_as_it_was() -> None:
    model = sparse(method="energy")
    model.train()
    before = tiny.logits(model)
    recalibrate(model, DATA, progress=False)
    assert model.training
    assert torch.equal(tiny.logits(model), before)
    assert all(m.catsparse_observer is None for m in sparse_modules(model).values())


def test_refusals() -> None:
    with pytest.raises(CatsparseError, match="not sparse"):
        recalibrate(tiny.build(tiny.llama_config()), DATA, progress=False)
    with pytest.raises(CatsparseError, match="no calibration token"):
        recalibrate(sparse(method="energy"), [], progress=False)


def test_dropped_inputs_are_refused() -> None:
    model = tiny.build(tiny.llama_config())
    calibration = catsparse.calibrate(model, DATA, progress=False, inputs="attention")
    catsparse.sparsify(model, calibration, 0.5, "energy", scope="all")
    with pytest.raises(catsparse.CatsparseError, match="sparsify with scope mlp"):
        recalibrate(model, DATA, progress=False)
