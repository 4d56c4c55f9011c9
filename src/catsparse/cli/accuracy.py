"""Tasks' rows on the terminal and as JSON, alike in ``evaluate`` and ``compare``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tasks import TaskRow


def without_examples(rows: Sequence[TaskRow]) -> list[dict[str, Any]]:
    """For JSON: the string with a digit an example stays in the file."""
    return [{k: v for k, v in asdict(row).items() if k != "correct"} for row in rows]


def titled(row: TaskRow) -> str:
    return row.task if row.metric == "acc" else f"{row.task} ({row.metric})"


def is_share(row: TaskRow) -> bool:
    return row.metric.startswith(("acc", "exact_match"))


def average(values: list[tuple[float, float | None]], form: str = ".1f") -> str:
    errors = [error for _, error in values if error is not None]
    known = len(errors) == len(values)
    error = math.hypot(*errors) / len(values) if known else None
    return with_error(sum(value for value, _ in values) / len(values), error, True, form)


def with_error(value: float, error: float | None, share: bool, form: str = ".1f") -> str:
    """A share in percent."""
    scale = 100 if share else 1
    shown = f"{scale * value:{form}}"
    return shown if error is None else f"{shown} ± {scale * error:{form.lstrip('+')}}"
