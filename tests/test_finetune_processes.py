"""``catsparse finetune`` in two processes that ``accelerate launch`` starts, on the CPU by gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import catsparse
import tiny
from command import run

OPTIONS = [
    *("--seq-len", "64", "--steps", "3", "--log-every", "1", "--rank", "4", "--device", "cpu"),
    *("--heldout-tokens", "512", "--eval-every", "0", "--distill", "--json"),
]
# accelerate looks at FSDP's settings for GPUs only, and plainly copies the model to each process
# otherwise: here it is told that processes on the CPU are such ones.
CLI = """
from accelerate import PartialState
from accelerate.utils import DistributedType

real = PartialState.__init__

def told(self, *args, **kwargs):
    real(self, *args, **kwargs)
    if {fsdp} and self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

PartialState.__init__ = told
from catsparse.cli import main
main()
"""
LAUNCH = {
    "ddp": ["--multi_gpu"],
    "fsdp": [
        *("--use_fsdp", "--fsdp_version", "2"),
        *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"),
    ],
}


def launched(tmp_path: Path, kind: str, *args: object) -> dict[str, Any]:
    script = tmp_path / "cli.py"
    script.write_text(CLI.format(fsdp=kind == "fsdp"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", *LAUNCH[kind]),
            *(str(script), "finetune", "default", *OPTIONS, "--batch-size", "1"),
            *map(str, args),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "training.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("kind", LAUNCH)
def test_two_processes_are_one_with_twice_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    two = launched(tmp_path, kind, "-o", tmp_path / "two", "--keep-checkpoints")
    code, out, stderr = run(
        *(capsys, "finetune", "default", *OPTIONS, "--batch-size", "2", "-o", tmp_path / "one")
    )
    assert code == 0, stderr
    one = json.loads(out)
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"step", "loss", "eval_loss", "sparsity"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    assert two["after"]["perplexity"] == pytest.approx(one["after"]["perplexity"], rel=1e-3)
    adapters = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("two", "one")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():  # Adam magnifies rounding, by sign at first
        close = torch.isclose(tensor, adapters[1][name], atol=2e-4)
        assert float(close.float().mean()) > 0.95, name
    models = [catsparse.load(tmp_path / d, dtype=torch.float32) for d in ("two", "one")]
    assert tiny.close(tiny.logits(models[0]), tiny.logits(models[1]), 0.02)
    if kind == "fsdp":
        checkpoint = tmp_path / "two" / "checkpoints" / "checkpoint-3"
        assert (checkpoint / "pytorch_model_fsdp.bin").exists()  # it was sharded
        again = launched(tmp_path, kind, "-o", tmp_path / "two")  # and is finished from there
        assert again["after"] == two["after"]
