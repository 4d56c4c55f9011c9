"""catsparse.json: strict, versioned, and never half written."""

from __future__ import annotations

import copy
import json
import math
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from catsparse import config as module
from catsparse.config import (
    ACTIVATIONS,
    FORMAT_VERSION,
    GATE_METHODS,
    PREFILL_POLICIES,
    PREVIEW_BITS,
    BaseModel,
    Provenance,
    SiteConfig,
    SparsityConfig,
)
from catsparse.errors import CatsparseError
from catsparse.files import write_atomic
from catsparse.kernels import make_preview
from catsparse.kernels.preview import BITS

SITE = "model.layers.0.mlp"


def example(**changes: Any) -> SparsityConfig:
    values: dict[str, Any] = {
        "sites": {
            SITE: SiteConfig(0.125, 0.5, "silu", 32, 48),
            "model.layers.1.mlp": SiteConfig(-1.0, 0.0, "gelu_tanh", 32, 96),
        },
        "method": "chess",
        "compensate": True,
        "sparsity": 0.5,
        "measured_sparsity": 0.498,
        "prefill": "dense",
        "base_model": BaseModel("some/model", "llama", "abc"),
        "calibration": Provenance("books", 1000, 32, 0, "float32"),
        "catsparse_version": "0.1",
    }
    return SparsityConfig(**(values | changes))


def payload() -> dict[str, Any]:
    return json.loads(example().to_json())


def edited(path: str, value: Any) -> str:
    """The example's JSON with ``a/b/c`` set to ``value``."""
    raw = payload()
    *parents, last = path.split("/")
    part = raw
    for key in parents:
        part = part[key]
    part[last] = value
    return json.dumps(raw)


def refusal(text: str) -> str:
    """The message with which ``text`` is refused: one line."""
    with pytest.raises(CatsparseError) as caught:
        SparsityConfig.from_json(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip() -> None:
    assert SparsityConfig.from_json(example().to_json()) == example()


def test_round_trip_of_the_least_config() -> None:
    least = SparsityConfig(sites={SITE: SiteConfig(0.1, 0.5, "relu", 1, 1)})
    read = SparsityConfig.from_json(least.to_json())
    assert read == least
    assert read.base_model is None
    assert read.calibration is None
    assert read.format_version == FORMAT_VERSION


def decided_twice(**changes: Any) -> SparsityConfig:
    """With a preview and a second decision."""
    sites = {
        SITE: SiteConfig(0.125, 0.5, "silu", 320, 896, 0.75, 0.65),
        "model.layers.1.mlp": SiteConfig(-1.0, 0.0, "silu", 320, 896, -1.0, 0.0),
    }
    values: dict[str, Any] = {"sites": sites, "preview": 4, "down_sparsity": 0.65}
    return example(**(values | {"measured_down_sparsity": 0.64} | changes))


def test_round_trip_with_preview_and_second_decision() -> None:
    config = decided_twice()
    assert SparsityConfig.from_json(config.to_json()) == config
    assert config.described == "chess, compensated, 4-bit gate preview, 65% of the down rows unread"
    assert example().described == "chess, compensated"


def of_products(**changes: Any) -> SparsityConfig:
    return example(**({"method": "product", "preview": 4} | changes))


def test_round_trip_of_method_product() -> None:
    config = of_products()
    assert SparsityConfig.from_json(config.to_json()) == config
    assert config.described == "product, compensated, 4-bit product preview"
    assert (config.decided_on, decided_twice().decided_on) == ("product", "gate")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"preview": None},
            r"preview=4 \(--preview 4\), or take one of cats, chess",
        ),
        ({"down_sparsity": 0.65}, "takes no down_sparsity; leave that out, or take one of cats"),
    ],
)
def test_method_product_needs_a_preview_and_nothing_else(
    changes: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(CatsparseError, match=remedy):
        of_products(**changes)


NEW = ("preview", "down_sparsity", "measured_down_sparsity", "inputs", "scope")
NEW_IN_3 = NEW[-2:]
NEW_IN_SITES = ("product_threshold", "down_sparsity")


def version_1() -> dict[str, Any]:
    """The example as the first version wrote it."""
    raw = payload() | {"format_version": 1}
    for key in NEW:
        del raw[key]
    for site in raw["sites"].values():
        for key in NEW_IN_SITES:
            del site[key]
    del raw["calibration"]["weights"]
    return raw


def test_version_1_is_read() -> None:
    assert SparsityConfig.from_json(json.dumps(version_1())) == example()


def test_version_2_is_read() -> None:
    raw = {k: v for k, v in payload().items() if k not in NEW_IN_3} | {"format_version": 2}
    del raw["calibration"]["weights"]
    assert SparsityConfig.from_json(json.dumps(raw)) == example()
    assert "unknown keys ('scope') for format version 2" in refusal(
        json.dumps(raw | {"scope": "mlp"})
    )


def test_version_3_is_read() -> None:
    raw = payload() | {"format_version": 3}
    with_key = json.dumps(raw)
    del raw["calibration"]["weights"]
    assert SparsityConfig.from_json(json.dumps(raw)) == example()
    assert "unknown keys ('weights') for format version 3" in refusal(with_key)


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
def test_packed_weights_are_said(weights: str) -> None:
    config = example(calibration=Provenance("books", 1000, 32, 0, "float32", weights))
    assert SparsityConfig.from_json(config.to_json()) == config
    assert config.weight_format == weights
    assert f"{weights} weights" in config.described
    assert example().weight_format is None
    assert "weights must be one of" in refusal(edited("calibration/weights", "int3"))


@pytest.mark.parametrize("key", NEW)
def test_version_1_has_no_new_keys(key: str) -> None:
    assert key in refusal(json.dumps(version_1() | {key: None}))
    assert f"lacks {key}" in refusal(json.dumps({k: v for k, v in payload().items() if k != key}))


@pytest.mark.parametrize("key", NEW_IN_SITES)
def test_sites_of_version_1_have_no_new_keys(key: str) -> None:
    raw = version_1()
    raw["sites"][SITE][key] = None
    assert key in refusal(json.dumps(raw))


def test_version_1_is_as_strict() -> None:
    raw = version_1()
    assert "unknown keys ('more')" in refusal(json.dumps(raw | {"more": 1}))
    assert "lacks method" in refusal(json.dumps({k: v for k, v in raw.items() if k != "method"}))
    for sites in ([], None, {SITE: 3}):
        refusal(json.dumps(raw | {"sites": sites}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preview": 5}, "preview must be 4 or 8"),
        ({"preview": True}, "preview must be 4 or 8"),
        ({"down_sparsity": 0.4}, "down_sparsity must be at least"),
        ({"down_sparsity": 1.0}, "down_sparsity must be at least"),
        ({"down_sparsity": None}, "product_threshold"),
        ({"measured_down_sparsity": 1.5}, "between 0 and 1"),
        ({"site": {"product_threshold": None}}, "product_threshold"),
        ({"site": {"down_sparsity": None}}, "down_sparsity"),
        ({"site": {"down_sparsity": 0.4}}, "between its sparsity"),
        ({"site": {"down_sparsity": 1.5}}, "between its sparsity"),
        ({"site": {"product_threshold": math.inf}}, "finite"),
        ({"site": {"product_threshold": math.nan}}, "finite"),
    ],
    ids=str,
)
def test_new_fields_out_of_range(changes: dict[str, Any], says: str) -> None:
    if "site" in changes:
        sites = decided_twice().sites
        changes = {"sites": sites | {SITE: replace(sites[SITE], **changes["site"])}}
    with pytest.raises(CatsparseError, match=says) as caught:
        decided_twice(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ['"4"', "4.0", "true", "[4]", "0", "NaN"])
def test_preview_of_a_wrong_type(value: str) -> None:
    refusal(edited("preview", "HERE").replace('"HERE"', value))


share = st.floats(0, 1)
names = st.text(min_size=1, max_size=20)
site_configs = st.builds(
    SiteConfig,
    threshold=st.floats(allow_nan=False, allow_infinity=False),
    sparsity=share,
    act=st.sampled_from(ACTIVATIONS),
    hidden_size=st.integers(1, 2**20),
    intermediate_size=st.integers(1, 2**20),
)


@given(
    st.builds(
        SparsityConfig,
        sites=st.dictionaries(names, site_configs, min_size=1, max_size=3),
        method=st.sampled_from(GATE_METHODS),
        compensate=st.booleans(),
        sparsity=st.floats(0, 1, exclude_max=True),
        measured_sparsity=st.none() | share,
        prefill=st.sampled_from(PREFILL_POLICIES),
        base_model=st.none() | st.builds(BaseModel, names, names, st.none() | names),
        calibration=st.none()
        | st.builds(Provenance, names, st.integers(0), st.integers(0), st.integers(), names),
        catsparse_version=names,
    )
)
def test_any_config_round_trips_exactly(config: SparsityConfig) -> None:
    assert SparsityConfig.from_json(config.to_json()) == config
    assert 0 <= config.bytes_skipped <= 2 / 3


def test_bytes_skipped_weighs_sites_by_size() -> None:
    # 2/3 s of each site's bytes: s = 0.5 of 32 x 48 and 0 of 32 x 96.
    assert example().bytes_skipped == pytest.approx(2 / 3 * 0.5 * 48 / (48 + 96), rel=1e-12)


@pytest.mark.parametrize("bits", PREVIEW_BITS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
@pytest.mark.parametrize("hidden", [32, 320, 4096])
def test_bytes_of_a_preview_are_counted(bits: int, dtype: str, itemsize: int, hidden: int) -> None:
    assert PREVIEW_BITS == BITS
    packed, scale = make_preview(torch.randn(3, hidden), bits)
    read = (packed.nbytes + scale.nbytes) / (3 * 3 * hidden * itemsize)
    site = SiteConfig(0.1, 0.5, "silu", hidden, 48, 0.2, 0.65)
    provenance = Provenance("books", 1, 1, 0, dtype)
    both = decided_twice(sites={SITE: site}, preview=bits, calibration=provenance)
    assert both.bytes_skipped == pytest.approx((0.5 + 0.5 + 0.65) / 3 - read, abs=1e-12)
    one = replace(site, product_threshold=None, down_sparsity=None)
    alone = {"sites": {SITE: one}, "calibration": provenance}
    assert example(**alone, preview=bits).bytes_skipped == pytest.approx(0.5 - read, abs=1e-12)
    assert example(**alone).bytes_skipped == pytest.approx(1 / 3)
    both_read = 2 * read  # of products: W_gate and W_up
    products = of_products(**alone, preview=bits).bytes_skipped
    assert products == pytest.approx(0.5 - both_read, abs=1e-12)
    second = decided_twice(sites={SITE: site}, preview=None, calibration=None)
    assert second.bytes_skipped == pytest.approx((0.5 + 0.65) / 3)


@pytest.mark.parametrize(
    "path", ["more", f"sites/{SITE}/more", "base_model/more", "calibration/more"]
)
def test_unknown_key_is_refused_at_every_level(path: str) -> None:
    assert "unknown keys ('more')" in refusal(edited(path, 1))


def test_many_unknown_keys_are_shown_in_part() -> None:
    raw = payload() | {f"{'k' * 500}{i}": 0 for i in range(1000)}
    message = refusal(json.dumps(raw))
    assert "..." in message
    assert len(message) < 300


@pytest.mark.parametrize("level", ["", f"sites/{SITE}", "base_model", "calibration"])
def test_every_missing_key_is_named(level: str) -> None:
    raw = payload()
    keys = list(raw["sites"][SITE] if "sites" in level else raw[level] if level else raw)
    for key in keys:
        changed = copy.deepcopy(raw)
        part = changed
        for step in level.split("/") if level else []:
            part = part[step]
        del part[key]
        message = refusal(json.dumps(changed))
        assert ("format_version" if key == "format_version" else f"lacks {key}") in message


def test_newer_version_says_what_to_upgrade() -> None:
    # Before anything else is looked at: a newer format may have other keys.
    message = refusal(json.dumps({"format_version": FORMAT_VERSION + 1, "other": 1}))
    assert "pip install -U catsparse" in message


@pytest.mark.parametrize("version", [None, "1", 1.0, True, 0, -1, [1]])
def test_bad_version_is_refused(version: Any) -> None:
    assert "format_version" in refusal(edited("format_version", version))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("method", 1),
        ("method", None),
        ("compensate", 1),
        ("compensate", "true"),
        ("sparsity", "0.5"),
        ("sparsity", None),
        ("sparsity", True),
        ("measured_sparsity", "x"),
        ("measured_sparsity", False),
        ("prefill", []),
        ("catsparse_version", 1),
        ("sites", []),
        ("sites", None),
        (f"sites/{SITE}", []),
        (f"sites/{SITE}", None),
        (f"sites/{SITE}/threshold", "0"),
        (f"sites/{SITE}/threshold", None),
        (f"sites/{SITE}/threshold", True),
        (f"sites/{SITE}/threshold", [0.1]),
        (f"sites/{SITE}/sparsity", True),
        (f"sites/{SITE}/act", None),
        (f"sites/{SITE}/hidden_size", 32.0),
        (f"sites/{SITE}/hidden_size", True),
        (f"sites/{SITE}/intermediate_size", "48"),
        ("base_model", "llama"),
        ("base_model/name_or_path", None),
        ("base_model/revision", 3),
        ("calibration", []),
        ("calibration/tokens", 1.5),
        ("calibration/tokens", True),
        ("calibration/seed", None),
        ("calibration/dtype", 16),
    ],
)
def test_wrong_type_is_refused(path: str, value: Any) -> None:
    assert path.split("/")[-1].replace(SITE, "mlp") in refusal(edited(path, value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("method", "magic", "cats, chess"),
        ("method", "teal", "do not go with method teal"),
        ("scope", "all", "do not go with method"),
        ("scope", "some", "mlp, all"),
        ("prefill", "none", "masked, dense"),
        ("sparsity", 1.0, "below 1"),
        ("sparsity", -0.1, "at least 0"),
        ("sites", {}, "no site"),
        (f"sites/{SITE}/act", "swish", "silu"),
        (f"sites/{SITE}/sparsity", 1.5, "between 0 and 1"),
        (f"sites/{SITE}/sparsity", -0.5, "between 0 and 1"),
        (f"sites/{SITE}/hidden_size", 0, "at least 1"),
        (f"sites/{SITE}/intermediate_size", -4, "at least 1"),
    ],
)
def test_value_out_of_range_is_refused(path: str, value: Any, says: str) -> None:
    assert says in refusal(edited(path, value))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize("key", ["threshold", "sparsity", "measured_sparsity"])
def test_number_that_is_not_finite_is_refused(literal: str, key: str) -> None:
    at = f"sites/{SITE}/threshold" if key == "threshold" else key
    refusal(edited(at, "HERE").replace('"HERE"', literal))


def test_measured_sparsity_out_of_range_is_refused() -> None:
    refusal(edited("measured_sparsity", 5.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dataclass_refuses_what_json_cannot_hold(value: float) -> None:
    with pytest.raises(CatsparseError):
        example(sites={SITE: SiteConfig(value, 0.5, "silu", 32, 48)})
    with pytest.raises(CatsparseError):
        example(sparsity=value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"catsparse"',
        "{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format_version": 1, "sites": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format_version": ' + "1" * 10_000 + "}",
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_no_config_is_refused(text: str) -> None:
    assert len(refusal(text)) < 400


def test_long_value_is_not_echoed() -> None:
    assert len(refusal(edited("sparsity", "x" * 100_000))) < 200


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "catsparse.json"
    path.write_text(example().to_json(), encoding="utf-8")
    assert SparsityConfig.from_file(path) == example()


def test_from_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "catsparse.json"
    path.write_text("{}")
    with pytest.raises(CatsparseError, match=str(path)):
        SparsityConfig.from_file(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CatsparseError, match="No such file"):
        SparsityConfig.from_file(tmp_path / "none.json")
    with pytest.raises(CatsparseError, match="cannot read"):
        SparsityConfig.from_file(tmp_path)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "catsparse.json"
    path.write_bytes(b'{"format_version": "\xff\xfe"}')
    with pytest.raises(CatsparseError, match="UTF-8"):
        SparsityConfig.from_file(path)


def test_oversized_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "catsparse.json"
    with path.open("wb") as file:
        file.truncate(module.MAX_CONFIG_BYTES + 1)  # sparse: takes no disk
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CatsparseError, match="not one of ours"):
        SparsityConfig.from_file(path)


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for text in ("first", "second"):
        write_atomic(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        assert temporary.parent == tmp_path  # a rename must not cross file systems
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_shows_the_reader_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomic(path, write)
    assert path.read_text() == "new"


def test_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.write_text("")
    write_atomic(tmp_path / "file", lambda temporary: temporary.write_text(""))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
