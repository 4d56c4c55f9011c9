"""Models spread over three processes (gloo, on the CPU): neurons that cannot be dealt out evenly,
bf16, and LoRA adapters. The processes run parallel_uneven.py; here is what they saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="the extra finetune is not installed")

from parallel_uneven import RANKS, TOO_FEW
from test_tensor_parallel import torchrun

UNEVEN = {
    "odd": ([17, 17, 17], 51),
    "fewer on the last": ([17, 17, 16], 50),
    "preview": ([17, 17, 16], 50),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what it saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(Path(__file__).with_name("parallel_uneven.py"), folder, ranks=RANKS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", UNEVEN)
def test_neurons_that_cannot_be_dealt_out_evenly(seen: list[dict[str, Any]], case: str) -> None:
    """transformers gives the last rank what is left; the outputs are those of one process."""
    parts, total = UNEVEN[case]
    for rank, found in enumerate(one[case] for one in seen):
        assert f"{parts[rank]} of {total} neurons (rank {rank} of 3" in found["explain"]
        assert "decode by the c kernel" in found["explain"]
        assert max(found["logits"]) < 1e-5
        assert found["saved"] < 1e-5
        whole, part = found["tokens"]
        assert whole == part
        whole, part = found["meter"]
        assert part == pytest.approx(whole, abs=0.003)


@pytest.mark.parametrize("case", UNEVEN)
def test_their_statistics_are_joined_in_order(seen: list[dict[str, Any]], case: str) -> None:
    """Sums of another order move a magnitude over a bin's edge now and then."""
    for found in (one[case]["calibration"] for one in seen):
        assert found["same header"]
        assert found["shapes"]
        assert found["counts"] < 0.005
        assert found["sums"] < 1e-3
        assert found["thresholds"] < 0.02


def test_a_rank_without_neurons_is_refused(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["too few"].endswith("load the model with another tp_size or tp_plan")
        assert f"the {TOO_FEW} neurons of model.layers.0.mlp" in found["too few"]


def test_bf16_differs_no_more_than_dense_does(seen: list[dict[str, Any]]) -> None:
    """The ranks' outputs are rounded and added up in another order than in one process: so the
    dense model is some bf16 steps away, and the sparse one about as far, flipped decisions
    included."""
    for found in (one["bf16"] for one in seen):
        assert all(0.1 < steps < 20 for steps in found["dense"])
        for dense, sparse in zip(found["dense"], found["sparse"], strict=True):
            assert sparse < 3 * dense


@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_adapters_count_as_in_one_process(seen: list[dict[str, Any]], which: str) -> None:
    """Put on a sparse model, or on a dense one that is then calibrated and made sparse."""
    for found in (one["adapters"][which] for one in seen):
        assert max(found["adapted after"]) < 1e-5
        assert max(found["adapted before"]) < 1e-5
        assert found["matters"] > 0.01
        assert found["calibration"]["counts"] < 0.005
        assert found["calibration"]["thresholds"] < 0.02
        children = "masked children (gate_proj is peft's Linear)"
        assert (children if which == "mlp" else "the c kernel") in found["explain"]
        whole, part = found["meter"]
        assert part == pytest.approx(whole, abs=0.003)


def test_a_fine_tuned_folder_is_loaded_in_parts(seen: list[dict[str, Any]]) -> None:
    for found in (one["adapters"]["files"] for one in seen):
        assert max(found["loaded"]) < 1e-5
        assert "load the model without merge_adapter" in found["merged"]
        assert found["saved"].endswith("load it in one to save")
        assert found["saved merged"] == found["saved"]  # PEFT cannot merge them here


def test_gradients_of_an_adapter_are_those_of_one_process(seen: list[dict[str, Any]]) -> None:
    assert all(one["adapters"]["gradients"] < 1e-4 for one in seen)
