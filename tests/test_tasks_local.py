"""The readers of the tasks' files, on small ones in their real form, and the metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catsparse import CatsparseError
from catsparse.tasks.local import LOCAL_TASKS, Example, LocalTask, find_file, judge_task, read_task
from catsparse.tasks.scoring import Score
from conftest import SHARED

QUESTION = {"context": "Question: Why?", "choices": ["So it is.", "No"], "gold": 1}


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", ["piqa", "sciq", "arc_easy", "arc_challenge"])
def test_questions_end_in_answer(task: str, tmp_path: Path) -> None:
    read = read_task(task, write(tmp_path, f"{task}.jsonl", QUESTION))
    context = "Question: Why?\nAnswer:"
    assert read.examples == [Example(((context, " So it is."), (context, " No")), 1, (9, 2))]
    assert read.name == task


@pytest.mark.parametrize("task", ["hellaswag", "openbookqa"])
def test_sentences_go_on(task: str, tmp_path: Path) -> None:
    row = {"context": "The sun", "choices": ["is hot", "is é"], "gold": 0}
    read = read_task(task, write(tmp_path, f"{task}.jsonl", row))
    assert read.examples == [Example((("The sun", " is hot"), ("The sun", " is é")), 0, (6, 4))]


def test_boolq_has_no_acc_norm_and_no_passage(tmp_path: Path) -> None:
    row = {
        "context": "Passage: It is. Passage: so.\nQuestion: is it?",
        "choices": ["no", "yes"],
        "gold": 1,
    }
    context = "It is. Passage: so.\nQuestion: is it?\nAnswer:"
    read = read_task("boolq", write(tmp_path, "boolq.jsonl", row))
    assert read.examples == [Example(((context, " no"), (context, " yes")), 1)]


def test_winogrande_scores_the_rest_after_each_option(tmp_path: Path) -> None:
    row = {"context_options": ["So Ann", "So Eve"], "continuation": "left.", "gold": 1}
    read = read_task("winogrande", write(tmp_path, "winogrande.jsonl", row))
    assert read.examples == [Example((("So Ann", " left."), ("So Eve", " left.")), 1)]


def test_lambada_is_the_last_word(tmp_path: Path) -> None:
    row = {"context": "He looked at the", "continuation": "maps"}
    read = read_task("lambada", write(tmp_path, "lambada.jsonl", row))
    assert read.examples == [Example((("He looked at the", " maps"),), None)]


def test_blimp_compares_whole_sentences_part_by_part(tmp_path: Path) -> None:
    rows = [{"task": t, "good": f"{t} good {n}", "bad": f"{t} bad {n}"} for t in "xy" for n in "12"]
    read = read_task("blimp", write(tmp_path, "blimp.jsonl", *rows))
    assert [e.pairs[0][1] for e in read.examples] == [
        " x good 1", " y good 1", " x good 2", " y good 2",
    ]  # fmt: skip
    assert read.examples[0] == Example((("", " x good 1"), ("", " x bad 1")), 0)
    two = read_task("blimp", tmp_path / "blimp.jsonl", 2)
    assert two.examples == read.examples[:2]


def test_limit_takes_the_first(tmp_path: Path) -> None:
    rows = [{**QUESTION, "context": f"Question: {n}"} for n in range(5)]
    path = write(tmp_path, "piqa.jsonl", *rows)
    assert read_task("piqa", path, 2).examples == read_task("piqa", path).examples[:2]
    assert len(read_task("piqa", path, 9).examples) == 5


def test_files_by_name(tmp_path: Path) -> None:
    assert find_file("openbookqa", tmp_path) is None
    path = write(tmp_path, "openbook_qa.jsonl", QUESTION)
    assert find_file("openbookqa", tmp_path) == path
    assert find_file("openbook_qa", tmp_path) is None
    assert find_file("../x", tmp_path) is None


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    one = read_task("piqa", write(tmp_path, "one.jsonl", QUESTION))
    same = read_task("piqa", write(tmp_path, "two.jsonl", QUESTION))
    other = read_task("piqa", write(tmp_path, "three.jsonl", {**QUESTION, "gold": 0}))
    assert one.digest == same.digest != other.digest


def test_line_ends_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "lambada.jsonl"
    row = {"context": "a\u2028b", "continuation": "c"}  # a line separator inside a string
    text = json.dumps(row, ensure_ascii=False)
    path.write_bytes(f"\r\n{text}\r\n\n{text}".encode())
    assert [e.pairs[0][0] for e in read_task("lambada", path).examples] == ["a\u2028b"] * 2


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != key}


WINOGRANDE = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}
BLIMP = {"task": "t", "good": "a", "bad": "b"}


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        *[("piqa", without(QUESTION, key), f"no '{key}'") for key in QUESTION],
        *[("winogrande", without(WINOGRANDE, key), f"no '{key}'") for key in WINOGRANDE],
        *[("blimp", without(BLIMP, key), f"no '{key}'") for key in BLIMP],
        ("lambada", {"context": "a"}, "no 'continuation'"),
        ("lambada", {"context": " ", "continuation": "b"}, "'context' must be a text"),
        ("lambada", {"context": 3, "continuation": "b"}, "'context' must be a text"),
        ("piqa", QUESTION | {"choices": []}, "at least two"),
        ("piqa", QUESTION | {"choices": ["one"]}, "at least two"),
        ("piqa", QUESTION | {"choices": "so"}, "at least two"),
        ("piqa", QUESTION | {"choices": ["a", ""]}, "none of them empty"),
        ("piqa", QUESTION | {"choices": ["a", 2]}, "at least two texts"),
        ("piqa", QUESTION | {"gold": 2}, "0 to 1"),
        ("piqa", QUESTION | {"gold": -1}, "0 to 1"),
        ("piqa", QUESTION | {"gold": True}, "0 to 1"),
        ("piqa", QUESTION | {"gold": "1"}, "0 to 1"),
        ("piqa", [1, 2], "JSON object"),
        ("blimp", BLIMP | {"task": ["t"]}, "'task' must be a text"),
    ],
)
def test_a_line_that_is_not_of_the_form(task: str, row: object, says: str, tmp_path: Path) -> None:
    good = {"piqa": QUESTION, "winogrande": WINOGRANDE, "blimp": BLIMP}
    first = good.get(task, {"context": "a", "continuation": "b"})
    path = write(tmp_path, "x.jsonl", first, row)
    with pytest.raises(CatsparseError, match=rf"x\.jsonl, line 2.*{says}") as caught:
        read_task(task, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no example"),
        (b"\n \n", "no example"),
        (b"{not json}\n", "line 1 is not readable JSON"),
        (b'{"context": NaN}\n', "line 1 is not readable JSON"),
        (b"[" * 100_000, "line 1 is not readable JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_file_that_is_not_of_the_form(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_bytes(content)
    with pytest.raises(CatsparseError, match=says):
        read_task("piqa", path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CatsparseError, match="cannot read"):
        read_task("piqa", tmp_path)


# -- metrics


def scores(*logprobs: float) -> list[Score]:
    return [Score(value, False) for value in logprobs]


def test_accuracy_raw_and_by_length() -> None:
    pairs = (("c", " a"), ("c", " b"))
    examples = [
        Example(pairs, 0, (10, 2)),  # raw: 1; by length: 0
        Example(pairs, 1, (4, 4)),  # 1, 1
        Example(pairs, 0, (1, 1)),  # a tie: the first
    ]
    found = judge_task(LocalTask("piqa", examples, ""), scores(-5, -3, -2, -1, -2, -2), truncated=2)
    # By hand: argmax of raw sums is 1, 1, 0; of sums by length 0, 1, 0.
    assert found.values == [0, 1, 1]
    assert found.metrics["acc"] == pytest.approx(2 / 3)
    assert found.metrics["acc_norm"] == 1
    expected = np.std([0, 1, 1], ddof=1) / math.sqrt(3)
    assert found.metrics["acc_stderr"] == pytest.approx(expected)
    assert found.metrics["acc_norm_stderr"] == 0
    assert (found.metric, found.n, found.truncated) == ("acc", 3, 2)


def test_no_length_no_acc_norm() -> None:
    pairs = (("c", " a"), ("c", " b"))
    found = judge_task(LocalTask("boolq", [Example(pairs, 0)], ""), scores(-1, -2), 0)
    assert found.metrics == {"acc": 1.0}  # of one example there is no error


def test_last_words() -> None:
    examples = [Example((("c", " w"),), None)] * 3
    found = judge_task(
        LocalTask("lambada", examples, ""), [Score(-1, True), Score(-4, False), Score(-2, True)], 0
    )
    assert found.values == [1, 0, 1]
    perplexity = math.exp(7 / 3)
    assert found.metrics["perplexity"] == pytest.approx(perplexity)
    error = perplexity * np.std([1, 4, 2], ddof=1) / math.sqrt(3)
    assert found.metrics["perplexity_stderr"] == pytest.approx(error)
    assert "acc_norm" not in found.metrics


# -- the real files

SIZES = {
    "winogrande": 1267, "piqa": 1000, "openbookqa": 500, "hellaswag": 1000, "boolq": 500,
    "arc_easy": 1000, "arc_challenge": 1000, "lambada": 1500, "blimp": 1340,
}  # fmt: skip


@pytest.mark.parametrize("task", SIZES)
def test_the_shared_files(task: str) -> None:
    folder = SHARED / "data" / "zeroshot"
    if not folder.is_dir():
        pytest.skip(f"the zero-shot files are not here: {folder}")
    path = find_file(task, folder)
    assert path is not None
    assert len(read_task(task, path).examples) == SIZES[task]
    assert task in LOCAL_TASKS
