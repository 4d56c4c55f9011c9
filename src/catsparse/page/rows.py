"""The result rows that a page shows: read from files of any of the commands, checked, trimmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..config import SparsityConfig
from ..errors import CatsparseError
from ..strict_json import parse_json, shorten
from .levels import parts_of
from .numbers import portable, rounded

MAX_BYTES = 16 * 2**20  # a file's; ten thousand rows are about 5 MB
MAX_ROWS = 5000  # of a page
_WHAT = "'catsparse compare', 'evaluate' or 'bench op' and 'bench decode'"

# Fields that are kept: s(tring), b(ool), n(umber), with ? null, too.
_SETTING = {"method": "s", "compensate": "b", "preview": "n?"}
_MEASURED = {
    "perplexity": "n",
    "perplexity_se": "n?",
    "dense_perplexity": "n",
    "dense_perplexity_se": "n?",
    "rise": "n",
    "rise_se": "n?",
    "sparsity": "n",
    "bytes_skipped": "n",
    "tokens": "n",
}
_COMPARE = (
    _SETTING
    | _MEASURED
    | {"model": "s", "allocation": "s", "target": "n", "heldout": "s", "weights": "s?"}
)
_EVALUATE = _SETTING | _MEASURED | {"base_model": "s", "data": "s", "seq_len": "n"}
_TASK = {
    "task": "s",
    "variant": "s",
    "metric": "s",
    "value": "n",
    "stderr": "n?",
    "n": "n",
    "difference": "n?",
    "difference_stderr": "n?",
    "model": "s",
    "method": "s?",
    "compensate": "b?",
    "preview": "n?",
    "allocation": "s?",
    "weights": "s?",
    "bytes_asked": "n?",
    "sparsity": "n",
    "bytes_skipped": "n",
}
_PANEL = {"what": "s", "name": "s", "device": "s", "dtype": "s", "tokens": "n", "threads": "n"}
_POINT = {
    "sparsity": "n",
    "bytes_skipped": "n",
    "p20": "n",
    "p50": "n",
    "p80": "n",
    "limit": "n",
    "vs_dense": "n",
}


def read_rows(paths: Sequence[str | Path], config: SparsityConfig) -> dict[str, Any]:
    """The rows of some files, by the command that wrote them.

    A file holds one JSON object a line, or what ``--json`` prints: one object, its own row or with
    ``rows``.

    Args:
        paths: of the files.
        config: of the folder that the page is about.

    Returns:
        JSON values. ``compare``, ``tasks`` and ``evaluate``: a list of rows each; of the latter
        ``own`` tells which are of this very config. ``bench``: see :func:`_panels`. ``count`` of
        each.

    Raises:
        CatsparseError: a file cannot be read, holds another kind of row, a number that is none, a
            row of another model, or too much.
    """
    compare: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    evaluate: list[dict[str, Any]] = []
    bench: list[dict[str, Any]] = []
    for path in paths:
        for raw, where in _objects(Path(path)):
            if raw.get("what") in ("op", "decode"):
                bench.append(_bench_row(raw, where))
            elif "heldout" in raw and "target" in raw:
                compare.append(_compare_row(raw, where, config))
            elif "task" in raw and "variant" in raw:
                tasks.append(_task_row(raw, where, config))
            elif "dense_perplexity" in raw and "data" in raw:
                evaluate.append(_evaluate_row(raw, where, config))
            else:
                raise CatsparseError(f"{where} is no row of {_WHAT}; leave that file out")
            if len(compare) + len(tasks) + len(evaluate) + len(bench) > MAX_ROWS:
                raise CatsparseError(
                    f"{where} is row {MAX_ROWS + 1}, more than a page can show; give fewer rows"
                )
    found = {"compare": compare, "tasks": tasks, "evaluate": evaluate, "bench": bench}
    count = {kind: len(rows) for kind, rows in found.items()}
    return found | {"bench": _panels(bench), "count": count}


def _objects(path: Path) -> list[tuple[dict[str, Any], str]]:
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CatsparseError(
                f"{path} has {size} bytes, more than the {MAX_BYTES} that rows may have; give fewer"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CatsparseError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CatsparseError(f"{path} is not UTF-8 text; name a file of rows") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CatsparseError(f"{path} is empty; name a file of rows")
    found: list[tuple[Any, str]]
    if lines[0][1].strip() in ("{", "["):  # printed by --json, over many lines
        whole = parse_json(text, str(path))
        if isinstance(whole, dict) and isinstance(whole.get("rows"), list):
            tasks = whole.get("tasks")  # 'compare' has them beside
            whole = whole["rows"] + (tasks if isinstance(tasks, list) else [])
        values = whole if isinstance(whole, list) else [whole]
        found = [(value, f"{path}, row {k}") for k, value in enumerate(values, 1)]
    else:
        found = [(parse_json(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in lines]
    for value, where in found:
        if not isinstance(value, dict):
            raise CatsparseError(f"{where} is no row of {_WHAT}; leave that file out")
    return found


def _kept(raw: Mapping[str, Any], kinds: Mapping[str, str], where: str) -> dict[str, Any]:
    """The fields ``kinds`` of a row, each of its kind; numbers finite, strings fit to be shown."""
    row: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = raw.get(name)
        if value is None and kind.endswith("?"):
            row[name] = None
        elif kind.startswith("b") and isinstance(value, bool):
            row[name] = value
        elif kind.startswith("s") and isinstance(value, str):
            row[name] = portable(value)
        elif kind.startswith("n") and (number := _finite(value)) is not None:
            row[name] = int(number) if number == int(number) else rounded(number)
        else:
            raise CatsparseError(
                f"{where} has {shorten(name)} {shorten(value)!r}, which is not what a row of "
                f"{_WHAT} holds; measure it again"
            )
    for name in ("sparsity", "bytes_skipped"):
        # A preview is read, too: where little is dropped, fewer than no bytes are skipped.
        if name in row and not -1 <= row[name] <= 1:
            raise CatsparseError(f"{where} has {name} {row[name]}, not a fraction; measure again")
    return row


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _of_this_model(name: str, where: str, config: SparsityConfig) -> None:
    base = config.base_model
    if base is None or not base.name_or_path:
        return
    here = portable(base.name_or_path)
    # A hub's "owner/name" and a folder "name" may be the same weights.
    if name.split("/")[-1] != here.split("/")[-1]:
        raise CatsparseError(
            f"{where} is of the model {shorten(name)}, this folder is of {shorten(here)}; leave "
            "that file out"
        )


def _compare_row(raw: Mapping[str, Any], where: str, config: SparsityConfig) -> dict[str, Any]:
    row = _kept({"weights": None, **raw}, _COMPARE, where)
    _of_this_model(row["model"], where, config)
    return row


def _task_row(raw: Mapping[str, Any], where: str, config: SparsityConfig) -> dict[str, Any]:
    row = _kept({"weights": None, **raw}, _TASK, where)
    _of_this_model(row["model"], where, config)
    if row["variant"] != "dense" and row["method"] is None:
        raise CatsparseError(f"{where} is of a sparse model without its method; measure it again")
    return row


def _evaluate_row(raw: Mapping[str, Any], where: str, config: SparsityConfig) -> dict[str, Any]:
    row = _kept(raw, _EVALUATE, where)
    _of_this_model(row.pop("base_model"), where, config)
    own = (config.method, config.compensate, config.preview)
    expected = {name: part.sparsity for name, part in parts_of(config).items()}
    row["own"] = (row["method"], row["compensate"], row["preview"]) == own and raw.get(
        "expected_sites"
    ) == expected
    if not row["own"]:
        return row
    # What inputs of linear layers dropped is not in the row.
    of_sites = _fractions(raw.get("sites"), list(config.sites), where)
    row["sites"] = [*of_sites, *[None] * len(config.inputs)]
    row["positions"] = None
    if (positions := raw.get("positions")) is not None:
        row["positions"] = _positions(positions, config, where)
    return row


def _positions(raw: Any, config: SparsityConfig, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not isinstance(raw.get("sites"), dict):
        raise CatsparseError(f"{where} has no sensible positions; evaluate again")
    starts, length = raw.get("starts"), raw.get("length")
    bounds = [*starts, length] if isinstance(starts, list) else []
    whole = all(type(b) is int for b in bounds)
    if len(bounds) < 2 or not whole or any(a >= b for a, b in pairwise([-1, *bounds])):
        raise CatsparseError(f"{where} has no sensible positions; evaluate again")
    indices = range(len(bounds) - 1)
    return {
        "starts": starts,
        "length": length,
        "sparsity": _fractions(raw.get("sparsity"), indices, where),
        "sites": [
            _fractions(raw["sites"][name], indices, where) if name in raw["sites"] else None
            for name in parts_of(config)
        ],
    }


def _fractions(values: Any, keys: Sequence[Any], where: str) -> list[float]:
    """``values[key]`` for each of ``keys``, which must be all that there are."""
    if isinstance(values, dict | list) and len(values) == len(keys):
        try:
            found = [_finite(values[key]) for key in keys]
        except (KeyError, TypeError):
            found = [None]
        if all(value is not None and 0 <= value <= 1 for value in found):
            return [rounded(value) for value in found if value is not None]
    raise CatsparseError(f"{where} has a sparsity that is no fraction or missing; evaluate again")


def _bench_row(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    row = _kept(raw, _PANEL | _POINT | {"impl": "s"}, where)
    row |= _kept({"context": 0, **raw}, {"context": "n"}, where)
    if min(row["p20"], row["p50"], row["p80"], row["limit"], row["vs_dense"]) <= 0:
        raise CatsparseError(f"{where} has a time or rate that is not above 0; measure it again")
    row["commit"] = shorten(raw.get("commit") or "", 20)
    return row


def _panels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of benchmarks by what was timed, and within it by run.

    A run's rows share one measured byte limit, so no line may go through rows of two. A run ends
    where an implementation comes again at the same sparsity, or another commit begins.

    Returns:
        JSON values: the fields of ``_PANEL`` and ``context``, and ``runs``, each with ``commit``
        and ``series``: ``impl`` and its ``points``, rising in sparsity, each the values of
        ``_POINT`` in that order.
    """
    keys = (*_PANEL, "context")
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        runs = panels.setdefault(tuple(row[key] for key in keys), [])
        point = (row["impl"], row["sparsity"])
        if not runs or runs[-1]["commit"] != row["commit"] or point in runs[-1]["points"]:
            runs.append({"commit": row["commit"], "points": {}})
        runs[-1]["points"][point] = [row[key] for key in _POINT]
    return [
        dict(zip(keys, panel, strict=True)) | {"runs": [_run(run) for run in runs]}
        for panel, runs in panels.items()
    ]


def _run(run: dict[str, Any]) -> dict[str, Any]:
    series: dict[str, list[list[float]]] = {}
    for (impl, _), point in run["points"].items():
        series.setdefault(impl, []).append(point)
    lines = [{"impl": impl, "points": sorted(points)} for impl, points in series.items()]
    return {"commit": run["commit"], "series": lines}
