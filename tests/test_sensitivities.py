"""The table of sensitivities: its curves, what it refuses, and its part of the file."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from catsparse import CatsparseError, Sensitivities
from catsparse.sensitivities import KEY, check_grid, interpolate, read_sensitivities

GRID = (0.25, 0.5, 0.9)


def table(*losses: list[float], grid: tuple[float, ...] = GRID, **changes: Any) -> Sensitivities:
    named = {f"mlp{i}": torch.tensor(row, dtype=torch.float64) for i, row in enumerate(losses)}
    fields = {"method": "energy", "compensate": True, "preview": None, "tokens": 64}
    return Sensitivities(**(fields | {"sparsities": grid, "losses": named} | changes))


def at(*sparsities: float) -> Tensor:
    return torch.tensor(sparsities, dtype=torch.float64)


def test_curve_goes_through_the_measured_points() -> None:
    one = table([0.01, 0.1, 2.0])
    assert one.curve("mlp0", at(0.0, *GRID)).tolist() == pytest.approx([0.0, 0.01, 0.1, 2.0])


def test_curve_of_a_parabola_is_nearly_the_parabola() -> None:
    one = table([s**2 for s in GRID])
    fine = torch.linspace(0, 0.9, 50, dtype=torch.float64)
    assert float((one.curve("mlp0", fine) - fine**2).abs().max()) < 0.02
    # Without the slopes, straight lines are off by more than this.
    assert float(one.curve("mlp0", at(0.7))) == pytest.approx(0.49, abs=0.02)


@hypothesis.given(st.lists(st.floats(0, 10), min_size=1, max_size=7))
def test_curve_never_falls(losses: list[float]) -> None:
    grid = tuple((i + 1) ** 2 / (len(losses) + 1) ** 2 for i in range(len(losses)))
    one = table(losses, grid=grid)
    values = one.curve("mlp0", torch.linspace(0, grid[-1], 400, dtype=torch.float64))
    assert float(values[0]) == 0
    assert float(values.diff().min()) >= -1e-12
    level = torch.tensor(losses, dtype=torch.float64).cummax(0).values.tolist()
    floor = max(0.0, level[0] - level[1] * (grid[0] / grid[1]) ** 2) if len(grid) > 1 else 0.0
    assert float(values[-1]) == pytest.approx(max(losses) - floor)


def test_dip_counts_as_level() -> None:
    one = table([0.1, 0.4, 0.3, 0.5], grid=(0.25, 0.5, 0.6, 0.9))
    assert one.curve("mlp0", at(0.55, 0.6)).tolist() == pytest.approx([0.4, 0.4])


def test_what_any_change_costs_is_taken_off() -> None:
    """In bf16 a loss does not go to zero with the sparsity."""
    exact = [s**3 for s in (0.05, *GRID)]
    noisy = table([loss + 0.01 for loss in exact], grid=(0.05, *GRID))
    found = noisy.curve("mlp0", at(0.05, *GRID))
    expected = torch.tensor(exact, dtype=torch.float64)
    assert float((found - expected).abs().max()) < 1e-3
    assert torch.equal(table(exact, grid=(0.05, *GRID)).curve("mlp0", at(*GRID)), expected[1:])


def test_interpolation_by_hand() -> None:
    """x = 0, 1, 3, y = 0, 1, 9: secants 1 and 4, so the inner slope is 9 / (5/1 + 4/4) = 1.5."""
    x, y = at(0, 1, 3), at(0, 1, 9)
    # The ends' parabolas: 1 - 3/3 = 0 and 4 + 3 * 2/3 = 6.
    left = 0.5 * (0 + 1) + 1 / 8 * (0 - 1.5)
    right = 0.5 * (1 + 9) + 2 / 8 * (1.5 - 6)
    assert interpolate(x, y, at(0.5, 2)).tolist() == pytest.approx([left, right])


def test_two_points_are_a_line() -> None:
    assert interpolate(at(0, 2), at(0, 3), at(0.5)).tolist() == pytest.approx([0.75])


@pytest.mark.parametrize(
    "grid", [(), (0.0, 0.5), (0.5, 0.5), (0.5, 0.4), (0.5, 1.0), (math.nan,), ("0.5",), (True,)]
)
def test_grid_must_rise_between_0_and_1(grid: Any) -> None:
    with pytest.raises(CatsparseError, match="must rise and lie between 0 and 1"):
        check_grid(grid)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"preview": 3}, "preview must be"),
        ({"tokens": 0}, "at least one token"),
        ({"losses": {"a": torch.zeros(3)}}, "float32"),
        ({"losses": {"a": torch.zeros(2, dtype=torch.float64)}}, r"\[2\]"),
        ({"losses": {"a": at(0, math.nan, 1)}}, "finite"),
        ({"losses": {"a": at(0, 1, math.inf)}}, "finite"),
        ({"losses": {"a": at(-0.1, 0, 1)}}, "not negative"),
    ],
)
def test_damaged_tables_are_refused(changes: Any, says: str) -> None:
    with pytest.raises(CatsparseError, match=says):
        replace(table([0, 0, 1]), **changes)


@pytest.mark.parametrize(
    "other", [("cats", True, None), ("energy", False, None), ("energy", True, 4)]
)
def test_table_of_another_kind_is_refused(other: Any) -> None:
    one = table([0, 0, 1])
    one.require("energy", True, None, ["mlp0"])
    with pytest.raises(CatsparseError, match="measured with energy, compensated, not with"):
        one.require(*other, ["mlp0"])


def test_table_of_other_sites_is_refused() -> None:
    with pytest.raises(CatsparseError, match="lack mlp1"):
        table([0, 0, 1]).require("energy", True, None, ["mlp0", "mlp1"])


def test_round_trip() -> None:
    one = table([0.1, 0.2, 1], [0, 0, 3], preview=8)
    tensors = one.tensors()
    assert set(tensors) == {"mlp0.sensitivity", "mlp1.sensitivity"}
    again = read_sensitivities(
        one.metadata(), tensors.__getitem__, lambda method, scope: ["mlp0", "mlp1"], lambda _: 8
    )
    assert again is not None
    assert all(torch.equal(again.losses[n], loss) for n, loss in one.losses.items())
    assert replace(again, losses={}) == replace(one, losses={})


def read(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> Sensitivities | None:
    return read_sensitivities(
        metadata, tensors.__getitem__, lambda method, scope: ["mlp0"], lambda method: None
    )


def test_scope_is_kept_and_the_oldest_files_have_none() -> None:
    one = replace(table([0.1, 0.2, 1]), scope="all")
    assert (again := read(one.metadata(), one.tensors())) is not None
    assert again.scope == "all"
    assert (old := read({KEY: json.dumps(GOOD)}, one.tensors())) is not None
    assert old.scope == "mlp"


def test_file_without_a_table() -> None:
    assert read({}, {}) is None


GOOD = {"method": "energy", "compensate": True, "tokens": 64, "sparsities": list(GRID)}


@pytest.mark.parametrize(
    "header",
    [
        "nonsense",
        "[]",
        "null",
        json.dumps({k: v for k, v in GOOD.items() if k != "sparsities"}),
        json.dumps({k: v for k, v in GOOD.items() if k != "tokens"}),
        json.dumps(GOOD | {"sparsities": 0.5}),
        json.dumps(GOOD | {"sparsities": [0.5, "0.6", 0.7]}),
        json.dumps(GOOD | {"sparsities": [0.5]}),
        json.dumps(GOOD | {"sparsities": [0.5, 0.7, 1.5]}),
        json.dumps(GOOD | {"compensate": 1}),
        json.dumps(GOOD | {"method": ["energy"]}),
        json.dumps(GOOD | {"tokens": -1}),
        json.dumps(GOOD | {"more": 1}),
        json.dumps(GOOD).replace("0.25", "NaN"),
    ],
)
def test_hostile_headers(header: str) -> None:
    tensors = table([0.1, 0.2, 1]).tensors()
    assert read({KEY: json.dumps(GOOD)}, tensors)
    with pytest.raises(CatsparseError) as caught:
        read({KEY: header}, tensors)
    assert "\n" not in str(caught.value)
