"""Packed weights in a comparison: what packing by hand gives, and the model its own afterwards."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import catsparse
from catsparse import CatsparseError, compare, quantize_weights
from catsparse.compare import DENSE, CompareRow, Text, make_settings, read_rows
from catsparse.compare.traffic import Traffic
from catsparse.config import INPUT_METHODS
from catsparse.evaluate import evaluate, perplexity
from catsparse.quantized import quantized
from catsparse.quantized_linear import QuantizedLinear
from catsparse.surgery import sparse_layers
from catsparse.tasks import evaluate_tasks, prepare_tasks
from command import run
from letters import Letters
from tiny import SMALL, build, llama_config, tokens

TRAIN = Text("train", tokens(8, 32, seed=7))
HELDOUT = Text("heldout", tokens(4, 32, seed=11))
WEIGHTS = ("int8", "fp8", "int4")
SETTINGS = make_settings(["energy", "product"], [True], bytes_skipped=[0.3], weights=WEIGHTS)


def make(tied: bool = False) -> Any:
    wide = SMALL | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    return build(llama_config(**wide, tie_word_embeddings=tied))


def compared(model: Any, settings: Any = SETTINGS, **options: Any) -> compare.Comparison:
    return compare.compare(model, TRAIN, [HELDOUT], settings, progress=False, **options)


@pytest.fixture(scope="module")
def rows() -> list[CompareRow]:
    return compared(make()).rows


def of(rows: list[CompareRow], weights: str, method: str) -> CompareRow:
    (row,) = [row for row in rows if (row.weights, row.method) == (weights, method)]
    return row


def test_settings_leave_out_what_packed_weights_do_not_run() -> None:
    settings = make_settings(bytes_skipped=[0.3], weights=["int8", "int4", "int8"])
    kinds = {w: [s for s in settings if s.weights == w] for w in (None, "int8", "int4")}
    assert sum(map(len, kinds.values())) == len(settings) == len(set(settings))
    assert all(of[0].method == DENSE and of[0].bytes_skipped == 0 for of in kinds.values())
    own = {s.method for s in kinds[None]}
    assert {s.method for s in kinds["int8"]} == own - set(INPUT_METHODS)
    assert {s.method for s in kinds["int4"]} == own - set(INPUT_METHODS) - {"product"}
    assert not any(s.method == DENSE for s in make_settings())


@pytest.mark.parametrize(
    ("options", "word"), [({"weights": ["int3"]}, "weights"), ({"scope": "all"}, "scope mlp")]
)
def test_settings_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CatsparseError, match=word):
        make_settings(**({"weights": ["int8"]} | options))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_are_what_packing_by_hand_gives(rows: list[CompareRow], weights: str) -> None:
    model = make()
    dense = perplexity(model, HELDOUT.windows, progress=False)
    quantize_weights(model, weights)
    alone = perplexity(model, HELDOUT.windows, progress=False)
    row = of(rows, weights, DENSE)
    assert row.perplexity == pytest.approx(alone.value, rel=1e-6)
    assert row.rise == pytest.approx(alone.value / dense.value - 1, abs=1e-6)
    assert (row.sparsity, row.bytes_skipped, row.target) == (0, 0, 0)
    assert row.rise_se is not None
    assert row.rise_se > 0
    for method in ("energy",) if weights == "int4" else ("energy", "product"):
        preview = 4 if method == "product" else None
        calibration = catsparse.calibrate(model, TRAIN.windows, preview=preview, progress=False)
        catsparse.sparsify(model, calibration, None, method, bytes_skipped=0.3)
        e = evaluate(model, HELDOUT.windows, progress=False, dense=dense)
        catsparse.densify(model)
        row = of(rows, weights, method)
        assert row.rise == pytest.approx(e.rise, abs=1e-5)
        assert row.bytes_skipped == pytest.approx(e.bytes_skipped, abs=1e-6)
        assert row.dense_perplexity == pytest.approx(dense.value, rel=1e-6)


def test_bytes_read_are_counted_by_hand(rows: list[CompareRow]) -> None:
    """A block: q and o 64 x 64, k and v 64 x 32, three MLP matrices 64 x 192; then the head."""
    layers, vocabulary = SMALL["num_hidden_layers"], SMALL["vocab_size"]
    kv = 16 * SMALL["num_key_value_heads"]
    mlps = layers * 3 * 64 * 192
    elements = layers * (2 * 64 * 64 + 2 * 64 * kv) + mlps + vocabulary * 64
    for row in rows:
        each = {"fp32": 4, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 64}[str(row.weights)]
        assert row.bytes_read == pytest.approx(each * (elements - row.bytes_skipped * mlps))
    traffic = Traffic.of(make())
    assert traffic is not None
    assert traffic.read(0.5, "all") == 4 * (elements - 0.5 * (elements - vocabulary * 64))


def test_the_models_own_weights_are_the_reference(rows: list[CompareRow]) -> None:
    row = of(rows, "fp32", DENSE)
    assert (row.rise, row.rise_se) == (0, 0)
    # Settings of before there were formats keep their keys.
    plain = compared(make(), make_settings(["energy"], [True], bytes_skipped=[0.3])).rows[0]
    assert plain.key == of(rows, "fp32", "energy").key
    assert len({row.key for row in rows}) == len(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_its_own_again(
    tied: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(tied)
    before, layers = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    if fails:
        monkeypatch.setattr(compare, "evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compared(model, [s for s in SETTINGS if s.weights])
    else:
        compared(model)
    assert not sparse_layers(model)
    assert dict(model.named_modules()) == layers
    assert model.config.tie_word_embeddings is tied
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inside_it_is_packed_and_what_is_refused_changes_nothing() -> None:
    model = make()
    with quantized(model, "int8"):
        assert isinstance(model.lm_head, QuantizedLinear)
    with quantized(model, None):
        assert not isinstance(model.lm_head, QuantizedLinear)
    layers = dict(model.named_modules())
    with pytest.raises(CatsparseError, match="int3"), quantized(model, "int3"):
        pass
    assert dict(model.named_modules()) == layers
    quantize_weights(model, "int8")
    with pytest.raises(CatsparseError, match="packed in int8 already"):
        compared(model)


def test_an_interrupted_run_goes_on_in_the_middle_of_a_format(
    rows: list[CompareRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(evaluate(*args, **options))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(compare, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(make(), output=tmp_path)
    assert compared(make(), output=tmp_path).rows == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.jsonl"]


def test_rows_of_before_there_were_formats_are_read(rows: list[CompareRow], tmp_path: Path) -> None:
    path = tmp_path / "compare.jsonl"
    raw = asdict(rows[1])
    del raw["weights"], raw["bytes_read"]
    path.write_text(json.dumps(raw) + "\n")
    assert read_rows(path) == [replace(rows[1], bytes_read=None)]
    plain = make_settings(["energy"], [True], bytes_skipped=[0.3])
    assert compared(make(), plain, output=tmp_path).rows == [rows[1]]  # not run again, but counted
    path.write_text(json.dumps(raw | {"weight": "int8"}) + "\n")
    with pytest.raises(CatsparseError, match="line 1"):
        read_rows(path)


def test_tasks_are_scored_on_each_format(tmp_path: Path) -> None:
    words = [{"task": "t", "good": a * 3, "bad": b * 3} for a in "abcdef" for b in "ghi"]
    (tmp_path / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    model = make()

    def score(**options: Any) -> list[Any]:
        prepared = prepare_tasks(model, Letters(), "blimp", folder=tmp_path)
        settings = make_settings(["cats"], [True], bytes_skipped=[0.3], weights=["int4"])
        return compared(model, settings, tasks=prepared, **options).tasks

    first, own, sparse, packed, both = score(output=tmp_path / "out")
    kinds = [(r.variant, r.weights, r.method) for r in (first, own, sparse, packed, both)]
    assert kinds == [
        ("dense", "fp32", None),
        ("packed", "fp32", DENSE),
        ("sparse", "fp32", "cats"),
        ("packed", "int4", DENSE),
        ("sparse", "int4", "cats"),
    ]
    assert (own.difference, own.value) == (0, first.value)
    quantize_weights(model, "int4")
    (alone,) = evaluate_tasks(model, Letters(), "blimp", folder=tmp_path, progress=False)
    assert packed.value == alone.value
    assert packed.difference == pytest.approx(alone.value - first.value)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "energy", "--compensate", "--bytes-skipped", "0.3", "--tokens", "512"]
    options += ["--test-tokens", "256", "--seq-len", "64", "-o", str(tmp_path), "--weights", "int8"]
    code, text, error = run(capsys, "compare", "default", *options, "--plot")
    assert code == 0, error
    assert all(word in text for word in ("int8", "MB", "dense"))
    assert (tmp_path / "compare.svg").stat().st_size
    code, text, _ = run(capsys, "compare", "default", *options, "--json")
    assert {(r["weights"], r["method"]) for r in json.loads(text)["rows"]} == {
        (w, m) for w in ("bf16", "int8") for m in (DENSE, "energy")
    }
    code, _, error = run(capsys, "compare", "default", *options[:-1], "int8,magic")
    assert code == 2
    assert "magic" in error
