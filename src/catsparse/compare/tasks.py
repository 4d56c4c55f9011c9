"""Zero-shot accuracy in a comparison: each task dense once, then in every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..observation import evaluating
from ..quantized_linear import weights_name
from ..rows import add_row
from ..tasks import Task, score_task
from ..tasks.rows import paired
from .rows import CompareTaskRow, read_task_rows
from .settings import DENSE, Setting

TASKS_FILE_NAME = "tasks.jsonl"


class TaskScores:
    """The tasks of one comparison and the rows of them that are known.

    Args:
        model: scored as it is when it is asked for; see :func:`catsparse.compare.compare`.
        tasks: of :func:`catsparse.tasks.prepare_tasks`.
        weights: the model's digest.
        calibration: name of the text that thresholds come from, and its tokens.
        folder: of ``tasks.jsonl``.

    Raises:
        CatsparseError: ``tasks.jsonl`` holds something else.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[Task],
        weights: str,
        calibration: tuple[str, int],
        folder: Path | None,
    ) -> None:
        self.model, self.tasks, self.weights = model, tasks, weights
        self.calibration = calibration
        self.path = None if folder is None or not tasks else folder / TASKS_FILE_NAME
        rows = [] if self.path is None else read_task_rows(self.path)
        self.known = {row.key: row for row in rows}

    def key(self, task: Task, sparse: str | None) -> str:
        """By the setting's key, not by thresholds: what is known needs no calibration."""
        return task.key(self.weights, self.model.dtype, sparse)

    def left(self, sparse: str | None) -> list[Task]:
        """The tasks not known in the setting of this key; None: dense."""
        return [task for task in self.tasks if self.key(task, sparse) not in self.known]

    def score_dense(self, task: Task, bar: Progress) -> None:
        self._score(task, None, None, bar)

    def score(self, task: Task, setting: Setting, sparse: str, bar: Progress) -> None:
        """Of the model made sparse in ``setting``, whose key is ``sparse``."""
        self._score(task, setting, sparse, bar)

    def _score(
        self, task: Task, setting: Setting | None, sparse: str | None, bar: Progress
    ) -> None:
        key, dense = self.key(task, sparse), None
        packed = setting is not None and setting.method == DENSE
        if setting is not None:
            dense = self.known[self.key(task, None)]
        with evaluating(self.model):
            scored = score_task(self.model, task, key, None if packed else dense, bar)
        if packed and dense is not None:
            difference, error = paired(dense, scored.value, scored.correct)
            scored = replace(
                scored,
                variant="packed",
                method=DENSE,
                compensate=False,
                difference=difference,
                difference_stderr=error,
            )
        name, tokens = self.calibration
        row = CompareTaskRow(
            **vars(scored),
            allocation=None if setting is None else setting.allocation,
            bytes_asked=None if setting is None else setting.bytes_skipped,
            calibration=None if setting is None else name,
            calibration_tokens=None if setting is None else tokens,
            weights=weights_name(self.model),
        )
        self.known[row.key] = row
        if self.path is not None:
            add_row(self.path, row)

    def rows(self, settings: Sequence[str]) -> list[CompareTaskRow]:
        """Of each task the dense row, then one for each setting, named by its key."""
        return [self.known[self.key(task, s)] for task in self.tasks for s in (None, *settings)]
