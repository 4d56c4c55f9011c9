"""A model that transformers spreads over two processes (gloo, on the CPU) is the whole one's equal.

The processes are started once, for all cases of parallel_run.py; here is what they saw.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from catsparse import shards
from catsparse.errors import CatsparseError
from catsparse.sites import find_sites
from parallel_run import CASES, NEW
from tiny import SMALL, build, llama_config

ROOT = Path(__file__).parents[1]
GATHERED = "phi3, gathered"  # gate and up are whole on every rank, and so are its decisions
NEURONS = SMALL["intermediate_size"]


def torchrun(*args: object, ranks: int = 2) -> str:
    """What the processes print; all of them are gone afterwards, whatever happens."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    process = subprocess.Popen(
        [*launch, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error[-4000:]
    return out


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what each case saw there."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(Path(__file__).with_name("parallel_run.py"), folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_one_process(seen: list[dict[str, Any]], case: str) -> None:
    for found in (rank[case] for rank in seen):
        assert max(found["logits"].values()) < 1e-5
        whole, part = found["tokens"]
        assert whole == part
        assert len(part) == NEW
        assert found["sparse"]
    assert seen[0][case]["tokens"] == seen[1][case]["tokens"]


@pytest.mark.parametrize("case", CASES)
def test_few_tokens_run_the_op_on_the_ranks_weights(seen: list[dict[str, Any]], case: str) -> None:
    for rank, found in enumerate(one[case] for one in seen):
        gathered = case == GATHERED
        assert found["op"] == ([] if gathered else [1, 1, 5, 5])
        one = 1 if case == "cats" else NEURONS if gathered else NEURONS // 2
        assert found["thresholds"] == [one, one]
        if gathered:
            assert "masked children (gate_up_proj is spread over processes)" in found["explain"]
        else:
            assert f"24 of 48 neurons (rank {rank} of 2, which add up)" in found["explain"]


@pytest.mark.parametrize("case", CASES)
def test_calibration_is_that_of_one_process(seen: list[dict[str, Any]], case: str) -> None:
    """Sums of another order move a magnitude over a bin's edge now and then."""
    for found in (rank[case]["calibration"] for rank in seen):
        assert found["same header"]
        assert found["shapes"]
        assert found["counts"] < 0.005
        assert found["sums"] < 1e-3
        assert found["thresholds"] < 0.02
    assert seen[0][case]["calibration"] == seen[1][case]["calibration"]


@pytest.mark.parametrize("case", CASES)
def test_meter_adds_up_the_ranks(seen: list[dict[str, Any]], case: str) -> None:
    for found in (rank[case] for rank in seen):
        whole, part = found["meter"]
        assert part == pytest.approx(whole, abs=0.003)


@pytest.mark.parametrize("case", CASES)
def test_densify_gives_the_same_parameters_back(seen: list[dict[str, Any]], case: str) -> None:
    for found in (rank[case] for rank in seen):
        assert found["same"]
        assert found["dense again"] == 0


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_saved_and_loaded(seen: list[dict[str, Any]], kind: str) -> None:
    """A model in parts saves what one process or two load again."""
    for files in (rank["files"] for rank in seen):
        whole, part = files[kind]
        assert whole < 1e-5
        assert part == 0
        assert files[f"{kind} classes"] == ["SparseMLP", "Sharded"]


def test_gradients_are_those_of_one_process(seen: list[dict[str, Any]]) -> None:
    assert all(rank["files"]["gradients"] < 1e-4 for rank in seen)


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        ("checkpoint", "leave checkpoint out"),
        ("inputs", "take scope mlp and a method of the gate"),
        ("teal", "load the model in one"),
        ("previews", "load it in one to save"),
        ("recalibrate", "load it in one"),
        ("backend", "use auto"),
    ],
)
def test_what_cannot_be_is_refused(seen: list[dict[str, Any]], what: str, remedy: str) -> None:
    assert all(
        rank["errors"][what].endswith(remedy) or remedy in rank["errors"][what] for rank in seen
    )


def test_each_process_calibrates_on_its_own_texts(seen: list[dict[str, Any]]) -> None:
    for found in (rank["data parallel"] for rank in seen):
        assert found["same header"]
        assert found["counts"] == 0
        assert found["sums"] < 1e-5
        assert found["thresholds"] == 0
        assert found["tokens"] == 256
        assert found["others"].endswith("calibrate all of them alike")


def test_the_example_prints_equal_tokens() -> None:
    lines = torchrun(ROOT / "examples" / "tensor_parallel.py").splitlines()
    said = [line.split(":")[1].split() for line in lines if line.startswith(("one", "rank"))]
    assert len(said) == 3
    assert len(said[0]) == 24
    assert said[0] == said[1] == said[2]
    assert lines[-1] == "equal tokens"


class _Mesh:
    def __init__(self, ndim: int = 1, ranks: int = 2) -> None:
        self.ndim, self.ranks = ndim, ranks

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return 0


class _Placed:
    def __init__(self, dim: int | None) -> None:
        self.dim = dim

    def is_shard(self, dim: int) -> bool:
        return self.dim == dim


class DTensor:
    """What :func:`shards.find_shard` looks at of one."""

    def __init__(self, local: torch.Tensor, *dims: int | None, ranks: int = 2) -> None:
        self.local, self.device_mesh = local, _Mesh(len(dims), ranks)
        self.placements = [_Placed(dim) for dim in dims]

    def to_local(self) -> torch.Tensor:
        return self.local


def spread(
    dims: list[tuple[int | None, ...]], own: int = 24, ranks: int = 2
) -> shards.Shard | None:
    """The shard of an MLP whose gate, up and down are placed so."""
    model: Any = build(llama_config())
    site = find_sites(model)[0][0]
    mlp = model.get_submodule(site.name)
    shapes = [(own, 32), (own, 32), (32, own)]
    for name, shape, placed in zip(
        ("gate_proj", "up_proj", "down_proj"), shapes, dims, strict=True
    ):
        child = nn.Module()
        object.__setattr__(child, "weight", DTensor(torch.zeros(shape), *placed, ranks=ranks))
        setattr(mlp, name, child)
    return shards.find_shard(mlp, site)


def test_only_neurons_that_are_spread_are_cut() -> None:
    found = spread([(0,), (0,), (1,)])
    assert found is not None
    assert (found.own, found.neurons) == (24, 48)
    assert spread([(0,), (0,), (0,)]) is None  # FSDP, which gathers them
    assert spread([(None,), (None,), (1,)]) is None  # the products are whole, and cut afterwards
    assert spread([(0, 0), (0, 0), (0, 0)]) is None


def test_other_spreads_are_refused() -> None:
    with pytest.raises(CatsparseError, match="mesh of 2 dimensions"):
        spread([(0, 0), (0, 0), (0, 1)])
    with pytest.raises(CatsparseError, match="not dealt out to 2 ranks"):
        spread([(0,), (0,), (1,)], own=20)
    with pytest.raises(CatsparseError, match="not dealt out to 47 ranks"):
        spread([(0,), (0,), (1,)], own=2, ranks=47)


def test_cut_follows_the_weights() -> None:
    """Ranks hold what torch.chunk gives them; the last may have fewer."""
    values = torch.arange(5)
    assert [shards.cut(values, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4]]  # type: ignore[union-attr]
    assert shards.cut(None, 1, 2) is None
    assert float(shards.cut(torch.tensor(0.5), 1, 2)) == 0.5  # type: ignore[arg-type]
