"""Result rows on the report's page: which are taken, which refused, and into which runs they go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pages
from catsparse import CatsparseError
from catsparse.config import BaseModel, InputConfig, SiteConfig, SparsityConfig
from catsparse.page import rows as page_rows
from catsparse.page.rows import read_rows
from command import run

SITES = {f"layers.{k}.mlp": SiteConfig(0.1, 0.5 + k / 100, "silu", 32, 48) for k in range(2)}
CONFIG = SparsityConfig(SITES, base_model=BaseModel("owner/tiny", "llama"))


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_by_the_command_that_wrote_them(tmp_path: Path) -> None:
    one = write(tmp_path, pages.compare_row(), pages.bench_row(), pages.evaluate_row(CONFIG))
    two = write(tmp_path, pages.compare_row(method="chess"), name="more.jsonl")
    found = read_rows([one, two], CONFIG)
    assert found["count"] == {"compare": 2, "tasks": 0, "evaluate": 1, "bench": 1}
    assert [row["method"] for row in found["compare"]] == ["cats", "chess"]
    assert "device" not in found["compare"][0]  # only what is shown
    assert read_rows([], CONFIG)["count"] == dict.fromkeys(
        ("compare", "tasks", "evaluate", "bench"), 0
    )


@pytest.mark.parametrize("wrap", [lambda row: row, lambda row: [row], lambda row: {"rows": [row]}])
def test_what_json_prints_is_read_as_well(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "printed.json"
    path.write_text("\n" + json.dumps(wrap(pages.compare_row()), indent=2))
    assert read_rows([path], CONFIG)["count"]["compare"] == 1


def test_tasks_of_both_commands(tmp_path: Path) -> None:
    dense = pages.task_row(variant="dense", method=None, compensate=None, difference=None)
    of_evaluate = pages.task_row(n=41)
    del of_evaluate["allocation"], of_evaluate["bytes_asked"]
    found = read_rows([write(tmp_path, dense, pages.task_row(), of_evaluate)], CONFIG)
    assert found["count"]["tasks"] == 3
    assert [row["method"] for row in found["tasks"]] == [None, "cats", "cats"]
    assert [row["bytes_asked"] for row in found["tasks"]] == [0.3, 0.3, None]
    path = tmp_path / "printed.json"
    path.write_text(
        json.dumps({"rows": [pages.compare_row()], "tasks": [dense], "plots": []}, indent=2)
    )
    count = read_rows([path], CONFIG)["count"]
    assert (count["compare"], count["tasks"]) == (1, 1)


def test_an_evaluation_of_these_very_thresholds(tmp_path: Path) -> None:
    own, other = pages.evaluate_row(CONFIG), pages.evaluate_row(CONFIG)
    other["expected_sites"] = dict.fromkeys(SITES, 0.7)
    third = pages.evaluate_row(CONFIG, method="chess")
    rows = read_rows([write(tmp_path, own, other, third)], CONFIG)["evaluate"]
    assert [row["own"] for row in rows] == [True, False, False]
    assert rows[0]["sites"] == [0.5, 0.51]
    assert rows[0]["positions"] == {
        "starts": [0, 1, 2],
        "length": 4,
        "sparsity": [0.4, 0.5, 0.6],
        "sites": [[0.4, 0.5, 0.6]] * 2,
    }
    assert "sites" not in rows[1]


def test_a_site_without_positions(tmp_path: Path) -> None:
    row = pages.evaluate_row(CONFIG)
    del row["positions"]["sites"]["layers.0.mlp"]
    shown = read_rows([write(tmp_path, row)], CONFIG)["evaluate"][0]["positions"]
    assert shown["sites"] == [None, [0.4, 0.5, 0.6]]
    row["positions"] = None
    assert read_rows([write(tmp_path, row)], CONFIG)["evaluate"][0]["positions"] is None


def test_inputs_of_linear_layers_are_not_measured(tmp_path: Path) -> None:
    linear = InputConfig(("layers.0.q",), 0.1, 0.4, 32, 32)
    config = SparsityConfig(SITES, inputs={"layers.0.q": linear}, scope="all")
    row = pages.evaluate_row(config)
    del row["sites"]["layers.0.q"], row["positions"]["sites"]["layers.0.q"]
    (shown,) = read_rows([write(tmp_path, row)], config)["evaluate"]
    assert shown["own"]
    assert shown["sites"] == [0.5, 0.51, None]
    assert shown["positions"]["sites"][2] is None
    row["expected_sites"]["layers.0.q"] = 0.5
    assert not read_rows([write(tmp_path, row)], config)["evaluate"][0]["own"]


@pytest.mark.parametrize(
    "change",
    [
        {"positions": []},
        {"positions": {"starts": [0, 0], "length": 4, "sparsity": [0, 0], "sites": {}}},
        {"positions": {"starts": [0, 4], "length": 4, "sparsity": [0, 0], "sites": {}}},
        {"positions": {"starts": [0, "1"], "length": 4, "sparsity": [0, 0], "sites": {}}},
        {"positions": {"starts": [], "length": 4, "sparsity": [], "sites": {}}},
        {"positions": {"starts": [0, 1], "length": 4, "sparsity": [0], "sites": {}}},
        {"positions": {"starts": [0], "length": 4, "sparsity": [2], "sites": {}}},
        {"sites": {}},
        {"sites": dict.fromkeys(SITES, "x")},
        {"sites": {"layers.0.mlp": 0.5, "another": 0.5}},
        {"sites": None},
    ],
)
def test_damaged_evaluations(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path, pages.evaluate_row(CONFIG, **change))
    with pytest.raises(CatsparseError, match=r"rows.jsonl, line 1 has .*; evaluate again"):
        read_rows([path], CONFIG)


def test_rows_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path, pages.compare_row(), pages.compare_row(model="owner/large"))
    with pytest.raises(CatsparseError, match=r"line 2 is of the model owner/large, .*owner/tiny"):
        read_rows([path], CONFIG)
    row = pages.evaluate_row(CONFIG, base_model="large")
    with pytest.raises(CatsparseError, match="line 1 is of the model large"):
        read_rows([write(tmp_path, row)], CONFIG)
    # A folder's last name, and no name at all, say nothing against it.
    assert read_rows([write(tmp_path, pages.compare_row(model="tiny"))], CONFIG)["compare"]
    nameless = SparsityConfig(SITES)
    assert read_rows([write(tmp_path, pages.compare_row(model="x"))], nameless)["compare"]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"what": "tune"},
        pages.compare_row(rise=None),
        pages.compare_row(rise="0.1"),
        pages.compare_row(rise=True),
        pages.compare_row(rise_se="x"),
        pages.compare_row(compensate=1),
        pages.compare_row(method=3),
        pages.compare_row(bytes_skipped=1.5),
        pages.compare_row(perplexity=10**400),
        pages.task_row(value=None),
        pages.task_row(n="many"),
        pages.task_row(method=None),
        pages.task_row(model="large"),
        pages.bench_row(p50=0),
        pages.bench_row(limit=-1.0),
        pages.bench_row(impl=None),
        {k: v for k, v in pages.bench_row().items() if k != "limit"},
        [1],
        3,
        None,
    ],
)
def test_what_is_no_row(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path, pages.bench_row(), row)
    with pytest.raises(CatsparseError, match=r"rows.jsonl, line 2 ") as error:
        read_rows([path], CONFIG)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"{", "not readable JSON"),
        (b'{"rise": NaN}', "NaN is not a number"),
        (b'{"rise": 1e999, "target": 1, "heldout": ""}', "which is not what a row"),
        (b"[" * 100_000, "not readable JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"hello", "line 1 is not readable JSON"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    with pytest.raises(CatsparseError, match=words):
        read_rows([path], CONFIG)


def test_no_such_file_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pages.make_folder(tmp_path, table=False)
    capsys.readouterr()
    code, text, errors = run(capsys, "report", made, "--rows", tmp_path / "none.jsonl")
    assert (code, text) == (2, "")
    assert "cannot read" in errors
    assert errors.count("\n") == 1


def test_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, *[pages.bench_row()] * 3)
    monkeypatch.setattr(page_rows, "MAX_ROWS", 2)
    with pytest.raises(CatsparseError, match="line 3 is row 3, more than a page can show"):
        read_rows([path], CONFIG)
    monkeypatch.setattr(page_rows, "MAX_BYTES", 100)
    with pytest.raises(CatsparseError, match="more than the 100 that rows may have"):
        read_rows([path], CONFIG)


def test_names_in_rows_are_fit_to_be_shown(tmp_path: Path) -> None:
    row = pages.compare_row(heldout="/home/somebody/texts/mine.txt", method="a\x1b[31m" * 100)
    shown = read_rows([write(tmp_path, row)], CONFIG)["compare"][0]
    assert shown["heldout"] == "mine.txt"
    assert shown["method"].isprintable()
    assert len(shown["method"]) < 150


def test_runs_of_a_benchmark_stay_apart(tmp_path: Path) -> None:
    def run_of(limit: float, commit: str) -> list[dict[str, Any]]:
        return [
            pages.bench_row(impl="dense", sparsity=0.0, limit=limit, commit=commit),
            pages.bench_row(sparsity=0.9, limit=limit / 2, commit=commit),
            pages.bench_row(sparsity=0.5, limit=limit, commit=commit),
        ]

    rows = [*run_of(10.0, "a"), *run_of(11.0, "a"), *run_of(12.0, "b")]
    rows.insert(4, pages.bench_row(tokens=2))  # another panel in between changes nothing
    panels = read_rows([write(tmp_path, *rows)], CONFIG)["bench"]
    assert [panel["tokens"] for panel in panels] == [1, 2]
    runs = panels[0]["runs"]
    assert [run["commit"] for run in runs] == ["a", "a", "b"]
    for run_, limit in zip(runs, (10.0, 11.0, 12.0), strict=True):
        dense, own = run_["series"]
        assert (dense["impl"], own["impl"]) == ("dense", "catsparse")
        # Rising in sparsity: sparsity, bytes, p20, p50, p80, limit, speedup.
        assert own["points"] == [
            [0.5, 0.333, 9, 10, 12, limit, 1.4],
            [0.9, 0.333, 9, 10, 12, limit / 2, 1.4],
        ]


def test_rows_older_than_contexts(tmp_path: Path) -> None:
    row = {k: v for k, v in pages.bench_row().items() if k != "context"}
    (panel,) = read_rows([write(tmp_path, row)], CONFIG)["bench"]
    assert panel["context"] == 0


def test_results_that_are_kept_with_the_code() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    if not folder.is_dir():
        pytest.skip("not a checkout")
    config = SparsityConfig(SITES, base_model=BaseModel("default", "llama"))
    names = ["compare-default", "bench-cpu", "decode-cuda-h200", "gated-mlp-cuda-h200"]
    found = read_rows([folder / f"{name}.jsonl" for name in names], config)
    assert found["count"]["compare"] == 72
    assert found["count"]["bench"] > 400
    for panel in found["bench"]:
        for run_ in panel["runs"]:
            for series in run_["series"]:
                shares = [point[0] for point in series["points"]]
                assert shares == sorted(set(shares))
