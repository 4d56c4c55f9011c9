"""Tasks of lm-evaluation-harness: with a stand-in for it, and with itself where it is installed."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import catsparse
from catsparse import CatsparseError, hub
from catsparse.tasks import evaluate_tasks, harness, read_rows
from catsparse.tasks.scoring import Batch, encode_pairs, loglikelihoods
from letters import Letters


class StandIn:
    """Answers as ``lm_eval`` 0.4.13 does, for one task whose two parts hold two examples each."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.results: Any = None
        self.error: Exception | None = None
        self.include: list[str | None] = []

    def simple_evaluate(self, model: Any, **options: Any) -> Any:
        self.calls.append(options)
        if self.error is not None:
            raise self.error
        requests = [(("ab", t), [4, 5], [6, n]) for n, t in enumerate("wxyz", 7)]
        scores = model._loglikelihood_tokens(requests)
        self.scores = scores
        return self.results

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in = self

        class HFLM:
            def __init__(self, **options: Any) -> None:
                self.options = options

        class TaskManager:
            all_tasks = ("parts", "lambada_openai")

            def __init__(self, include_path: str | None) -> None:
                stand_in.include.append(include_path)

        names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
        modules = {name: types.ModuleType(name) for name in names}
        modules["lm_eval"].simple_evaluate = self.simple_evaluate  # type: ignore[attr-defined]
        modules["lm_eval.tasks"].TaskManager = TaskManager  # type: ignore[attr-defined]
        modules["lm_eval.models.huggingface"].HFLM = HFLM  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(harness, "harness_version", lambda: "0.4.13")


def sample(doc: int, part: str, **values: Any) -> dict[str, Any]:
    return {"doc_id": doc, "doc_hash": f"{part}{doc}", "filter": "none", **values}


PARTS = {
    "results": {
        "parts": {"alias": "parts", "acc,none": 0.75, "acc_stderr,none": 0.25, "n,none": "N/A"},
        "b": {"acc,none": 0.5},
    },
    "samples": {
        "b": [sample(1, "b", acc=0.0), sample(0, "b", acc=1.0)],
        "a": [sample(0, "a", acc=1.0), sample(1, "a", acc=1.0)],
    },
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn()
    found.results = PARTS
    found.install(monkeypatch)
    return found


def test_rows_come_from_the_harness(stand_in: StandIn, sparse_llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    dense, row = evaluate_tasks(
        sparse_llama, Letters(), "parts", limit=2, output=path, progress=False
    )
    assert [c["tasks"] for c in stand_in.calls] == [["parts"]] * 2
    assert {c["limit"] for c in stand_in.calls} == {2}
    assert (row.source, row.metric, row.value, row.stderr) == ("lm_eval", "acc", 0.75, 0.25)
    assert row.metrics == {"acc": 0.75, "acc_stderr": 0.25}
    assert (row.correct, row.n) == ("1110", 4)
    assert (row.difference, row.difference_stderr) == (0, 0)
    assert row.versions["lm_eval"] == "0.4.13"
    assert (row.prefill, dense.prefill) == ("masked", None)
    assert row.sparsity > 0.2
    assert read_rows(path) == [dense, row]
    evaluate_tasks(sparse_llama, Letters(), "parts", limit=2, output=path, progress=False)
    assert len(stand_in.calls) == 2


def test_it_scores_with_our_log_likelihoods(stand_in: StandIn, llama: Any) -> None:
    evaluate_tasks(llama, Letters(), "parts", progress=False)
    pairs = [([4, 5], [6, n]) for n in range(7, 11)]
    expected = loglikelihoods(llama, pairs, 128, Batch(rows=1))
    assert stand_in.scores == [
        (pytest.approx(score.logprob, rel=1e-5), score.greedy) for score in expected
    ]


def test_a_dense_layer_is_refused_here_too(stand_in: StandIn, sparse_llama: Any) -> None:
    mlp = sparse_llama.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, _: setattr(module, "catsparse_enabled", False))
    with pytest.raises(CatsparseError, match="ran dense"):
        evaluate_tasks(sparse_llama, Letters(), "parts", progress=False)


def test_other_metrics(stand_in: StandIn, llama: Any) -> None:
    """gsm8k has two filters; a tag has no figure of its own; a perplexity none by example."""
    rows = [
        sample(0, "g", exact_match=1.0) | {"filter": "strict-match"},
        sample(0, "g", exact_match=0.0) | {"filter": "flexible-extract"},
        sample(1, "g", exact_match=1.0) | {"filter": "strict-match"},
        sample(1, "g", exact_match=1.0) | {"filter": "flexible-extract"},
    ]
    figures = {
        "exact_match,strict-match": 1.0,
        "exact_match_stderr,strict-match": 0.0,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": 0.5,
    }
    stand_in.results = {"results": {"parts": figures}, "samples": {"parts": rows}}
    (row,) = evaluate_tasks(llama, Letters(), "parts", progress=False)
    assert row.metric == "exact_match,flexible-extract"
    assert (row.value, row.stderr, row.correct, row.n) == (0.5, 0.5, "01", 2)
    stand_in.results = {"results": {"a": {"acc,none": 1.0}}, "samples": PARTS["samples"]}
    (row,) = evaluate_tasks(llama, Letters(), "parts", progress=False)
    assert (row.metric, row.value, row.stderr) == ("acc", 0.75, 0.25)
    stand_in.results = {
        "results": {"parts": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"}},
        "samples": {"parts": [sample(0, "p", word_perplexity=(-3.0, 2))]},
    }
    (row,) = evaluate_tasks(llama, Letters(), "parts", progress=False)
    assert (row.metric, row.value, row.stderr, row.correct) == ("word_perplexity", 12.5, None, None)
    assert row.n == 1
    stand_in.results = {"results": {}, "samples": {}}
    with pytest.raises(CatsparseError, match="no number"):
        evaluate_tasks(llama, Letters(), "parts", progress=False)


def test_names(stand_in: StandIn, llama: Any, tmp_path: Path) -> None:
    evaluate_tasks(llama, Letters(), "lambada", progress=False)
    assert stand_in.calls[0]["tasks"] == ["lambada_openai"]
    with pytest.raises(CatsparseError, match="no task named 'absent'"):
        evaluate_tasks(llama, Letters(), "parts,absent", progress=False)
    assert len(stand_in.calls) == 1
    assert stand_in.include == [None, None]
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    with pytest.raises(CatsparseError):
        evaluate_tasks(llama, Letters(), "absent", folder=tmp_path, progress=False)
    assert stand_in.include[-1] == str(tmp_path)


class HubError(Exception):
    pass


HubError.__module__ = "huggingface_hub.errors"


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it. More."), HubError("gone")])
def test_a_hub_out_of_reach(error: Exception, stand_in: StandIn, llama: Any) -> None:
    stand_in.error = error
    with pytest.raises(CatsparseError, match=r"data of the task parts .*check the network"):
        evaluate_tasks(llama, Letters(), "parts", progress=False)
    stand_in.error = ZeroDivisionError("a fault of its own")
    with pytest.raises(ZeroDivisionError):
        evaluate_tasks(llama, Letters(), "parts", progress=False)


# -- with lm-eval itself

OWN = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
  cache_dir: {cache}
validation_split: validation
{body}
metadata:
  version: 1.0
"""
# As the harness's own files have them, apart from where the data is.
BODIES = {
    "arc": """output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "lambada": """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]""",
    "blimp": """output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list: [{metric: acc}]""",
    "winogrande": """output_type: multiple_choice
doc_to_text: "{{(answer | int) - 1}}"
doc_to_target: "{{sentence.split('_')[1].strip()}}"
doc_to_choice: "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}"
metric_list: [{metric: acc}]""",
}
STORY = hub.bundled_text("heldout").read_text(encoding="utf-8")[2000:12000].split()


def documents(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Twelve examples in our form and in that of the harness's data."""
    ours, theirs = [], []
    for n in range(12):
        words = STORY[40 * n : 40 * n + 40]
        one, two = " ".join(words[25:28]), " ".join(words[31:36])
        beginning = " ".join(words[:25])
        if task == "arc":
            ours.append({"context": f"Question: {beginning}", "choices": [one, two], "gold": n % 2})
            choices = {"text": [one, two], "label": ["A", "B"]}
            theirs.append({"question": beginning, "choices": choices, "answerKey": "AB"[n % 2]})
        elif task == "lambada":
            ours.append({"context": beginning, "continuation": words[25]})
            theirs.append({"text": f"{beginning} {words[25]}"})
        elif task == "blimp":
            ours.append({"task": "t", "good": one, "bad": two})
            theirs.append({"sentence_good": one, "sentence_bad": two})
        else:
            options = [f"{beginning} {word}" for word in ("he", "they")]
            ours.append({"context_options": options, "continuation": one, "gold": n % 2})
            names = {"option1": "he", "option2": "they", "answer": str(n % 2 + 1)}
            theirs.append({"sentence": f"{beginning} _ {one}", **names})
    return ours, theirs


@pytest.mark.parametrize("task", BODIES)
def test_the_same_examples_by_lm_eval(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our files and scorer beside its own prompts, scorer (padded batches) and metrics."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    local = "arc_easy" if task == "arc" else task
    for name, rows in zip(("ours", "theirs"), documents(task), strict=True):
        (tmp_path / name).mkdir()
        file = tmp_path / name / (f"{local}.jsonl" if name == "ours" else "data.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = {"data": tmp_path / "theirs" / "data.jsonl", "cache": tmp_path / "cache"}
    text = OWN.format(name=f"my_{task}", body=BODIES[task], **places)
    (tmp_path / "theirs" / "task.yaml").write_text(text)

    model, tokenizer = (
        hub.load_dense_model("default", dtype="float32"),
        hub.load_tokenizer("default"),
    )
    (mine,) = evaluate_tasks(model, tokenizer, local, folder=tmp_path / "ours", progress=False)
    manager = TaskManager(include_path=str(tmp_path / "theirs"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
        tasks=[f"my_{task}"],
        task_manager=manager,
        bootstrap_iters=10,
    )
    theirs = found["results"][f"my_{task}"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "perplexity"):
        assert mine.metrics.get(metric) == (
            pytest.approx(theirs[f"{metric},none"], rel=1e-4)
            if f"{metric},none" in theirs
            else None
        )
    correct = [str(int(s["acc"])) for s in found["samples"][f"my_{task}"]]
    assert mine.correct == "".join(correct)
    # And by our own way through it, sparse as well.
    calibration = catsparse.calibrate(
        model, [" ".join(STORY)], tokenizer, seq_len=64, tokens=1024, progress=False
    )
    catsparse.sparsify(model, calibration, 0.5)
    through = evaluate_tasks(
        model, tokenizer, f"my_{task}", folder=tmp_path / "theirs", progress=False
    )
    direct = evaluate_tasks(model, tokenizer, local, folder=tmp_path / "ours", progress=False)
    for one, other in zip(through, direct, strict=True):
        assert one.correct == other.correct
        assert one.sparsity == pytest.approx(other.sparsity, abs=1e-3)
        assert one.metrics["acc"] == other.metrics["acc"]
    assert direct[0].correct == mine.correct
    assert through[1].source == "lm_eval"


def test_pairs_are_encoded_as_lm_eval_does() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = hub.load_dense_model("default"), hub.load_tokenizer("default")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    pairs = [("The door ", "opened"), ("a  ", " b"), ("He said:\n", "no"), ("x", "y")]
    assert encode_pairs(pairs, tokenizer) == [theirs._encode_pair(*pair) for pair in pairs]
