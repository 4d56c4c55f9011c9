"""Plots of fine-tuning."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from catsparse import CatsparseError
from catsparse.curves import drift_figure, loss_figure, plot_finetune

pytest.importorskip("matplotlib")


def rows(variant: str, *losses: float, name: str = "eval_loss") -> list[dict[str, Any]]:
    return [{"variant": variant, "step": 10 * i, name: loss} for i, loss in enumerate(losses)]


def drawn(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in figure.axes[0].lines
    }


def test_losses_by_step() -> None:
    figure = loss_figure(
        [*rows("cats", 3.5, 3.4, 3.3), *rows("relu", 4.0, 3.8), *rows("dense", 3.3, 3.2)]
    )
    assert drawn(figure) == {
        "cats + LoRA": ([0, 10, 20], [3.5, 3.4, 3.3]),
        "ReLUfication + LoRA": ([0, 10], [4.0, 3.8]),
        "dense + LoRA": ([0, 10], [3.3, 3.2]),
    }
    assert figure.axes[0].get_yscale() == "linear"
    far = loss_figure([*rows("cats", 3.5, 3.4), *rows("relu", 9.0, 5.0)])
    assert far.axes[0].get_yscale() == "log"


def test_losses_of_training_where_none_was_held_out() -> None:
    figure = loss_figure(rows("energy", 2.0, 1.0, name="loss"))
    assert drawn(figure) == {"energy + LoRA": ([0, 10], [2.0, 1.0])}
    assert figure.axes[0].get_ylabel() == "loss in training"
    both = loss_figure([*rows("energy", 2.0, name="loss"), *rows("energy", 3.0)])
    assert drawn(both) == {"energy + LoRA": ([0], [3.0])}


def test_drift() -> None:
    figure = drift_figure({"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.6}, {"a": 0.49, "b": 0.51})
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.4, 0.6]
    assert drawn(figure) == {
        "asked": ([0, 1], [0.5, 0.5]),
        "thresholds of the end": ([0, 1], [0.49, 0.51]),
    }


def test_files(tmp_path: Path) -> None:
    one = {"a": 0.5}
    paths = plot_finetune(rows("cats", 2.0, 1.0), one, one, one, tmp_path)
    assert {p.name for p in paths} == {"loss.png", "loss.svg", "drift.png", "drift.svg"}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CatsparseError, match=r"catsparse\[plot\]"):
        plot_finetune(rows("cats", 2.0), {}, {}, {}, tmp_path)
