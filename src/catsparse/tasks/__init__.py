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

__all__ = ["LOCAL_TASKS", "STANDARD_TASKS", "TaskRow", "evaluate_tasks", "read_rows"]

Run = Callable[[Batch, Callable[[int], object]], Outcome]


@dataclass(frozen=True)
class _Job:
    """A task ready to run; ``total`` tokens, None where the harness alone knows."""

    name: str
    source: str
    examples: str  # what stands for its examples in a row's key
    total: int | None
    run: Run


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
    if limit is not None and limit < 1:
        raise CatsparseError(f"limit must be at least 1 example, not {limit}")
    if batch_size is not None and batch_size < 1:
        raise CatsparseError(f"batch_size must be at least 1, not {batch_size}")
    path = None if output is None else Path(output)
    known = {} if path is None else {row.key: row for row in read_rows(path)}
    jobs = _jobs(model, tokenizer, tasks, None if folder is None else Path(folder), limit)
    weights, rows = weights_digest(model), []
    thresholds = thresholds_digest(model) if sparse_modules(model) else None
    with evaluating(model), progress_bar(progress) as bar:
        for job in jobs:
            dense: TaskRow | None = None
            for variant in ("dense", "sparse")[: 1 if thresholds is None else 2]:
                parts = [job.name, job.source, job.examples, limit, weights, str(model.dtype)]
                key = key_of(*parts, thresholds if variant == "sparse" else None)
                row = known.get(key)
                if row is None:
                    row = _measured(model, job, key, limit, batch_size, dense, bar)
                    if path is not None:
                        add_row(path, row)
                rows.append(row)
                dense = row
    return rows


def _jobs(
    model: Any, tokenizer: Any, tasks: str | list[str], folder: Path | None, limit: int | None
) -> list[_Job]:
    """Everything that can be wrong with the input is found here, before anything is scored."""
    if folder is not None and not folder.is_dir():
        raise CatsparseError(f"{folder} is no folder; name the one that holds the tasks' files")
    jobs, manager = [], None
    for name in _names(tasks, folder):
        path = None if folder is None else find_file(name, folder)
        if path is not None:
            jobs.append(_local_job(model, tokenizer, read_task(name, path, limit)))
            continue
        if (reason := harness.why_not_harness()) is not None:
            place = "no --tasks-data was given" if folder is None else f"{folder} has no file of it"
            raise CatsparseError(f"cannot run the task {shorten(name)}: {place}, and {reason}")
        manager = manager or harness.task_manager(folder)
        harness.check_name(name, manager)
        jobs.append(_harness_job(model, tokenizer, name, manager, limit))
    return jobs


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


def _local_job(model: Any, tokenizer: Any, task: LocalTask) -> _Job:
    window = context_window(model, tokenizer)
    pairs = encode_pairs([p for example in task.examples for p in example.pairs], tokenizer)
    truncated = sum(is_truncated(pair, window) for pair in pairs)

    def run(batch: Batch, advance: Callable[[int], object]) -> Outcome:
        scores = loglikelihoods(model, pairs, window, batch, advance)
        return judge_task(task, scores, truncated)

    return _Job(task.name, "local", task.digest, count_tokens(pairs, window), run)


def _harness_job(model: Any, tokenizer: Any, name: str, manager: Any, limit: int | None) -> _Job:
    def run(batch: Batch, advance: Callable[[int], object]) -> Outcome:
        return harness.run_task(model, tokenizer, name, manager, limit, batch, advance)

    return _Job(name, "lm_eval", f"lm_eval {harness.harness_version()}", None, run)


def _measured(
    model: Any,
    job: _Job,
    key: str,
    limit: int | None,
    batch_size: int | None,
    dense: TaskRow | None,
    bar: Progress,
) -> TaskRow:
    """The dense row, or the sparse one that belongs to ``dense``."""
    variant = "dense" if dense is None else "sparse"
    line = bar.add_task(f"{job.name} {variant}", total=job.total)

    def attempt(size: int) -> tuple[Outcome, SparsityMeter | None]:
        bar.reset(line)
        batch = Batch(tokens=size) if batch_size is None else Batch(rows=size)
        with contextlib.ExitStack() as stack:
            meter = stack.enter_context(scored_sparse(model)) if dense is not None else None
            if dense is None:
                stack.enter_context(run_dense(model))
            return job.run(batch, lambda tokens: bar.advance(line, tokens)), meter

    automatic = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS
    outcome, meter = while_it_fits(batch_size or automatic, attempt)
    bar.remove_task(line)
    return _row(model, job, key, limit, outcome, meter, dense)


def _row(
    model: Any,
    job: _Job,
    key: str,
    limit: int | None,
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
    if job.source == "lm_eval":
        versions["lm_eval"] = harness.harness_version()
    return TaskRow(
        task=job.name,
        source=job.source,
        variant="dense" if meter is None else "sparse",
        metric=outcome.metric,
        value=value,
        stderr=outcome.metrics.get(f"{outcome.metric}_stderr"),
        metrics=outcome.metrics,
        n=outcome.n,
        limit=limit,
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
