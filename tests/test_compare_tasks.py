"""Accuracy in a comparison: what `evaluate --tasks` gives in each setting, dense scored once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import catsparse
import catsparse.cli  # the module that a test reaches into
from catsparse import CatsparseError, compare, tasks
from catsparse.compare import Comparison, Text, make_settings, read_task_rows
from catsparse.surgery import sparse_layers
from catsparse.tasks import evaluate_tasks, prepare_tasks
from command import run
from letters import Letters
from tiny import build, llama_config, tokens

TRAIN = Text("train", tokens(8, 32, seed=7))
HELDOUT = Text("heldout", tokens(2, 32, seed=11))
SETTINGS = make_settings(["cats", "product"], [True], bytes_skipped=[0.3, 0.5])
SAME = ("value", "stderr", "metrics", "n", "correct", "difference", "difference_stderr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pairs of words of random letters, fifteen last words."""
    path = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(5)

    def word() -> str:
        return "".join(generator.choice(list("abcdefghijklmnop"), 7))

    pairs = [{"task": "t", "good": word(), "bad": word()} for _ in range(30)]
    ends = [{"context": f"{word()} {word()}", "continuation": word()[:1]} for _ in range(15)]
    for name, rows in (("blimp", pairs), ("lambada", ends)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compared(model: Any, folder: Path, names: str = "blimp,lambada", **options: Any) -> Comparison:
    chosen = options.pop("settings", SETTINGS)
    prepared = prepare_tasks(
        model, Letters(), names, folder=folder, limit=options.pop("limit", None)
    )
    train = options.pop("train", TRAIN)
    return compare.compare(
        model, train, [HELDOUT], chosen, tasks=prepared, progress=False, **options
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is calibrated and scored, in order."""
    taken: list[str] = []

    def noted(module: Any, name: str) -> None:
        step: Callable[..., Any] = getattr(module, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            taken.append(name)
            return step(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    noted(compare, "calibrate")
    noted(compare, "evaluate")
    noted(tasks, "loglikelihoods")
    return taken


def test_rows_are_those_of_evaluate_tasks(llama: Any, folder: Path) -> None:
    found = compared(llama, folder).tasks
    assert not sparse_layers(llama)
    assert len(found) == 2 * (1 + len(SETTINGS))
    for name, group in (("blimp", found[:5]), ("lambada", found[5:])):
        assert [row.task for row in group] == [name] * 5
        assert [row.variant for row in group] == ["dense", *["sparse"] * 4]
        for setting, row in zip(SETTINGS, group[1:], strict=True):
            model = build(llama_config())
            calibration = catsparse.calibrate(
                model, TRAIN.windows, batch_size=4, preview=setting.preview, progress=False
            )
            catsparse.sparsify(
                model, calibration, None, setting.method, True, bytes_skipped=setting.bytes_skipped
            )
            dense, by_hand = evaluate_tasks(model, Letters(), name, folder=folder, progress=False)
            for key in SAME:
                assert getattr(group[0], key) == getattr(dense, key)
                assert getattr(row, key) == getattr(by_hand, key)
            assert row.bytes_skipped == pytest.approx(by_hand.bytes_skipped)
            assert (row.method, row.preview) == (setting.method, setting.preview)
            assert (row.allocation, row.bytes_asked) == ("uniform", setting.bytes_skipped)
            assert (row.calibration, row.calibration_tokens) == ("train", 8 * 32)
            assert row.prefill == "masked"
        assert (group[0].bytes_asked, group[0].method, group[0].calibration) == (None, None, None)
    assert len({row.key for row in found}) == len(found)
    assert any(row.difference for row in found)


def test_dense_is_scored_once_a_task(llama: Any, folder: Path, steps: list[str]) -> None:
    compared(llama, folder)
    assert steps.count("loglikelihoods") == 2 * (1 + len(SETTINGS))
    assert steps.count("calibrate") == 2


def test_what_is_known_is_not_run_again(
    llama: Any, folder: Path, tmp_path: Path, steps: list[str]
) -> None:
    whole = compared(llama, folder, output=tmp_path)
    path = tmp_path / "tasks.jsonl"
    assert sorted(read_task_rows(path), key=lambda row: row.key) == sorted(
        whole.tasks, key=lambda row: row.key
    )
    before = path.read_text()
    steps.clear()
    assert compared(llama, folder, output=tmp_path) == whole
    assert steps == []
    assert path.read_text() == before
    # A sparse row less: its calibration and itself, with the dense row that is there.
    lost = whole.tasks[2]
    lines = [line for line in before.splitlines(keepends=True) if lost.key not in line]
    path.write_text("".join(lines))
    assert compared(llama, folder, output=tmp_path).tasks == whole.tasks
    assert steps == ["calibrate", "loglikelihoods"]
    # A dense row less.
    steps.clear()
    path.write_text("".join(before.splitlines(keepends=True)[1:]))
    assert compared(llama, folder, output=tmp_path).tasks == whole.tasks
    assert steps == ["loglikelihoods"]


def test_tasks_are_added_to_a_comparison_that_is_there(
    llama: Any, folder: Path, tmp_path: Path, steps: list[str]
) -> None:
    chosen = SETTINGS[:2]
    compare.compare(llama, TRAIN, [HELDOUT], chosen, output=tmp_path, progress=False)
    steps.clear()
    compared(llama, folder, "blimp", settings=chosen, output=tmp_path)
    assert steps == ["loglikelihoods", "calibrate", *["loglikelihoods"] * 2]
    steps.clear()
    compared(llama, folder, "blimp", settings=SETTINGS[1:3], output=tmp_path)
    assert (steps.count("evaluate"), steps.count("loglikelihoods")) == (1, 1)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_run_goes_on(
    llama: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = compared(llama, folder)
    scored, calls = tasks.loglikelihoods, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(tasks, "loglikelihoods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(llama, folder, output=tmp_path)
    assert not sparse_layers(llama)
    assert len(read_task_rows(tmp_path / "tasks.jsonl")) == stop - 1
    assert compared(llama, folder, output=tmp_path) == whole
    assert len(calls) == 2 * (1 + len(SETTINGS)) + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.jsonl", "tasks.jsonl"]


@pytest.mark.parametrize("changed", ["weights", "train", "limit", "setting"])
def test_anything_else_is_scored(
    llama: Any, folder: Path, tmp_path: Path, changed: str, steps: list[str]
) -> None:
    options: dict[str, Any] = {"names": "blimp", "settings": SETTINGS[:1], "output": tmp_path}
    compared(llama, folder, **options)
    steps.clear()
    if changed == "weights":
        llama = build(llama_config(), seed=1)
    elif changed == "train":
        options["train"] = Text("train", tokens(8, 32, seed=8))
    elif changed == "limit":
        options["limit"] = 4
    else:
        options["settings"] = SETTINGS[1:2]
    found = compared(llama, folder, **options).tasks
    # The dense row does not depend on calibration and setting.
    new = 1 if changed in ("train", "setting") else 2
    assert steps.count("loglikelihoods") == new
    assert len(read_task_rows(tmp_path / "tasks.jsonl")) == 2 + new
    assert found[1].n == (4 if changed == "limit" else 30)


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "no JSON", '{"task": "blimp", "key": "k"}'])
def test_a_file_of_something_else_is_refused(
    llama: Any, folder: Path, tmp_path: Path, content: str, steps: list[str]
) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(CatsparseError, match=r"tasks\.jsonl, line 1"):
        compared(llama, folder, output=tmp_path)
    assert steps == []
    assert path.read_text() == content + "\n"
    # Without tasks the file is no concern.
    compare.compare(llama, TRAIN, [HELDOUT], SETTINGS[:1], output=tmp_path, progress=False)
    assert path.read_text() == content + "\n"


def test_rows_of_evaluate_are_no_rows_of_compare(
    sparse_llama: Any, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tasks.jsonl"
    evaluate_tasks(sparse_llama, Letters(), "blimp", folder=folder, output=path, progress=False)
    with pytest.raises(CatsparseError, match="no row of 'catsparse compare --tasks'"):
        read_task_rows(path)


# -- the command, on the bundled model

FEW = ["--tokens", 1024, "--test-tokens", 256, "--seq-len", 128, "--methods", "energy,product"]
FEW += ["--bytes-skipped", 0.333, "--compensate"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of English, three tasks' eight examples each."""
    path = tmp_path_factory.mktemp("english")
    lines = {
        "lambada": {"context": "The captain looked at the", "continuation": "sea"},
        "blimp": {"task": "t", "good": "He was a man.", "bad": "He were a man."},
        "piqa": {"context": "Question: Where is it?", "choices": ["in", "the"], "gold": 0},
    }
    for name, row in lines.items():
        (path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return path


def test_command(tmp_path: Path, examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "default", *FEW, "-o", tmp_path / "out", "--tasks-data", examples]
    words += ["--limit", 4]
    code, text, _ = run(capsys, *words, "--tasks", "lambada,blimp", "--json", "--plot")
    assert code == 0
    result = json.loads(text)
    found = result["tasks"]
    assert [(row["task"], row["variant"], row["method"]) for row in found] == [
        (task, *of)
        for task in ("lambada", "blimp")
        for of in (("dense", None), ("sparse", "energy"), ("sparse", "product"))
    ]
    assert {row["n"] for row in found} == {row["limit"] for row in found} == {4}
    assert all("correct" not in row for row in found)
    assert len(result["rows"]) == 2
    svg = Path(result["plots"][1]).read_text()
    assert "blimp" in svg  # the title, as a comment beside its outlines
    path = tmp_path / "out" / "tasks.jsonl"
    lines = [json.loads(line) for line in path.open()]
    assert {row["key"] for row in lines} == {row["key"] for row in found}
    assert all(len(row["correct"]) == 4 for row in lines)
    before = path.read_text()
    # From the file: the table.
    code, text, _ = run(capsys, *words, "--tasks", "lambada,blimp")
    assert code == 0
    assert path.read_text() == before
    head = next(line for line in text.splitlines() if "lambada" in line)
    assert head.split()[-3:] == ["lambada", "blimp", "average"]
    (dense,) = [line for line in text.splitlines() if line.split()[:1] == ["dense"]]
    by_task = {row["task"]: row for row in found if row["variant"] == "dense"}
    assert (
        f"{100 * by_task['blimp']['value']:.1f} ± {100 * by_task['blimp']['stderr']:.1f}" in dense
    )
    for row in found:
        if row["variant"] == "sparse":
            shown = f"{100 * row['difference']:+.1f} ± {100 * row['difference_stderr']:.1f}"
            assert any(row["method"] in line and shown in line for line in text.splitlines())
    said = " ".join(text.split())
    assert "examples: lambada 4, blimp 4" in said
    assert "skipped: of the MLPs' weight bytes, mean of the tasks; every token thresholded" in said
    assert "each task by itself" not in said
    assert str(path) in text


def test_many_tasks_are_shown_as_their_average(
    tmp_path: Path,
    examples: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["catsparse.cli.compare"], "_MOST_COLUMNS", 2)
    words = ["compare", "default", *FEW, "-o", tmp_path / "out", "--tasks-data", examples]
    code, text, _ = run(capsys, *words, "--tasks", "all", "--limit", 2)
    assert code == 0
    head = next(line for line in text.splitlines() if "average" in line)
    assert head.split() == ["asked", "method", "means", "skipped", "average"]
    rows = read_task_rows(tmp_path / "out" / "tasks.jsonl")
    assert {row.task for row in rows} == {"lambada", "blimp", "piqa"}
    assert "each task by itself: tasks.jsonl" in " ".join(text.split())
    mean = np.mean([row.value for row in rows if row.variant == "dense"])
    (dense,) = [line for line in text.splitlines() if line.split()[:1] == ["dense"]]
    assert f"{100 * mean:.1f}" in dense


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks-data", "FOLDER"], "--tasks-data does nothing here: it belongs to --tasks"),
        (["--limit", "3"], "--limit does nothing here: it belongs to --tasks"),
        (["--tasks", "magic", "--tasks-data", "FOLDER"], "magic"),
        (["--tasks", "blimp", "--tasks-data", "./nowhere"], "nowhere is no folder; name"),
        (["--tasks", ",", "--tasks-data", "FOLDER"], "names with commas between them"),
        (["--tasks", "all", "--tasks-data", "EMPTY"], "holds no task's file"),
        (["--tasks", "piqa", "--tasks-data", "BROKEN"], "line 1"),
    ],
)
def test_command_refuses_before_anything_is_computed(
    words: list[str],
    said: str,
    examples: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    steps: list[str],
) -> None:
    places = {"FOLDER": examples, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    places["EMPTY"].mkdir()
    places["BROKEN"].mkdir()
    (places["BROKEN"] / "piqa.jsonl").write_text("{}\n")
    given = [str(places.get(word, word)) for word in words]
    code, text, error = run(capsys, "compare", "default", *FEW, "-o", tmp_path / "out", *given)
    assert (code, text, steps) == (2, "", [])
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
