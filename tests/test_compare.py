"""Comparison of methods: complete rows, equal to what the steps give by hand, run only once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import catsparse
from catsparse import CatsparseError, compare
from catsparse.compare import CompareRow, Setting, Text, best_rows, make_settings, read_rows
from catsparse.config import INPUT_METHODS, PRODUCT
from catsparse.evaluate import evaluate
from catsparse.surgery import sparse_layers
from test_cli import run
from tiny import build, llama_config, tokens

TRAIN = Text("train", tokens(8, 32, seed=7))
HELDOUT = Text("heldout", tokens(4, 32, seed=11))
DRIFT = Text("drift", tokens(3, 24, seed=12))
BUDGETS = (0.3, 0.5)
ONE = make_settings(["energy"], [True], bytes_skipped=[0.3])


def compared(model: Any, settings: list[Setting] | None = None, **options: Any) -> list[CompareRow]:
    chosen = make_settings(bytes_skipped=BUDGETS) if settings is None else settings
    heldout = options.pop("heldout", [HELDOUT])
    train = options.pop("train", TRAIN)
    return compare.compare(model, train, heldout, chosen, progress=False, **options).rows


@pytest.fixture(scope="module")
def rows() -> list[CompareRow]:
    """All methods, with means and without, on two texts."""
    return compared(build(llama_config()), heldout=[HELDOUT, DRIFT])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each step is taken."""
    counts = dict.fromkeys(("calibrate", "perplexity", "evaluate", "measure_sensitivities"), 0)

    def counted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return step(*args, **options)

        return wrapper

    for name in counts:
        monkeypatch.setattr(compare, name, counted(name, getattr(compare, name)))
    return counts


# -- settings


def test_settings_are_every_combination_once() -> None:
    settings = make_settings(["cats", "product", "cats"], bytes_skipped=[0.3, 0.5, 0.3])
    assert len(settings) == len(set(settings)) == 2 * 2 * 2
    assert {(s.method, s.preview) for s in settings} == {("cats", None), ("product", 4)}
    assert make_settings(["product"], [True], ["greedy"], [0.4], 8) == [
        Setting("product", True, 8, "greedy", 0.4)
    ]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"methods": ["magic"]}, "method"),
        ({"allocations": ["magic"]}, "allocation"),
        ({"preview": 5}, "preview"),
        ({"methods": []}, "nothing to compare"),
        ({"bytes_skipped": []}, "nothing to compare"),
    ],
)
def test_settings_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CatsparseError, match=word):
        make_settings(**options)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            Setting("cats", True, None, "uniform", 0.7),
            "method cats: bytes_skipped is 0.7; with the exact gate",
        ),
        (Setting("product", True, 4, "uniform", 0.8), "method product: .*4-bit preview"),
        (Setting("energy", True, None, "optimal", 0.66), "method energy, optimal: "),
        (Setting("energy", True, None, "uniform", -0.1), "method energy: "),
        (Setting("energy", True, None, "uniform", float("nan")), "method energy: "),
    ],
)
def test_unreachable_budgets_are_refused_before_any_work(
    llama: Any, setting: Setting, words: str, calls: dict[str, int]
) -> None:
    with pytest.raises(CatsparseError, match=words):
        compared(llama, [*ONE, setting])
    assert not any(calls.values())


# -- rows


def test_a_row_for_each_setting_and_text(rows: list[CompareRow]) -> None:
    settings = make_settings(bytes_skipped=BUDGETS)
    assert [
        (Setting(r.method, r.compensate, r.preview, r.allocation, r.target, r.scope), r.heldout)
        for r in rows
    ] == [(s, name) for s in settings for name in ("heldout", "drift")]
    assert len({row.key for row in rows}) == len(rows) == 6 * 2 * 2 * 2
    for row in rows:
        assert row.prefill == "masked"
        assert (row.model, row.dtype, row.device) == ("LlamaForCausalLM", "float32", "cpu")
        assert (row.calibration, row.calibration_tokens) == ("train", 8 * 32)
        expected = (4 * 31, 32) if row.heldout == "heldout" else (3 * 23, 24)
        assert (row.tokens, row.seq_len) == expected
        assert row.rise == pytest.approx(row.perplexity / row.dense_perplexity - 1)
        assert row.rise_se is not None
        assert row.rise_se > 0
        assert {"catsparse", "torch", "transformers"} <= set(row.versions)


def test_budgets_are_met(rows: list[CompareRow]) -> None:
    """Within what another text and the sparse model's own activations move."""
    for row in rows:
        assert row.bytes_skipped == pytest.approx(row.target, abs=0.06)
        read = 2 * 48 / (32 * 4) / 3 if row.method == "product" else 0.0
        rate = 1.0 if row.method in (PRODUCT, *INPUT_METHODS) else 2 / 3
        assert row.bytes_skipped == pytest.approx(rate * row.sparsity - read, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "preview"), [("cats", None), ("energy", None), ("product", 4), ("teal", None)]
)
@pytest.mark.parametrize("compensate", [False, True])
def test_rows_are_what_the_steps_give_by_hand(
    rows: list[CompareRow], llama: Any, method: str, preview: int | None, compensate: bool
) -> None:
    inputs = "mlp" if method == "teal" else None
    calibration = catsparse.calibrate(
        llama, TRAIN.windows, preview=preview, progress=False, inputs=inputs
    )
    catsparse.sparsify(llama, calibration, None, method, compensate, bytes_skipped=0.5)
    for text in (HELDOUT, DRIFT):
        e = evaluate(llama, text.windows, progress=False)
        row = next(
            row
            for row in rows
            if (row.method, row.compensate, row.target, row.heldout)
            == (method, compensate, 0.5, text.name)
        )
        assert row.dense_perplexity == pytest.approx(e.dense_perplexity.value, rel=1e-6)
        assert row.rise == pytest.approx(e.rise, rel=1e-4)
        assert row.rise_se == pytest.approx(e.rise_standard_error, rel=1e-4)
        assert row.sparsity == pytest.approx(e.sparsity, abs=1e-3)


def test_each_step_is_taken_no_more_than_needed(llama: Any, calls: dict[str, int]) -> None:
    before = copy.deepcopy(llama.state_dict())
    compared(llama, heldout=[HELDOUT, DRIFT])
    assert calls == {
        "calibrate": 2,
        "perplexity": 2,
        "evaluate": 6 * 2 * 2 * 2,
        "measure_sensitivities": 0,
    }
    assert not sparse_layers(llama)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


@pytest.mark.parametrize(("method", "preview"), [("chess", None), ("product", 4)])
def test_only_the_calibration_that_is_needed(
    llama: Any, method: str, preview: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def calibrate(*args: Any, **options: Any) -> Any:
        seen.append(options["preview"])
        return catsparse.calibrate(*args, **options)

    monkeypatch.setattr(compare, "calibrate", calibrate)
    compared(llama, make_settings([method], bytes_skipped=[0.4]))
    assert seen == [preview]


def test_allocations_share_a_table_measured_on_text_held_out(
    llama: Any, calls: dict[str, int], tmp_path: Path
) -> None:
    allocations = ("uniform", "greedy", "optimal")
    settings = make_settings(["energy"], [True], allocations, [0.3, 0.5])
    found = compared(llama, settings, output=tmp_path)
    assert [row.allocation for row in found] == [a for a in allocations for _ in BUDGETS]
    assert calls["measure_sensitivities"] == 1
    assert {row.calibration_tokens for row in found} == {4 * 32}  # half is held out
    assert len({row.rise for row in found}) > 2
    for row in found:
        assert row.bytes_skipped == pytest.approx(row.target, abs=0.06)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.jsonl"]


def test_one_window_has_no_standard_error(llama: Any, tmp_path: Path) -> None:
    text = Text("one", HELDOUT.windows[:1])
    (row,) = compared(llama, ONE, heldout=[text], output=tmp_path)
    assert row.rise_se is row.perplexity_se is row.dense_perplexity_se is None
    assert read_rows(tmp_path / "compare.jsonl") == [row]


def test_a_batch_too_large_is_halved_once(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def scoring(model: Any, windows: Any, size: int, **options: Any) -> Any:
        sizes.append(size)
        if size > 2:
            raise MemoryError
        return evaluate(model, windows, size, **options)

    monkeypatch.setattr(compare, "evaluate", scoring)
    compared(llama, make_settings(["cats"], [True], bytes_skipped=BUDGETS), batch_size=4)
    assert sizes == [4, 2, 2]


def test_best_is_the_least_rise_of_each_text_and_budget(rows: list[CompareRow]) -> None:
    best = best_rows(rows)
    assert len(best) == 2 * 2
    for row in rows:
        group = [r for r in rows if (r.heldout, r.target) == (row.heldout, row.target)]
        assert (row.key in best) == (row.rise == min(r.rise for r in group))


# -- resuming


def test_rows_that_are_there_are_not_run_again(
    rows: list[CompareRow], llama: Any, tmp_path: Path, calls: dict[str, int]
) -> None:
    path = tmp_path / "compare.jsonl"
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
    before = path.read_text(encoding="utf-8")
    assert compared(llama, heldout=[HELDOUT, DRIFT], output=tmp_path) == rows
    assert not any(calls.values())
    assert path.read_text(encoding="utf-8") == before
    # One row less: only that is made again, on its text alone.
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]), encoding="utf-8")
    assert compared(llama, heldout=[HELDOUT, DRIFT], output=tmp_path)[5].key == rows[5].key
    assert calls == {"calibrate": 1, "perplexity": 1, "evaluate": 1, "measure_sensitivities": 0}
    assert len(read_rows(path)) == len(rows)


@pytest.mark.parametrize("changed", ["weights", "train", "heldout", "preview", "held out"])
def test_other_weights_tokens_or_settings_are_run(
    llama: Any, tmp_path: Path, calls: dict[str, int], changed: str
) -> None:
    settings = make_settings(["product"], [True], bytes_skipped=[0.3])
    compared(llama, settings, output=tmp_path)
    options: dict[str, Any] = {}
    if changed == "weights":
        llama = build(llama_config(), seed=1)
    elif changed == "train":
        options["train"] = Text("train", tokens(8, 32, seed=8))
    elif changed == "heldout":
        options["heldout"] = [Text("heldout", tokens(4, 32, seed=13))]
    elif changed == "preview":
        settings = [replace(settings[0], preview=8)]
    else:  # the calibration gives half of its text to the sensitivities of another row
        settings = [*settings, replace(settings[0], allocation="greedy")]
    compared(llama, settings, output=tmp_path, **options)
    assert calls["evaluate"] == 1 + len(settings)
    assert len(read_rows(tmp_path / "compare.jsonl")) == calls["evaluate"]


def test_an_interrupted_run_goes_on(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(["cats"], bytes_skipped=BUDGETS)
    done = []

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(evaluate(*args, **options))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(compare, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compared(llama, settings, output=tmp_path)
    assert not sparse_layers(llama)
    assert len(read_rows(tmp_path / "compare.jsonl")) == 2
    (checkpoint,) = tmp_path.glob(".calibration-*")
    assert checkpoint.stat().st_size
    found = compared(llama, settings, output=tmp_path)
    assert read_rows(tmp_path / "compare.jsonl") == found
    assert [path.name for path in tmp_path.iterdir()] == ["compare.jsonl"]
    assert [row.rise for row in found] == [row.rise for row in compared(llama, settings)]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"key": "a", "rise": 1}', "no JSON"])
def test_a_file_of_something_else_is_refused(
    llama: Any, tmp_path: Path, text: str, calls: dict[str, int]
) -> None:
    (tmp_path / "compare.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(CatsparseError, match=r"compare\.jsonl, line 1"):
        compared(llama, ONE, output=tmp_path)
    assert not any(calls.values())
    assert (tmp_path / "compare.jsonl").read_text(encoding="utf-8") == text + "\n"


def test_bad_input(llama: Any, calibration: catsparse.Calibration) -> None:
    with pytest.raises(CatsparseError, match="the same"):
        compared(llama, ONE, heldout=[HELDOUT, Text("other", HELDOUT.windows)])
    with pytest.raises(CatsparseError, match="the same"):
        compared(llama, ONE, heldout=[HELDOUT, Text("heldout", DRIFT.windows)])
    with pytest.raises(CatsparseError, match="already sparse"):
        compared(catsparse.sparsify(llama, calibration, 0.5), ONE)


# -- scope


def test_scope_all_counts_all_linears(llama: Any) -> None:
    settings = make_settings(["cats", "product", "wina"], [True], bytes_skipped=[0.4], scope="all")
    for row in compared(llama, settings):
        assert row.scope == "all"
        assert row.bytes_skipped == pytest.approx(0.4, abs=0.06)


# -- the command, on the bundled model

FEW = ["--tokens", 2048, "--test-tokens", 512, "--seq-len", 128, "--methods", "energy,product"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drift = tmp_path / "unlike.txt"
    drift.write_text("one two three four five six seven eight nine ten\n" * 80, encoding="utf-8")
    out = tmp_path / "out"
    words = ["compare", "default", *FEW, "--bytes-skipped", "0.5,0.333", "-o", out]
    code, text, _ = run(capsys, *words, "--drift", drift, "--json", "--plot")
    assert code == 0
    result = json.loads(text)
    assert result["tasks"] == []
    assert not (out / "tasks.jsonl").exists()
    assert [Path(path).name for path in result["plots"]] == ["compare.png", "compare.svg"]
    assert all(Path(path).is_file() for path in result["plots"])
    found = result["rows"]
    assert len(found) == 2 * 2 * 2 * 2
    assert {row["heldout"] for row in found} == {"the bundled heldout text", "unlike.txt"}
    assert {row["preview"] for row in found if row["method"] == "product"} == {4}
    assert [json.loads(line) for line in (out / "compare.jsonl").open()] == found
    # From the file: the table, each budget's best first and marked.
    code, text, _ = run(capsys, *words, "--compensate")
    assert code == 0
    assert (out / "compare.jsonl").read_text().count("\n") == len(found)
    lines = [line.split() for line in text.splitlines() if "%" in line]
    assert [(line[0], line[-1] == "best") for line in lines] == [
        ("33.3%", True), ("33.3%", False), ("50.0%", True), ("50.0%", False)
    ]  # fmt: skip
    assert all(line[1] == "product" for line in lines if line[-1] == "best")
    assert all(line[2] == "yes" for line in lines)
    assert "508 tokens of the bundled heldout text" in text
    assert "4-bit preview" in " ".join(text.split())
    assert str(out / "compare.jsonl") in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bytes-skipped", "0.9"], "bytes_skipped is 0.9"),
        (["--bytes-skipped", "a lot"], "--bytes-skipped takes numbers"),
        (["--methods", "cats,magic"], "method must be one of"),
        (["--allocation", "magic"], "allocation must be one of"),
        (["--preview", "5"], "preview must be"),
        (["--methods", "cats", "--preview", "4"], "--preview does nothing here"),
        (["--data", "./nowhere.txt"], "there is no file"),
        (["--drift", "./nowhere.txt"], "there is no file"),
    ],
)
def test_command_refuses(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, err = run(capsys, "compare", "default", "-o", tmp_path / "out", *words)
    assert (code, text) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_sparse_folder(
    sparse_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse_llama.config._name_or_path = "default"
    sparse_llama.catsparse = replace(
        sparse_llama.catsparse,
        config=replace(
            sparse_llama.catsparse.config,
            base_model=catsparse.surgery.base_model_of(sparse_llama),
        ),
    )
    catsparse.save(sparse_llama, tmp_path / "sparse")
    code, _, err = run(capsys, "compare", tmp_path / "sparse")
    assert code == 2
    assert "name the dense model" in " ".join(err.split())
