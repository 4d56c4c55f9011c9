"""The plot of a comparison: what it draws is what the rows hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pages
from catsparse.pareto import compare_figure, plot_compare

BYTES = (0.31, 0.45, 0.58)
TEXTS = ("held out", "another")
METHODS = ("cats", "product")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        pages.compare_row(
            heldout=text, method=method, compensate=compensate, bytes_skipped=b, scope="mlp",
            rise=b**2 + 0.01 * k,
        )
        for k, text in enumerate(TEXTS)
        for method in METHODS
        for compensate in (False, True)
        for b in reversed(BYTES)
    ]  # fmt: skip


def tasks_of(*names: str) -> list[dict[str, Any]]:
    """A dense row of each task and those of three budgets."""
    return [
        pages.task_row(task=name, **changes)
        for name in names
        for changes in (
            {"variant": "dense", "value": 0.7, "method": None, "bytes_skipped": 0.0},
            *({"bytes_skipped": b, "value": 0.7 - b / 10, "method": "cats"} for b in BYTES),
            *({"bytes_skipped": b, "value": 0.7 - b / 20, "method": "product"} for b in BYTES),
        )
    ]


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes if axis.axison]


def points(container: Any) -> list[tuple[float, float]]:
    line = container.lines[0]
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_a_panel_for_each_text_and_a_line_for_each_setting(rows: list[dict[str, Any]]) -> None:
    figure = compare_figure(rows)
    assert titles(figure) == [f"tiny on {name}" for name in TEXTS]
    for axis, name in zip(figure.axes, TEXTS, strict=True):
        assert len(axis.containers) == len(METHODS) * 2
        own = [r for r in rows if (r["method"], r["compensate"]) == ("cats", True)]
        own = [r for r in own if r["heldout"] == name]
        expected = sorted((r["bytes_skipped"], r["rise"]) for r in own)
        assert points(axis.containers[1]) == expected
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[1] >= max(row["rise"] for row in rows)


def test_falls_and_single_windows(rows: list[dict[str, Any]]) -> None:
    figure = compare_figure([row | {"rise": -0.1, "rise_se": None} for row in rows])
    low, high = figure.axes[0].get_ylim()
    assert low < -0.1 < high


def test_a_panel_for_each_task_with_dense_across(rows: list[dict[str, Any]]) -> None:
    figure = compare_figure(rows, tasks_of("blimp"))
    assert titles(figure) == [*(f"tiny on {name}" for name in TEXTS), "blimp, 40 examples"]
    axis = figure.axes[2]
    assert axis.get_ylabel() == "accuracy"
    cats, product = axis.containers
    assert points(cats) == [(b, pytest.approx(0.7 - b / 10)) for b in BYTES]
    assert points(product) == [(b, pytest.approx(0.7 - b / 20)) for b in BYTES]
    # The same method has the same colour above, and bars are of the paired difference.
    assert cats.lines[0].get_color() == figure.axes[0].containers[0].lines[0].get_color()
    assert product.lines[0].get_color() == figure.axes[0].containers[2].lines[0].get_color()
    (bar, *_) = cats.lines[2][0].get_segments()
    assert bar[1][1] - bar[0][1] == pytest.approx(2 * 0.01)
    across = [line for line in axis.lines if list(line.get_ydata()) == [0.7, 0.7]]
    assert len(across) == 1
    assert [text.get_text() for text in axis.texts] == ["dense"]


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 3)), (2, (2, 2)), (3, (2, 3)), (5, (3, 3))])
def test_many_tasks_stand_below(
    rows: list[dict[str, Any]], count: int, shape: tuple[int, int]
) -> None:
    names = [f"t{n}" for n in range(count)]
    figure = compare_figure(rows, tasks_of(*names))
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    assert titles(figure)[2:] == [f"{name}, 40 examples" for name in names]
    first_row = [a for a in figure.axes if a.axison and a.get_subplotspec().rowspan.start == 0]
    assert len(first_row) == (3 if count == 1 else 2)


def test_what_is_no_share_is_named(rows: list[dict[str, Any]]) -> None:
    tasks = [row | {"metric": "word_perplexity"} for row in tasks_of("wikitext")]
    axis = compare_figure(rows, [row | {"difference_stderr": None} for row in tasks]).axes[2]
    assert axis.get_ylabel() == "word_perplexity"


def test_files(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = plot_compare(rows, tmp_path, tasks_of("blimp"))
    assert sorted(path.name for path in paths) == ["compare.png", "compare.svg"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_formats_are_drawn_against_bytes_read() -> None:
    """A line for each format and method, and one through what nothing beats in both."""
    given = [(8e6, 0.0, "bf16", "dense"), (6e6, 0.02, "bf16", "cats"), (4e6, 0.01, "int8", "dense"),
             (3e6, 0.05, "int8", "cats"), (2e6, 0.04, "int4", "dense")]  # fmt: skip
    rows = [
        pages.compare_row(bytes_read=b, rise=rise, weights=w, method=m, scope="mlp", heldout="x")
        for b, rise, w, m in given
    ]
    (axis,) = compare_figure(rows).axes
    drawn = {c.get_label(): points(c) for c in axis.containers}
    assert drawn == {f"{w}, {m}": [(b, rise)] for b, rise, w, m in given}
    colours = {c.get_label(): c.lines[0].get_color() for c in axis.containers}
    assert colours["int8, dense"] == colours["int8, cats"] != colours["bf16, cats"]
    (front,) = [line for line in axis.lines if line.get_label() == "none reads and loses less"]
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [
        (2e6, 0.04),
        (4e6, 0.01),
        (8e6, 0.0),
    ]
    assert "MB" in axis.get_xlabel()
