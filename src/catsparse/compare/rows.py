"""Results of a comparison as rows of a jsonl file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CatsparseError
from ..quantized_linear import FLOAT_NAMES
from ..rows import read_lines
from ..tasks import TaskRow
from ..tasks.rows import read_rows_as

# Of rows of before there were formats.
_FLOATS = {str(dtype).removeprefix("torch."): name for dtype, name in FLOAT_NAMES.items()}


@dataclass(frozen=True)
class CompareRow:
    """One setting measured on one text, a line of the file.

    Attributes:
        model: the dense model. dtype, device: that it ran in and on.
        method, compensate, preview, allocation: how it was made sparse.
            ``dense``: not at all.
        scope: ``mlp`` or ``all``: whose weight bytes are counted.
        weights: ``int8``, ``fp8`` or ``int4`` if all that decode reads was packed, else the dtype's
            short name. bytes_read: of all linear layers for a token, whatever ``scope``; None of
            models with experts, and in files of before there was this.
        target: fraction of them asked not to be read.
        bytes_skipped: the fraction measured on the text. sparsity: neurons (with ``teal`` and
            ``wina`` inputs) dropped there.
        perplexity, dense_perplexity: with their standard errors ``..._se`` (None: of a single
            window there is none).
        rise: perplexity over dense perplexity, less 1. rise_se: of it, from paired windows.
        tokens: scored. heldout: the text's name.
        calibration, calibration_tokens: the text that thresholds come from.
        seq_len: length of the windows of ``heldout``.
        prefill: ``masked``: every token was thresholded.
        key: alike for the same weights, tokens and setting.
        versions: of the packages.
    """

    model: str
    dtype: str
    device: str
    method: str
    compensate: bool
    preview: int | None
    allocation: str
    scope: str
    target: float
    bytes_skipped: float
    sparsity: float
    perplexity: float
    perplexity_se: float | None
    dense_perplexity: float
    dense_perplexity_se: float | None
    rise: float
    rise_se: float | None
    tokens: int
    heldout: str
    calibration: str
    calibration_tokens: int
    seq_len: int
    prefill: str
    key: str
    versions: dict[str, str]
    weights: str | None = None
    bytes_read: float | None = None


@dataclass(frozen=True)
class CompareTaskRow(TaskRow):
    """One task scored dense or in one setting, a line of the file: a row of tasks, and the rest of
    the setting. What follows is None in dense rows, but ``weights``.

    Attributes:
        variant: also ``packed``: dense on packed weights; its ``method`` is ``dense``.
        allocation: how sparsity is spread over the layers.
        bytes_asked: fraction of the scope's weight bytes asked not to be read, the setting's
            budget; ``target`` is the sparsity that it came to.
        calibration, calibration_tokens: the text that thresholds come from.
        weights: as in :class:`CompareRow`.
    """

    allocation: str | None
    bytes_asked: float | None
    calibration: str | None
    calibration_tokens: int | None
    weights: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`catsparse.compare.compare` finds.

    Attributes:
        rows: one for each setting and text, in the order of the settings.
        tasks: of each task a dense row, then one for each setting.
    """

    rows: list[CompareRow]
    tasks: list[CompareTaskRow]


def read_rows(path: Path) -> list[CompareRow]:
    """The rows of a file; none if there is no such file.

    Raises:
        CatsparseError: it cannot be read, or holds something else.
    """
    return [_row_from(raw, where) for raw, where in read_lines(path)]


def read_task_rows(path: Path) -> list[CompareTaskRow]:
    """The tasks' rows of a file; none if there is no such file.

    Raises:
        CatsparseError: it cannot be read, or holds something else.
    """
    rows = read_rows_as(
        CompareTaskRow, path, "'catsparse compare --tasks'; name another output folder"
    )
    return [replace(row, weights=row.weights or _FLOATS.get(row.dtype)) for row in rows]


def best_rows(rows: Sequence[CompareRow]) -> set[str]:
    """Keys of the rows of least rise, one for each text, format of weights and budget."""
    best: dict[tuple[str, str | None, float], CompareRow] = {}
    for row in rows:
        group = (row.heldout, row.weights, row.target)
        if group not in best or row.rise < best[group].rise:
            best[group] = row
    return {row.key for row in best.values()}


def _row_from(raw: Any, where: str) -> CompareRow:
    words = ("method", "allocation", "scope", "key", "heldout", "dtype")
    numbers = ("target", "bytes_skipped", "sparsity", "perplexity", "rise", "tokens")
    names = {field.name for field in fields(CompareRow)}
    if (
        not isinstance(raw, dict)
        or not names - {"weights", "bytes_read"} <= raw.keys() <= names
        or not all(isinstance(raw[name], int | float) for name in numbers)
        or not all(isinstance(raw[name], str) for name in words)
    ):
        raise CatsparseError(f"{where} is no row of 'catsparse compare'; name another folder")
    row = CompareRow(**raw)
    return replace(row, weights=row.weights or _FLOATS.get(row.dtype))
