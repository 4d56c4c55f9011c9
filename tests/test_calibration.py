"""Calibration: thresholds from what is stored, its file, and files that are not one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import catsparse
import tiny
from catsparse import Calibration, CatsparseError, Sensitivities, allocate
from catsparse.calibration import GateDecision
from catsparse.config import GATE_METHODS, PRODUCT
from catsparse.methods import product_threshold, site_threshold
from catsparse.statistics import BINS

SITE = "model.layers.0.mlp"
Tensors = dict[str, Tensor]
Metadata = dict[str, str]


def assert_equal(one: Calibration, other: Calibration) -> None:
    assert one.sites == other.sites
    assert list(one.sites) == list(other.sites)  # the order too
    assert one.provenance == other.provenance
    assert {n: s.tokens for n, s in one.statistics.items()} == {
        n: s.tokens for n, s in other.statistics.items()
    }
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def test_round_trip(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "calibration.safetensors"
    calibration.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert_equal(Calibration.load(path), calibration)
    assert_equal(Calibration.load(str(path)), calibration)


def test_thresholds_survive_the_file(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    for name, t in calibration.thresholds(0.4).items():
        again = loaded.thresholds(0.4)[name]
        assert torch.equal(t.threshold, again.threshold)
        assert t.mean is not None
        assert again.mean is not None
        assert torch.equal(t.mean, again.mean)
        assert (t.scalar, t.sparsity) == (again.scalar, again.sparsity)


def test_thresholds_are_those_of_every_site(calibration: Calibration) -> None:
    thresholds = calibration.thresholds(0.3, "cats", compensate=False)
    assert list(thresholds) == list(calibration.sites)
    for name, t in thresholds.items():
        alone = site_threshold(calibration.statistics[name], "cats", 0.3, False)
        assert torch.equal(t.threshold, alone.threshold)
        assert t.mean is None


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(calibration: Calibration, sparsity: float) -> None:
    with pytest.raises(CatsparseError, match="sparsity must be"):
        calibration.thresholds(sparsity)


def test_unknown_method(calibration: Calibration) -> None:
    with pytest.raises(CatsparseError, match="method must be one of cats, chess"):
        calibration.thresholds(0.5, "topk")


def test_sparsity_by_site(calibration: Calibration) -> None:
    wanted = dict(zip(calibration.sites, (0.2, 0.7), strict=True))
    for name, t in calibration.thresholds(wanted, "cats").items():
        alone = site_threshold(calibration.statistics[name], "cats", wanted[name], True)
        assert torch.equal(t.threshold, alone.threshold)
        assert t.sparsity == pytest.approx(wanted[name], abs=0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({SITE: 1.0}, "below 1"),
        ({SITE: float("nan")}, "sparsity must be"),
        ({"other": 0.5}, "other is not one"),
        ({SITE: None}, f"{SITE} is missing"),
    ],
)
def test_bad_sparsity_by_site(calibration: Calibration, change: Any, says: str) -> None:
    wanted = dict.fromkeys(calibration.sites, 0.5) | change
    wanted = {name: s for name, s in wanted.items() if s is not None}
    with pytest.raises(CatsparseError, match=says):
        calibration.thresholds(wanted)


def test_sparsity_by_site_with_a_second_decision(calibration: Calibration) -> None:
    with pytest.raises(CatsparseError, match="one sparsity; give the same for all sites"):
        calibration.thresholds(dict.fromkeys(calibration.sites, 0.5), down_sparsity=0.6)


def test_addition(calibration: Calibration) -> None:
    doubled = calibration + calibration
    assert doubled.provenance.tokens == 2 * calibration.provenance.tokens
    assert doubled.provenance.data == calibration.provenance.data
    for name, statistics in doubled.statistics.items():
        once = calibration.statistics[name]
        assert statistics.tokens == 2 * once.tokens
        assert torch.equal(statistics.histogram, 2 * once.histogram)
    # The same tokens twice have the same quantiles.
    for name, t in calibration.thresholds(0.5, "cats").items():
        assert torch.equal(t.threshold, doubled.thresholds(0.5, "cats")[name].threshold)


def test_addition_names_both_sources(calibration: Calibration) -> None:
    other = replace(calibration, provenance=replace(calibration.provenance, data="other"))
    assert (calibration + other).provenance.data == "in-memory data + other"


def test_addition_of_different_models(calibration: Calibration) -> None:
    sites = dict(calibration.sites)
    sites[SITE] = replace(sites[SITE], act="relu")
    with pytest.raises(CatsparseError, match="different models"):
        calibration + replace(calibration, sites=sites)


def with_sensitivities(calibration: Calibration) -> Calibration:
    losses = {n: torch.tensor([0.1, 0.3 + i]).double() for i, n in enumerate(calibration.sites)}
    table = Sensitivities("energy", True, calibration.preview, 64, (0.5, 0.9), losses)
    return replace(calibration, sensitivities=table)


def test_sensitivities_survive_the_file(calibration: Calibration, tmp_path: Path) -> None:
    measured = with_sensitivities(calibration)
    measured.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert_equal(loaded, measured)
    assert loaded.sensitivities is not None
    assert loaded.sensitivities.sparsities == (0.5, 0.9)
    assert allocate(loaded, 0.4) == allocate(measured, 0.4)
    calibration.save(tmp_path / "file")
    assert Calibration.load(tmp_path / "file").sensitivities is None


def test_a_sum_has_no_sensitivities(calibration: Calibration) -> None:
    assert (with_sensitivities(calibration) + with_sensitivities(calibration)).sensitivities is None


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(0),
        torch.zeros(2),
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([0.1, float("nan")], dtype=torch.float64),
        torch.tensor([-0.1, 0.1], dtype=torch.float64),
    ],
    ids=["missing", "float32", "longer", "nan", "negative"],
)
def test_damaged_sensitivities(calibration: Calibration, tmp_path: Path, value: Tensor) -> None:
    measured = with_sensitivities(calibration)
    path = written(tmp_path / "file", measured, {f"{SITE}.sensitivity": value}, {})
    assert "sensitivit" in refusal(path)


def test_damaged_header_of_sensitivities(calibration: Calibration, tmp_path: Path) -> None:
    measured = with_sensitivities(calibration)
    path = written(tmp_path / "file", measured, {}, {"catsparse.sensitivities": "[1]"})
    assert "sensitivities" in refusal(path)


def test_failed_save_leaves_the_old_file(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    calibration.save(path)

    def half(tensors: Any, temporary: Path, metadata: Any) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("catsparse.calibration.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        calibration.save(path)
    assert os.listdir(tmp_path) == ["file"]
    assert_equal(Calibration.load(path), calibration)


# Hostile files


def refusal(path: Path) -> str:
    with pytest.raises(CatsparseError) as caught:
        Calibration.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "calibrate again" in message
    return message


def written(path: Path, calibration: Calibration, tensors: Tensors, metadata: Metadata) -> Path:
    """The calibration with these entries in place of its own; an empty one is left out."""
    all_tensors = {k: v for k, v in (calibration.tensors() | tensors).items() if v.numel()}
    all_metadata = {k: v for k, v in (calibration.metadata() | metadata).items() if v}
    save_file({k: v.contiguous() for k, v in all_tensors.items()}, path, all_metadata)
    return path


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"no safetensors", b"\xff" * 100, b"\x80\x04N.", bytes(8) + b"{}"]
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert str(path) in refusal(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refusal(tmp_path / "none")
    refusal(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_truncated_file(calibration: Calibration, tmp_path: Path, share: float) -> None:
    path = tmp_path / "file"
    calibration.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


def test_safetensors_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"weight": torch.zeros(3)}, path)
    refusal(path)


FIELDS = ("histogram", "gate_square", "up_square", "bucket_count", "bucket_sum")


@pytest.mark.parametrize("field", FIELDS)
def test_missing_tensor(calibration: Calibration, tmp_path: Path, field: str) -> None:
    path = written(tmp_path / "file", calibration, {f"{SITE}.{field}": torch.empty(0)}, {})
    assert field in refusal(path)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v[..., :-1],
        lambda v: v[None],
        lambda v: torch.cat([v, v], -1),
        lambda v: v.to(torch.float16),
        lambda v: v.to(torch.int8),
        lambda v: v.bool(),
    ],
    ids=["shorter", "deeper", "longer", "float16", "int8", "bool"],
)
def test_wrong_shape_or_dtype(
    calibration: Calibration, tmp_path: Path, field: str, change: Callable[[Tensor], Tensor]
) -> None:
    name = f"{SITE}.{field}"
    path = written(tmp_path / "file", calibration, {name: change(calibration.tensors()[name])}, {})
    message = refusal(path)
    assert field in message
    assert SITE in message


def poked(value: Tensor, bad: float) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] = bad
    return value


@pytest.mark.parametrize("field", FIELDS[:4])
def test_negative_count(calibration: Calibration, tmp_path: Path, field: str) -> None:
    name = f"{SITE}.{field}"
    damaged = poked(calibration.tensors()[name], -1)
    assert SITE in refusal(written(tmp_path / "file", calibration, {name: damaged}, {}))


@pytest.mark.parametrize("field", ["gate_square", "up_square", "bucket_sum"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_number_that_is_not_finite(
    calibration: Calibration, tmp_path: Path, field: str, bad: float
) -> None:
    name = f"{SITE}.{field}"
    damaged = poked(calibration.tensors()[name], bad)
    assert SITE in refusal(written(tmp_path / "file", calibration, {name: damaged}, {}))


def test_negative_sum_of_products_is_fine(calibration: Calibration, tmp_path: Path) -> None:
    name = f"{SITE}.bucket_sum"
    changed = poked(calibration.tensors()[name], -1)
    Calibration.load(written(tmp_path / "file", calibration, {name: changed}, {}))


def test_histogram_that_counts_nothing(calibration: Calibration, tmp_path: Path) -> None:
    """Counts that contradict the number of tokens would give thresholds of no meaning."""
    empty = {f"{SITE}.histogram": torch.zeros(BINS, dtype=torch.int64)}
    refusal(written(tmp_path / "file", calibration, empty, {}))


@pytest.mark.parametrize("key", ["sites", "tokens", "provenance"])
@pytest.mark.parametrize(
    "value",
    ["", "{", "null", "3", "[3]", '{"a": 1}', '[{"name": "x"}]', "[" * 100_000],
    ids=["missing", "no json", "null", "number", "list", "other keys", "lacking", "deep"],
)
def test_damaged_metadata(calibration: Calibration, tmp_path: Path, key: str, value: str) -> None:
    path = written(tmp_path / "file", calibration, {}, {f"catsparse.{key}": value})
    assert len(refusal(path)) < 1000


@pytest.mark.parametrize("literal", ["0", "-5", "null", "[]", '"many"', "NaN", "Infinity", "1e999"])
def test_bad_number_of_tokens(calibration: Calibration, tmp_path: Path, literal: str) -> None:
    tokens = json.dumps(dict.fromkeys(calibration.sites, "HERE")).replace('"HERE"', literal)
    refusal(written(tmp_path / "file", calibration, {}, {"catsparse.tokens": tokens}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "model.layers.9.mlp"),
        ("name", 3),
        ("intermediate_size", 47),
        ("intermediate_size", -48),
        ("intermediate_size", "48"),
        ("intermediate_size", 10**30),
        ("hidden_size", "32"),
        ("extra", 1),
    ],
)
def test_damaged_site(calibration: Calibration, tmp_path: Path, key: str, value: Any) -> None:
    sites = json.loads(calibration.metadata()["catsparse.sites"])
    sites[0][key] = value
    refusal(written(tmp_path / "file", calibration, {}, {"catsparse.sites": json.dumps(sites)}))


@pytest.mark.parametrize(
    ("key", "value"), [("tokens", "many"), ("seq_len", None), ("data", 3), ("seed", [1])]
)
def test_damaged_provenance(calibration: Calibration, tmp_path: Path, key: str, value: Any) -> None:
    raw = json.loads(calibration.metadata()["catsparse.provenance"]) | {key: value}
    refusal(written(tmp_path / "file", calibration, {}, {"catsparse.provenance": json.dumps(raw)}))


def test_file_without_sites(calibration: Calibration, tmp_path: Path) -> None:
    refusal(written(tmp_path / "file", calibration, {}, {"catsparse.sites": "[]"}))


# Preview and products


@pytest.fixture(scope="module")
def with_products() -> Calibration:
    model, windows = tiny.build(tiny.llama_config()), tiny.tokens(8, 32, seed=7)
    return catsparse.calibrate(model, windows, preview=4, products_at=0.4, progress=False)


def test_round_trip_with_products(with_products: Calibration, tmp_path: Path) -> None:
    with_products.save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert_equal(loaded, with_products)
    assert loaded.preview == 4
    assert loaded.products_at == GateDecision(0.4, "energy")
    one, other = (c.thresholds(0.4, down_sparsity=0.6)[SITE] for c in (loaded, with_products))
    assert one.product is not None
    assert other.product is not None
    assert torch.equal(one.product, other.product)
    assert (one.product_scalar, one.down_sparsity) == (other.product_scalar, other.down_sparsity)


def test_any_down_sparsity_follows(with_products: Calibration) -> None:
    for down in (0.45, 0.6, 0.9):
        for t in with_products.thresholds(0.4, down_sparsity=down).values():
            assert t.sparsity == pytest.approx(0.4, abs=0.02)
            assert t.down_sparsity == pytest.approx(down, abs=0.01)
    for t in with_products.thresholds(0.7).values():  # without one, any sparsity still does
        assert (t.product, t.product_scalar, t.down_sparsity) == (None, None, None)


@pytest.mark.parametrize(("sparsity", "method"), [(0.5, "energy"), (0.4, "chess")])
def test_products_behind_another_decision(
    with_products: Calibration, sparsity: float, method: str
) -> None:
    with pytest.raises(CatsparseError, match=r"energy at 0\.4") as caught:
        with_products.thresholds(sparsity, method, down_sparsity=0.6)
    assert f"products_at={sparsity}, method={method!r}" in str(caught.value)


def test_no_products(calibration: Calibration) -> None:
    with pytest.raises(CatsparseError, match=r"has none.*products_at=0\.5, method='energy'"):
        calibration.thresholds(0.5, down_sparsity=0.6)


@pytest.mark.parametrize("down", [0.3, 1.0, float("nan")])
def test_down_sparsity_out_of_range(with_products: Calibration, down: float) -> None:
    with pytest.raises(CatsparseError, match="down_sparsity must be at least"):
        with_products.thresholds(0.4, down_sparsity=down)


def test_method_follows_from_what_was_calibrated(
    calibration: Calibration, with_products: Calibration
) -> None:
    assert calibration.default_method() == "energy"
    assert with_products.default_method() == "product"
    assert with_products.default_method(0.6) == "energy"  # product leaves nothing to decide
    by_default = with_products.thresholds(0.4)
    for method in (*GATE_METHODS, PRODUCT):
        for name, t in with_products.thresholds(0.4, method).items():
            assert torch.equal(by_default[name].threshold, t.threshold) == (method == "product")
            assert t.sparsity == pytest.approx(0.4, abs=0.02)


def test_thresholds_of_product_are_those_of_its_statistics(with_products: Calibration) -> None:
    for compensate in (False, True):
        for name, t in with_products.thresholds(0.3, "product", compensate).items():
            expected = product_threshold(with_products.foretold[name], 0.3, compensate)
            assert torch.equal(t.threshold, expected.threshold)
            assert (t.mean is None) == (not compensate)


def test_method_product_without_a_preview(calibration: Calibration) -> None:
    with pytest.raises(CatsparseError, match="calibrate with preview=4"):
        calibration.thresholds(0.5, "product")


def test_method_product_takes_no_second_decision(with_products: Calibration) -> None:
    with pytest.raises(CatsparseError, match="takes no down_sparsity"):
        with_products.thresholds(0.4, "product", down_sparsity=0.6)


def older(with_products: Calibration) -> Calibration:
    """As it was before there was method product."""
    return replace(with_products, foretold={})


def test_file_older_than_method_product(with_products: Calibration, tmp_path: Path) -> None:
    older(with_products).save(tmp_path / "file")
    loaded = Calibration.load(tmp_path / "file")
    assert (loaded.preview, loaded.foretold) == (4, {})
    assert loaded.default_method() == "energy"
    one, other = (c.thresholds(0.4, "energy")[SITE] for c in (loaded, with_products))
    assert torch.equal(one.threshold, other.threshold)
    with pytest.raises(CatsparseError, match="calibrate again with preview=4"):
        loaded.thresholds(0.4, "product")
    with pytest.raises(CatsparseError, match="calibrate one of them again"):
        with_products + loaded


@pytest.mark.parametrize("value", ["{", "1", "null", '"true"', "[true]"])
def test_damaged_word_on_products_foretold(
    with_products: Calibration, tmp_path: Path, value: str
) -> None:
    path = written(tmp_path / "file", with_products, {}, {"catsparse.foretold": value})
    assert len(refusal(path)) < 1000


def test_products_foretold_by_no_preview(with_products: Calibration, tmp_path: Path) -> None:
    refusal(written(tmp_path / "file", replace(with_products, preview=None), {}, {}))


def test_addition_with_products(with_products: Calibration) -> None:
    doubled = with_products + with_products
    assert (doubled.preview, doubled.products_at) == (4, GateDecision(0.4, "energy"))
    once = with_products.thresholds(0.4, down_sparsity=0.6)
    first = with_products.thresholds(0.5, "product")[SITE]
    twice = doubled.thresholds(0.5, "product")[SITE]
    assert torch.equal(first.threshold, twice.threshold)
    assert torch.equal(doubled.foretold[SITE].histogram, 2 * with_products.foretold[SITE].histogram)
    for name, t in doubled.thresholds(0.4, down_sparsity=0.6).items():
        assert t.product is not None
        assert once[name].product is not None
        assert torch.equal(t.product, once[name].product)
        assert t.down_sparsity == once[name].down_sparsity


@pytest.mark.parametrize(
    "change",
    [{"preview": None}, {"preview": 8}, {"products_at": GateDecision(0.5, "energy")}],
    ids=str,
)
def test_addition_of_different_decisions(
    with_products: Calibration, change: dict[str, Any]
) -> None:
    with pytest.raises(CatsparseError, match="calibrate one of them again"):
        with_products + replace(with_products, **change)


PRODUCT_FIELDS = (
    *("product_histogram", "product_bucket_count", "product_bucket_sum", "down_norm"),
    *("foretold_histogram", "foretold_bucket_count", "foretold_bucket_sum"),
)


@pytest.mark.parametrize("field", PRODUCT_FIELDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda v: torch.empty(0),
        lambda v: v[..., :-1],
        lambda v: v.to(torch.float16),
        lambda v: v[None],
    ],
    ids=["missing", "shorter", "float16", "deeper"],
)
def test_damaged_products(
    with_products: Calibration, tmp_path: Path, field: str, change: Callable[[Tensor], Tensor]
) -> None:
    name = f"{SITE}.{field}"
    damaged = {name: change(with_products.tensors()[name])}
    assert field in refusal(written(tmp_path / "file", with_products, damaged, {}))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("product_histogram", -1),
        ("product_histogram", 1),  # the last bin: more than the neurons' counts
        ("product_bucket_count", -1),
        ("product_bucket_count", 10**6),  # more than the tokens
        ("product_bucket_sum", torch.inf),
        ("foretold_histogram", -1),
        ("foretold_histogram", 1),
        ("foretold_bucket_count", -1),
        ("foretold_bucket_sum", torch.nan),
        ("down_norm", -1.0),
        ("down_norm", torch.nan),
    ],
)
def test_products_that_contradict_each_other(
    with_products: Calibration, tmp_path: Path, field: str, bad: float
) -> None:
    name = f"{SITE}.{field}"
    damaged = poked(with_products.tensors()[name], bad)
    assert SITE in refusal(written(tmp_path / "file", with_products, {name: damaged}, {}))


def test_neuron_that_missed_a_token(with_products: Calibration, tmp_path: Path) -> None:
    """Behind a gate it may; but what is foretold is counted of all tokens."""
    tensors = with_products.tensors()
    for kind in ("foretold", "product"):
        histogram, counts = (
            tensors[f"{SITE}.{kind}_{field}"].clone() for field in ("histogram", "bucket_count")
        )
        counts[int(counts[:, 0].argmax()), 0] -= 1
        histogram[int(histogram.argmax())] -= 1
        damaged = {f"{SITE}.{kind}_histogram": histogram, f"{SITE}.{kind}_bucket_count": counts}
        path = written(tmp_path / "file", with_products, damaged, {})
        if kind == "foretold":
            assert SITE in refusal(path)
        else:
            Calibration.load(path)


@pytest.mark.parametrize("key", ["preview", "products_at"])
@pytest.mark.parametrize(
    "value",
    [
        *("{", "3", "true", "4.0", '"4"', "[4]", '{"sparsity": 2.0, "method": "energy"}'),
        *('{"sparsity": 0.4, "method": "magic"}', '{"sparsity": 0.4}', "[" * 100_000),
    ],
    ids=range(10),
)
def test_damaged_decision(with_products: Calibration, tmp_path: Path, key: str, value: str) -> None:
    path = written(tmp_path / "file", with_products, {}, {f"catsparse.{key}": value})
    assert len(refusal(path)) < 1000
