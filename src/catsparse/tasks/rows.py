"""Results of tasks as rows of a jsonl file: what they hold, and what makes two alike."""

from __future__ import annotations

import hashlib
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import CatsparseError
from ..judge import standard_error
from ..rows import read_lines
from ..surgery import sparse_layers


@dataclass(frozen=True)
class Outcome:
    """What one variant of a model scores on a task.

    Attributes:
        metric: the first of the metrics, the one that is compared.
        metrics: each metric, and its standard error under ``<metric>_stderr``.
        values: the metric of each example; None if it is not known by example.
        n: examples.
        truncated: texts that lost their beginning to the context window.
    """

    metric: str
    metrics: dict[str, float]
    values: list[float] | None
    n: int
    truncated: int = 0


@dataclass(frozen=True)
class TaskRow:
    """One task and variant of a model, a line of the file.

    Attributes:
        task: name. source: ``local`` (a jsonl file) or ``lm_eval``.
        variant: ``dense`` or ``sparse``.
        metric, value, stderr: the first metric (None: of a single example there is no error).
        metrics: all of them, with ``<metric>_stderr``.
        n: examples. limit: how many were asked for; None for all.
        truncated: texts that lost their beginning to the context window.
        difference: sparse less dense on the same examples. difference_stderr: of it, from the
            paired examples. None in dense rows.
        correct: ``1`` or ``0`` for each example, if that is what the metric counts.
        model: the base model. dtype, device: that it ran in and on.
        method, compensate, preview, scope, target, down_target: of the sparse model; ``target`` is
            the sparsity asked for. None in dense rows.
        prefill: the policy it was scored under: ``masked``, every token thresholded; None if dense.
        sparsity, down_sparsity, bytes_skipped: achieved on the task's own tokens.
        key: alike for the same task, examples, weights and thresholds.
        versions: of the packages.
    """

    task: str
    source: str
    variant: str
    metric: str
    value: float
    stderr: float | None
    metrics: dict[str, float]
    n: int
    limit: int | None
    truncated: int
    difference: float | None
    difference_stderr: float | None
    correct: str | None
    model: str
    dtype: str
    device: str
    method: str | None
    compensate: bool | None
    preview: int | None
    scope: str | None
    target: float | None
    down_target: float | None
    prefill: str | None
    sparsity: float
    down_sparsity: float
    bytes_skipped: float
    key: str
    versions: dict[str, str]


R = TypeVar("R", bound=TaskRow)


def correct_string(values: list[float] | None) -> str | None:
    if values is None or any(value not in (0.0, 1.0) for value in values):
        return None
    return "".join("1" if value else "0" for value in values)


def paired(dense: TaskRow, value: float, correct: str | None) -> tuple[float, float | None]:
    """How much more a sparse result is than the dense one, and the error of that difference."""
    if correct is None or dense.correct is None or len(correct) != len(dense.correct):
        return value - dense.value, None
    changes = [int(a) - int(b) for a, b in zip(correct, dense.correct, strict=True)]
    error = standard_error(torch.tensor(changes, dtype=torch.float64))
    return value - dense.value, error if math.isfinite(error) else None


def read_rows(path: Path) -> list[TaskRow]:
    """The rows of a file; none if there is no such file.

    Raises:
        CatsparseError: it cannot be read, or holds something else.
    """
    return read_rows_as(TaskRow, path, "'catsparse evaluate --tasks'; name another file to write")


def read_rows_as(kind: type[R], path: Path, command: str) -> list[R]:
    """The rows of a file as ``kind``; ``command`` is what writes such a file, and the remedy."""
    return [_row(kind, raw, where, command) for raw, where in read_lines(path)]


def _row(kind: type[R], raw: Any, where: str, command: str) -> R:
    kinds: dict[str, Any] = {
        "key": str,
        "metrics": dict,
        "value": (int, float),
        "n": int,
        "sparsity": (int, float),
    }
    names = {field.name for field in fields(kind)}
    later = {field.name for field in fields(kind) if field.default is not MISSING}
    if (
        not isinstance(raw, dict)
        or not names - later <= raw.keys() <= names
        or not all(isinstance(raw[name], of) for name, of in kinds.items())
        or not isinstance(raw["correct"], str | None)
        or set(raw["correct"] or "") - {"0", "1"}
    ):
        raise CatsparseError(f"{where} is no row of {command}")
    return kind(**raw)


def thresholds_digest(model: Any) -> str:
    """Of all in the sparse layers that decides what is dropped and by what it is replaced."""
    digest = hashlib.sha256()
    for name, layer in sparse_layers(model).items():
        bits = getattr(layer, "catsparse_preview_bits", None)
        digest.update(f"{name} {bits}".encode())
        for part in ("threshold", "mean", "product_threshold"):
            value = getattr(layer, f"catsparse_{part}", None)
            digest.update(b"-" if value is None else value.float().cpu().numpy().tobytes())
    return digest.hexdigest()
