"""Zero-shot tasks, dense beside sparse on the same examples, as rows.

``local`` reads tasks from jsonl files, ``harness`` takes them from lm-evaluation-harness; both
score with ``scoring``. ``rows`` holds results and their file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress

from .._version import __version__
from ..errors import CatsparseError
from ..judge import progress_bar, scored_sparse, while_it_fits
from ..meter import SparsityMeter
from ..modules import sparse_modules
from ..observation import evaluating
from ..rows import add_row, key_of, model_name, weights_digest
from ..strict_json import shorten
from ..surgery import run_dense, state_of
from . import harness
from .local import LOCAL_TASKS, LocalTask, find_file, judge_task, read_task
from .rows import (
    Outcome,
    TaskRow,
    correct_string,
    paired,
    read_rows,
    thresholds_digest,
)
from .scoring import Batch, context_window, count_tokens, encode_pairs, is_truncated, loglikelihoods

# What the paper measures, and three more; `all` where there are no local files.
STANDARD_TASKS = (*LOCAL_TASKS, "gsm8k")
# Tokens of an automatic batch, halved for as long as memory is too small.
_CPU_TOKENS, _GPU_TOKENS = 2048, 32768

__all__ = [
    "LOCAL_TASKS",
    "STANDARD_TASKS",
    "Task",
    "TaskRow",
    "evaluate_tasks",
    "prepare_tasks",
    "read_rows",
    "score_task",
]

Run = Callable[[Any, Batch, Callable[[int], object]], Outcome]


@dataclass(frozen=True)
class Task:
    """A task ready to be scored; see :func:`prepare_tasks`.

    Attributes:
        name: of the task. source: ``local`` or ``lm_eval``.
        examples: what stands for its examples in a row's key.
        limit: at most so many of them; None for all.
        total: tokens to score; None where the harness alone knows.
        run: scores a model, in batches, and tells of each batch's tokens.
    """

    name: str
    source: str
    examples: str
    limit: int | None
    total: int | None
    run: Run

    def key(self, weights: str, dtype: torch.dtype, sparse: str | None) -> str:
        """Alike for the same task, examples, weights and, if ``sparse``, way to be sparse."""
        return key_of(
            *(self.name, self.source, self.examples, self.limit, weights, str(dtype), sparse)
        )


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: str | list[str] = "all",
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> list[TaskRow]:
    """Score a model's zero-shot tasks, dense and, if it is sparse, sparse on the same examples.

    Every token is thresholded, whatever the prefill policy.

    Args:
        model: a causal language model, sparse or dense.
        tokenizer: its tokenizer.
        tasks: names, in a list or with commas between them, or ``all``: every task that has a file
            in ``folder``, without a folder :data:`STANDARD_TASKS`.
        folder: of jsonl files. What has none there is taken from lm-evaluation-harness, which
            also knows the tasks of ``.yaml`` files in this folder.
        limit: at most so many examples a task.
        batch_size: texts a forward pass; None finds it.
        output: a jsonl file that each row is added to as soon as it is known. What it already
            holds for the same task, examples, weights and thresholds is not run again.
        progress: show a progress bar on stderr.

    Returns:
        For each task a dense row and, of a sparse model, a sparse row after it.

    Raises:
        CatsparseError: an unknown task, a file that is not of a task's form, no way to the
            harness's data, or a sparse layer that ran dense.
    """
    if batch_size is not None and batch_size < 1:
        raise CatsparseError(f"batch_size must be at least 1, not {batch_size}")
    path = None if output is None else Path(output)
    known = {} if path is None else {row.key: row for row in read_rows(path)}
    prepared = prepare_tasks(model, tokenizer, tasks, folder=folder, limit=limit)
    weights, rows = weights_digest(model), []
    thresholds = thresholds_digest(model) if sparse_modules(model) else None
    with evaluating(model), progress_bar(progress) as bar:
        for task in prepared:
            dense: TaskRow | None = None
            for variant in ("dense", "sparse")[: 1 if thresholds is None else 2]:
                key = task.key(weights, model.dtype, thresholds if variant == "sparse" else None)
                row = known.get(key)
                if row is None:
                    row = score_task(model, task, key, dense, bar, batch_size)
                    if path is not None:
                        add_row(path, row)
                rows.append(row)
                dense = row
    return rows


def prepare_tasks(
    model: Any,
    tokenizer: Any,
    tasks: str | list[str] = "all",
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
) -> list[Task]:
    """Read the tasks' examples; arguments are those of :func:`evaluate_tasks`.

    Returns:
        The tasks in the order named, each once.

    Raises:
        CatsparseError: everything that can be wrong with this input, before anything is scored.
    """
    if limit is not None and limit < 1:
        raise CatsparseError(f"limit must be at least 1 example, not {limit}")
    root = None if folder is None else Path(folder)
    if root is not None and not root.is_dir():
        raise CatsparseError(f"{root} is no folder; name the one that holds the tasks' files")
    prepared, manager = [], None
    for name in _names(tasks, root):
        path = None if root is None else find_file(name, root)
        if path is not None:
            prepared.append(_local_task(model, tokenizer, read_task(name, path, limit), limit))
            continue
        if (reason := harness.why_not_harness()) is not None:
            place = "no --tasks-data was given" if root is None else f"{root} has no file of it"
            raise CatsparseError(f"cannot run the task {shorten(name)}: {place}, and {reason}")
        manager = manager or harness.task_manager(root)
        harness.check_name(name, manager)
        prepared.append(_harness_task(tokenizer, name, manager, limit))
    return prepared


def _names(tasks: str | list[str], folder: Path | None) -> list[str]:
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = list(dict.fromkeys(name.strip() for name in given))
    if names == ["all"]:
        if folder is None:
            return list(STANDARD_TASKS)
        names = [name for name in LOCAL_TASKS if find_file(name, folder) is not None]
        if not names:
            raise CatsparseError(f"{folder} holds no task's file, such as piqa.jsonl")
    if not names or not all(names) or "all" in names:
        raise CatsparseError("tasks must be names with commas between them, or 'all' alone")
    return names


def _local_task(model: Any, tokenizer: Any, task: LocalTask, limit: int | None) -> Task:
    window = context_window(model, tokenizer)
    pairs = encode_pairs([p for example in task.examples for p in example.pairs], tokenizer)
    truncated = sum(is_truncated(pair, window) for pair in pairs)

    def run(model: Any, batch: Batch, advance: Callable[[int], object]) -> Outcome:
        scores = loglikelihoods(model, pairs, window, batch, advance)
        return judge_task(task, scores, truncated)

    return Task(task.name, "local", task.digest, limit, count_tokens(pairs, window), run)


def _harness_task(tokenizer: Any, name: str, manager: Any, limit: int | None) -> Task:
    def run(model: Any, batch: Batch, advance: Callable[[int], object]) -> Outcome:
        return harness.run_task(model, tokenizer, name, manager, limit, batch, advance)

    return Task(name, "lm_eval", f"lm_eval {harness.harness_version()}", limit, None, run)


def score_task(
    model: Any,
    task: Task,
    key: str,
    dense: TaskRow | None,
    bar: Progress,
    batch_size: int | None = None,
) -> TaskRow:
    """Score a model in evaluation mode.

    Args:
        model: the one that ``task`` was prepared for, sparse or dense.
        task: of :func:`prepare_tasks`.
        key: of the row.
        dense: None to score the model dense; to score it sparse, its dense row.
        bar: gets a line for the time that it takes.
        batch_size: texts a forward pass; None finds it.

    Returns:
        The dense row, or the sparse one that belongs to ``dense``.

    Raises:
        CatsparseError: no way to the harness's data, or a sparse layer that ran dense.
    """
    variant = "dense" if dense is None else "sparse"
    line = bar.add_task(f"{task.name} {variant}", total=task.total)

    def attempt(size: int) -> tuple[Outcome, SparsityMeter | None]:
        bar.reset(line)
        batch = Batch(tokens=size) if batch_size is None else Batch(rows=size)
        with contextlib.ExitStack() as stack:
            meter = stack.enter_context(scored_sparse(model)) if dense is not None else None
            if dense is None:
                stack.enter_context(run_dense(model))
            return task.run(model, batch, lambda tokens: bar.advance(line, tokens)), meter

    automatic = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS
    outcome, meter = while_it_fits(batch_size or automatic, attempt)
    bar.remove_task(line)
    return _row(model, task, key, outcome, meter, dense)


def _row(
    model: Any,
    task: Task,
    key: str,
    outcome: Outcome,
    meter: SparsityMeter | None,
    dense: TaskRow | None,
) -> TaskRow:
    value, correct = outcome.metrics[outcome.metric], correct_string(outcome.values)
    difference = (None, None) if dense is None else paired(dense, value, correct)
    config = None if meter is None else state_of(model).config
    versions = {
        "catsparse": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if task.source == "lm_eval":
        versions["lm_eval"] = harness.harness_version()
    return TaskRow(
        task=task.name,
        source=task.source,
        variant="dense" if meter is None else "sparse",
        metric=outcome.metric,
        value=value,
        stderr=outcome.metrics.get(f"{outcome.metric}_stderr"),
        metrics=outcome.metrics,
        n=outcome.n,
        limit=task.limit,
        truncated=outcome.truncated,
        difference=difference[0],
        difference_stderr=difference[1],
        correct=correct,
        model=model_name(model),
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
        method=None if config is None else config.method,
        compensate=None if config is None else config.compensate,
        preview=None if config is None else config.preview,
        scope=None if config is None else config.scope,
        target=None if config is None else config.sparsity,
        down_target=None if config is None else config.down_sparsity,
        prefill=None if meter is None else "masked",
        sparsity=0.0 if meter is None else meter.sparsity,
        down_sparsity=0.0 if meter is None else meter.down_sparsity,
        bytes_skipped=0.0 if meter is None else meter.bytes_skipped,
        key=key,
        versions=versions,
    )
