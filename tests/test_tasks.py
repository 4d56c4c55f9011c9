"""Tasks from the command and the API: dense beside sparse, rows, going on, refusals."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import catsparse
from catsparse import CatsparseError, tasks
from catsparse.modules import sparse_modules
from catsparse.tasks import TaskRow, evaluate_tasks, read_rows
from catsparse.tasks.local import read_task
from catsparse.tasks.scoring import encode_pairs
from command import run
from letters import Letters
from test_tasks_scoring import by_plain_loop
from tiny import build, calibrate, llama_config, masked_by_hand

WORDS = ["so", "a cat", "they ran", "is", "not here", "gone", "left it", "up", "on the", "we"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """piqa, blimp and lambada, forty examples of random words each."""
    path = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(5)

    def words(count: int) -> str:
        return " ".join(generator.choice(WORDS, count))

    def even() -> str:
        """As long as any other, so that the length does not decide."""
        return "".join(generator.choice(list("abcdefghijklmnop"), 7))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "piqa",
        [{"context": words(3), "choices": [even(), even()], "gold": n % 2} for n in range(40)],
    )
    write("blimp", [{"task": f"t{n % 3}", "good": even(), "bad": even()} for n in range(40)])
    write("lambada", [{"context": words(5), "continuation": words(1)} for n in range(40)])
    return path


@pytest.fixture(scope="module")
def calibrated() -> catsparse.Calibration:
    return calibrate(build(llama_config()))


@pytest.fixture
def sparse(calibrated: catsparse.Calibration) -> Any:
    return catsparse.sparsify(build(llama_config()), calibrated, 0.6, prefill="dense")


def evaluated(model: Any, folder: Path, names: Any = "all", **options: Any) -> list[TaskRow]:
    return evaluate_tasks(model, Letters(), names, folder=folder, progress=False, **options)


def count_passes(model: Any) -> list[int]:
    """A list that grows by the tokens of each forward pass."""
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return passes


# -- figures


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_rows_are_those_of_a_plain_loop(
    calibrated: catsparse.Calibration, folder: Path, prefill: str
) -> None:
    """Dense by the dense model, sparse by MLPs written out by hand; nothing of either is shared."""
    dense = build(llama_config())
    sparse = catsparse.sparsify(copy.deepcopy(dense), calibrated, 0.6, prefill=prefill)
    by_hand = {"dense": dense, "sparse": masked_by_hand(sparse, dense)}
    rows = evaluated(sparse, folder)
    assert [(row.task, row.variant) for row in rows] == [
        (task, variant) for task in ("piqa", "lambada", "blimp") for variant in ("dense", "sparse")
    ]
    for row in rows:
        examples = read_task(row.task, folder / f"{row.task}.jsonl").examples
        right = []
        for example in examples:
            pairs = encode_pairs(example.pairs, Letters())
            found = by_plain_loop(by_hand[row.variant], pairs)
            if row.task == "lambada":
                right.append(found[0].greedy)
            else:
                right.append(int(np.argmax([score.logprob for score in found])) == example.gold)
        assert row.correct == "".join(str(int(value)) for value in right)
        assert row.value == row.metrics["acc"] == pytest.approx(np.mean(right))
        error = np.std(right, ddof=1) / math.sqrt(40)
        assert row.stderr == row.metrics["acc_stderr"] == pytest.approx(error)
        assert (row.metric, row.n, row.source) == ("acc", 40, "local")
    assert rows[2].metrics["perplexity"] != rows[3].metrics["perplexity"]
    assert any(a.correct != b.correct for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_difference_is_paired(sparse: Any, folder: Path) -> None:
    for dense, row in zip(*[iter(evaluated(sparse, folder))] * 2, strict=True):
        changes = np.array([int(a) for a in row.correct]) - [int(a) for a in dense.correct]
        assert (dense.difference, dense.difference_stderr) == (None, None)
        assert row.difference == pytest.approx(changes.mean())
        assert row.difference_stderr == pytest.approx(changes.std(ddof=1) / math.sqrt(40))


def test_what_a_row_says_of_the_model(sparse: Any, folder: Path) -> None:
    dense, row = evaluated(sparse, folder, "piqa")
    assert (row.method, row.compensate, row.target, row.preview) == ("energy", True, 0.6, None)
    # The model's own policy is `dense`; it was not scored under that.
    assert row.prefill == "masked"
    assert row.sparsity == pytest.approx(0.6, abs=0.1)
    assert row.bytes_skipped == pytest.approx(2 / 3 * row.sparsity)
    assert row.down_sparsity == row.sparsity
    assert (row.dtype, row.device, row.limit) == ("float32", "cpu", None)
    assert row.versions["catsparse"] == catsparse.__version__
    assert (dense.method, dense.prefill, dense.target) == (None, None, None)
    assert (dense.sparsity, dense.bytes_skipped) == (0, 0)
    assert row.model == dense.model == "LlamaForCausalLM"
    assert all(module.catsparse_prefill == "dense" for module in sparse_modules(sparse).values())


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_sparsity_is_of_the_texts_own_tokens(
    sparse: Any, folder: Path, batch_size: int | None
) -> None:
    """Each different input once, without padding, whatever the batches."""
    examples = read_task("piqa", folder / "piqa.jsonl").examples
    inputs = {
        tuple((start + rest)[:-1])
        for example in examples
        for start, rest in encode_pairs(example.pairs, Letters())
    }
    with catsparse.achieved_sparsity(sparse) as meter, torch.no_grad():
        for module in sparse_modules(sparse).values():
            module.catsparse_prefill = "masked"
        for ids in sorted(inputs):
            sparse(input_ids=torch.tensor([ids]), use_cache=False)
    row = evaluated(sparse, folder, "piqa", batch_size=batch_size)[1]
    assert row.sparsity == pytest.approx(meter.sparsity, abs=1e-4)


def test_sparsity_0_is_dense(calibrated: catsparse.Calibration, folder: Path) -> None:
    model = catsparse.sparsify(build(llama_config()), calibrated, 0.0)
    for dense, row in zip(*[iter(evaluated(model, folder))] * 2, strict=True):
        assert row.metrics == dense.metrics
        assert (row.correct, row.difference) == (dense.correct, 0)


def test_a_dense_model_has_dense_rows(folder: Path, sparse: Any) -> None:
    rows = evaluated(build(llama_config()), folder)
    assert [row.variant for row in rows] == ["dense"] * 3
    assert [row.key for row in rows] == [row.key for row in evaluated(sparse, folder)[::2]]


def test_limit(sparse: Any, folder: Path) -> None:
    whole, some = evaluated(sparse, folder), evaluated(sparse, folder, limit=5)
    for one, other in zip(whole, some, strict=True):
        assert (other.n, other.limit) == (5, 5)
        assert one.correct is not None
        assert other.correct == one.correct[:5]
    assert evaluated(sparse, folder, "piqa", limit=1)[0].stderr is None


def test_a_question_longer_than_the_window(sparse: Any, tmp_path: Path) -> None:
    """The model takes 128 tokens; the question's beginning does not count."""
    tail = "the end of it all " * 9
    for name, beginning in (("short", ""), ("long", "something else ")):
        (tmp_path / name).mkdir()
        row = {"context": beginning * 9 + tail, "choices": ["yes", "no"], "gold": 0}
        (tmp_path / name / "piqa.jsonl").write_text(json.dumps(row) + "\n")
    short, long = (evaluated(sparse, tmp_path / name, "piqa") for name in ("short", "long"))
    assert long[0].truncated == long[1].truncated == 2
    assert long[1].sparsity == short[1].sparsity


def test_memory_that_is_too_small_halves_the_batch(sparse: Any, folder: Path) -> None:
    expected = evaluated(sparse, folder, "blimp")
    passes = count_passes(sparse)

    def full(module: Any, args: Any) -> None:
        if args[0][..., 0].numel() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    # In the last layer: what the first one counted before it must not stay counted.
    sparse.model.layers[1].mlp.register_forward_pre_hook(full)
    found = evaluated(sparse, folder, "blimp")
    assert max(passes) > 40 > min(passes)
    for one, other in zip(found, expected, strict=True):
        assert one.correct == other.correct
        assert one.sparsity == pytest.approx(other.sparsity, abs=1e-4)


# -- the file of rows


def test_rows_are_written_and_read(sparse: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = evaluated(sparse, folder, output=path)
    assert read_rows(path) == rows
    first = json.loads(path.read_text().split("\n")[0])
    assert first["task"] == "piqa"
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_what_is_known_is_not_run_again(sparse: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = evaluated(sparse, folder, "piqa,blimp", output=path)
    text, passes = path.read_bytes(), count_passes(sparse)
    assert evaluated(sparse, folder, ["blimp", "piqa"], output=path) == rows[2:] + rows[:2]
    assert not passes
    assert path.read_bytes() == text
    evaluated(sparse, folder, "piqa,lambada", output=path)
    assert [row.task for row in read_rows(path)[4:]] == ["lambada", "lambada"]


def test_an_interrupted_run_goes_on(
    sparse: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "rows.jsonl", evaluated(sparse, folder)
    scored, calls = tasks.loglikelihoods, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the sparse half of the second task
            raise KeyboardInterrupt
        return scored(*args)

    monkeypatch.setattr(tasks, "loglikelihoods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(sparse, folder, output=path)
    assert [row.variant for row in read_rows(path)] == ["dense", "sparse", "dense"]
    assert evaluated(sparse, folder, output=path) == whole
    assert len(calls) == 4 + 3
    assert read_rows(path) == whole
    for module in sparse_modules(sparse).values():
        assert module.catsparse_enabled
        assert module.catsparse_counter is None


@pytest.mark.parametrize("what", ["thresholds", "weights", "limit", "examples", "dtype"])
def test_other_settings_are_run(what: str, sparse: Any, folder: Path, tmp_path: Path) -> None:
    """Other thresholds need only the sparse half again."""
    path, limit = tmp_path / "rows.jsonl", None
    (tmp_path / "piqa.jsonl").write_bytes((folder / "piqa.jsonl").read_bytes())
    evaluated(sparse, tmp_path, "piqa", output=path)
    with torch.no_grad():
        if what == "thresholds":
            next(iter(sparse_modules(sparse).values())).catsparse_threshold.mul_(1.1)
        elif what == "weights":
            sparse.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        elif what == "limit":
            limit = 4
        elif what == "examples":
            with (tmp_path / "piqa.jsonl").open("a") as file:
                file.write('{"context": "a", "choices": ["b", "c"], "gold": 0}\n')
        else:
            sparse.bfloat16()
    evaluated(sparse, tmp_path, "piqa", output=path, limit=limit)
    new = [row.variant for row in read_rows(path)[2:]]
    assert new == (["sparse"] if what == "thresholds" else ["dense", "sparse"])


@pytest.mark.parametrize(
    "content",
    ['{"a": 1}\n', "[]\n", "no json\n", '{"task": "piqa", "key": 3}\n', "\xff"],
    ids=["object", "list", "text", "some keys", "bytes"],
)
def test_another_file_is_not_written_over(
    content: str, sparse: Any, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CatsparseError, match=r"rows\.jsonl"):
        evaluated(sparse, folder, output=path)
    assert path.read_bytes() == content.encode("latin-1")


def test_a_row_with_a_wrong_value(sparse: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    evaluated(sparse, folder, "piqa", output=path)
    for change in ({"correct": "012"}, {"value": "high"}, {"more": 1}, {"metrics": None}):
        row = json.loads(path.read_text().split("\n")[0]) | change
        (tmp_path / "other.jsonl").write_text(json.dumps(row))
        with pytest.raises(CatsparseError, match="line 1 is no row"):
            read_rows(tmp_path / "other.jsonl")


def test_a_place_that_cannot_be_written(sparse: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatsparseError, match="cannot"):
        evaluated(sparse, folder, "piqa", output=tmp_path / "file" / "rows.jsonl")


# -- refusals


def test_no_row_of_a_layer_that_ran_dense(sparse: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    last = list(sparse_modules(sparse).values())[-1]
    last.register_forward_pre_hook(lambda module, _: setattr(module, "catsparse_enabled", False))
    with pytest.raises(CatsparseError, match="is meant to be sparse and ran dense"):
        evaluated(sparse, folder, "piqa", output=path)
    assert [row.variant for row in read_rows(path)] == ["dense"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("piqa,,blimp", "commas"),
        ("", "commas"),
        ([], "commas"),
        ("all,piqa", "'all' alone"),
    ],
)
def test_names_that_are_none(names: Any, says: str, sparse: Any, folder: Path) -> None:
    with pytest.raises(CatsparseError, match=says):
        evaluated(sparse, folder, names)


def test_a_task_that_is_nowhere(sparse: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    passes = count_passes(sparse)
    with pytest.raises(CatsparseError, match=r"boolq: .* no file of it.*catsparse\[eval\]"):
        evaluated(sparse, folder, "piqa,boolq")
    with pytest.raises(CatsparseError, match="winogrande: no --tasks-data was given"):
        evaluate_tasks(sparse, Letters(), progress=False)
    assert not passes  # before anything was scored


def test_a_folder_that_is_none(sparse: Any, tmp_path: Path) -> None:
    with pytest.raises(CatsparseError, match="is no folder"):
        evaluated(sparse, tmp_path / "absent", "piqa")
    with pytest.raises(CatsparseError, match="holds no task's file"):
        evaluated(sparse, tmp_path)


@pytest.mark.parametrize("options", [{"limit": 0}, {"batch_size": 0}])
def test_numbers_out_of_range(options: Any, sparse: Any, folder: Path) -> None:
    with pytest.raises(CatsparseError, match="at least 1"):
        evaluated(sparse, folder, **options)


def test_no_dropout_and_flags_that_come_back(folder: Path) -> None:
    model = build(llama_config(attention_dropout=0.5))
    expected = evaluated(model, folder, "lambada")
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    assert evaluated(model, folder, "lambada") == expected
    assert [module.training for module in model.modules()] == flags


# -- the command


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 50%."""
    path = tmp_path_factory.mktemp("artifact") / "half"
    model = catsparse.hub.load_dense_model("default")
    tokenizer = catsparse.hub.load_tokenizer("default")
    text = catsparse.hub.bundled_text("calibration").read_text()[:20_000]
    calibration = catsparse.calibrate(model, [text], tokenizer, seq_len=128, progress=False)
    catsparse.save(catsparse.sparsify(model, calibration, 0.5), path)
    return path


def test_the_command_prints_both_and_keeps_rows(
    artifact: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    options = ["--tasks", "blimp,lambada", "--tasks-data", folder, "-o", path]
    code, text, error = run(capsys, "evaluate", artifact, *options)
    assert code == 0
    for part in ("blimp", "lambada", "average", "difference", "masked", "of neurons"):
        assert part in text
    assert "rows.jsonl" in error
    assert max(map(len, text.split("\n"))) <= 80
    rows = read_rows(path)
    assert [row.model for row in rows] == ["default"] * 4
    code, text, _ = run(capsys, "evaluate", artifact, *options, "--json")
    result = json.loads(text)
    assert code == 0
    assert result["model"] == str(artifact)
    assert [row["key"] for row in result["rows"]] == [row.key for row in rows]
    assert all(row["prefill"] == "masked" for row in result["rows"][1::2])
    assert "correct" not in result["rows"][0]
    assert len(read_rows(path)) == 4


def test_the_command_on_a_dense_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "piqa", "--tasks-data", folder, "--limit", 3, "--batch-size", 2]
    code, text, _ = run(capsys, "evaluate", *options)
    assert code == 0
    assert "piqa" in text
    assert "sparse" not in text


def test_perplexity_names_its_policy(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", 1024, "--seq-len", 256, "--json"]
    auto, one = (
        json.loads(run(capsys, "evaluate", artifact, *small, "--batch-size", size)[1])
        for size in ("auto", "1")
    )
    assert auto["prefill"] == one["prefill"] == "masked"
    assert auto["perplexity"] == pytest.approx(one["perplexity"], rel=1e-2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tasks-data", "."], "--tasks-data does nothing here"),
        (["--limit", "3"], "--limit does nothing here"),
        (["-o", "x.jsonl"], "--output does nothing here"),
        (["--tasks", "piqa", "--seq-len", "64"], "--seq-len does nothing here"),
        (["--tasks", "piqa", "--data", "x.txt"], "--data does nothing here"),
        (["--tasks", "piqa", "--tasks-data", "/nowhere"], "is no folder"),
        (["--tasks", ",", "--tasks-data", "FOLDER"], "commas"),
        (["--batch-size", "many"], "--batch-size must be auto or a number"),
        (["--batch-size", "0"], "--batch-size must be auto or a number"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    args: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(folder) if arg == "FOLDER" else arg for arg in args]
    code, text, error = run(capsys, "evaluate", *args)
    assert code == 2
    assert text == ""
    assert says in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
