"""What tests/test_tensor_parallel.py has two processes do; run by torchrun, with a folder.

Each rank holds the model twice, whole and its part, and writes what it saw to ``rank<R>.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModelForCausalLM, Gemma2Config, Phi3Config, Qwen3Config
from transformers.distributed import DistributedConfig

import catsparse
import tiny
from catsparse import modules, recalibration
from catsparse.modules import sparse_modules

NEW = 12
CONFIGS: dict[str, Any] = {
    "llama": tiny.llama_config,
    "qwen3": lambda: Qwen3Config(**tiny.SMALL, head_dim=8),
    "gemma2": lambda: Gemma2Config(**tiny.SMALL, head_dim=8),
    "phi3": lambda: Phi3Config(**tiny.SMALL),
}
# By name: the model, arguments of calibrate, arguments of sparsify.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "energy": ("llama", {}, {}),
    "cats": ("llama", {}, {"method": "cats"}),
    "chess, no means": ("llama", {}, {"method": "chess", "compensate": False}),
    "dense prompts": ("llama", {}, {"prefill": "dense"}),
    "product preview": ("llama", {"preview": 4}, {}),
    "gate preview": ("llama", {"preview": 8}, {"method": "energy"}),
    "second decision": ("llama", {"products_at": 0.4}, {"sparsity": 0.4, "down_sparsity": 0.6}),
    "qwen3": ("qwen3", {}, {}),
    "gemma2": ("gemma2", {}, {}),
    "phi3, gathered": ("phi3", {}, {}),
}


class Ranks:
    """The models of one configuration, whole and spread over the two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def whole(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).eval()

    def part(self, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder / name, dtype=torch.float32, distributed_config=plan()
        ).eval()


def plan() -> DistributedConfig:
    return DistributedConfig(tp_size=2, tp_plan="auto")


def run_case(ranks: Ranks, name: str) -> dict[str, Any]:
    config, seen, asked = CASES[name]
    whole, part = ranks.whole(config), ranks.part(config)
    before = dict(part.named_parameters())
    ids, dense = tiny.tokens(8, 32, seed=7), tiny.logits(part, 24)
    calibrations = [catsparse.calibrate(m, ids, progress=False, **seen) for m in (whole, part)]
    options = {"sparsity": 0.5} | asked
    for model in (whole, part):
        catsparse.sparsify(model, calibrations[0], **options)
    op_tokens: list[int] = []
    with counting(op_tokens):
        logits = {n: difference(tiny.logits(part, n), tiny.logits(whole, n)) for n in (1, 5, 24)}
    meters = [measured(model) for model in (whole, part)]
    result = {
        "calibration": compared(*calibrations, options),
        "logits": logits,
        "sparse": difference(tiny.logits(part, 5), dense[:, :5]) > 0.01,
        "op": op_tokens,
        "tokens": [generated(whole), generated(part)],
        "meter": meters,
        "explain": catsparse.explain(part).splitlines()[0],
        "thresholds": [m.catsparse_threshold.numel() for m in sparse_modules(part).values()],
    }
    catsparse.densify(part)
    after = dict(part.named_parameters())
    result["same"] = all(after[n] is p for n, p in before.items()) and len(after) == len(before)
    result["dense again"] = difference(tiny.logits(part, 24), dense)
    return result


class counting:
    """Collects the tokens of each call of the op with weights that are a rank's."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.real = tokens, modules.gated_mlp

    def __enter__(self) -> None:
        def call(x: Tensor, w_gate: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if type(w_gate) is Tensor and len(w_gate) == tiny.SMALL["intermediate_size"] // 2:
                self.tokens.append(x.numel() // x.shape[-1])
            return self.real(x, w_gate, *args, **kwargs)

        modules.gated_mlp = call

    def __exit__(self, *args: object) -> None:
        modules.gated_mlp = self.real


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other[:, : one.shape[1]]).abs().max() / other.abs().max())


def generated(model: Any) -> list[int]:
    ids = tiny.tokens(1, 20)
    new = catsparse.generate(model, ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return new[0, 20:].tolist()


def measured(model: Any) -> list[float]:
    with catsparse.achieved_sparsity(model) as meter:
        tiny.logits(model, 10)
    meter.sum_over_ranks()
    return [
        meter.sparsity,
        meter.down_sparsity,
        meter.bytes_skipped,
        meter.tokens(next(iter(meter.sites))),
    ]


def compared(one: Any, other: Any, options: dict[str, Any]) -> dict[str, Any]:
    """How far two calibrations differ: shares of counts, of sums, and of thresholds."""
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    wanted = {
        k: v
        for k, v in options.items()
        if k in ("sparsity", "method", "compensate", "down_sparsity")
    }
    limits = [c.thresholds(**wanted) for c in (one, other)]
    return {
        "same header": one.metadata() == other.metadata(),
        "shapes": all(mine[k].shape == theirs[k].shape for k in mine),
        "counts": max(
            float((mine[k] - theirs[k]).abs().sum() / mine[k].sum())
            for k in mine
            if not mine[k].is_floating_point()
        ),
        "sums": max(
            float((mine[k] - theirs[k]).abs().max() / mine[k].abs().max())
            for k in mine
            if mine[k].is_floating_point()
        ),
        "thresholds": max(
            float((t.threshold - limits[1][n].threshold).abs().max() / t.threshold.abs().max())
            for n, t in limits[0].items()
        ),
    }


def run_files(ranks: Ranks) -> dict[str, Any]:
    """save and load, whole and in parts."""
    part = ranks.part("llama")
    catsparse.sparsify(part, catsparse.calibrate(part, tiny.tokens(8, 32), progress=False), 0.5)
    truth, result = tiny.logits(part), {}
    for kind, merge in (("adapter", False), ("merged", True)):
        folder = ranks.folder / kind
        catsparse.save(part, folder, merge=merge)
        models = [
            catsparse.load(folder, dtype=torch.float32, **options)
            for options in ({}, {"distributed_config": plan()})
        ]
        result[kind] = [difference(tiny.logits(model), truth) for model in models]
        result[f"{kind} classes"] = [
            type(m.model.layers[0].mlp).__mro__[1].__name__ for m in models
        ]
    whole = catsparse.load(ranks.folder / "adapter", dtype=torch.float32)
    gradients = []
    for model in (whole, part):
        ids = tiny.tokens(2, 24)
        model(ids, labels=ids).loss.backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad
        gradients.append(getattr(gradient, "full_tensor", lambda g=gradient: g)())
    result["gradients"] = difference(gradients[1], gradients[0])
    return result


def run_errors(ranks: Ranks) -> dict[str, str]:
    whole, part = ranks.whole("llama"), ranks.part("llama")
    ids, out = tiny.tokens(8, 32), ranks.folder / "errors"
    inputs = catsparse.calibrate(whole, ids, progress=False, inputs="mlp")
    preview = catsparse.calibrate(whole, ids, progress=False, preview=4)
    sparse = catsparse.sparsify(ranks.part("llama"), preview, 0.5)
    backend = ranks.part("phi3")
    catsparse.sparsify(backend, catsparse.calibrate(backend, ids, progress=False), 0.5)
    calls: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: catsparse.calibrate(part, ids, progress=False, checkpoint=out),
        "inputs": lambda: catsparse.calibrate(part, ids, progress=False, inputs="mlp"),
        "teal": lambda: catsparse.sparsify(part, inputs, 0.5, method="teal"),
        "previews": lambda: catsparse.save(sparse, out, merge=True, store_preview=True),
        "recalibrate": lambda: recalibration.recalibrate(sparse, ids, progress=False),
        "backend": lambda: catsparse.set_backend(backend, "c"),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "nothing"
        except catsparse.CatsparseError as error:
            said[name] = str(error)
    return said


def run_data_parallel(ranks: Ranks) -> dict[str, Any]:
    """Each process reads half of the windows with the whole model."""
    whole, ids = ranks.whole("llama"), tiny.tokens(8, 32, seed=7)
    options: dict[str, Any] = {"progress": False, "preview": 4, "inputs": "mlp"}
    mine = catsparse.calibrate(whole, ids[dist.get_rank() :: 2], **options)
    total = mine.sum_over_processes()
    result = compared(catsparse.calibrate(whole, ids, **options), total, {"sparsity": 0.5})
    result["tokens"] = total.provenance.tokens
    other = catsparse.calibrate(whole, ids, progress=False) if dist.get_rank() else mine
    try:
        other.sum_over_processes()
    except catsparse.CatsparseError as error:
        result["others"] = str(error)
    return result


def main() -> None:
    torch.set_num_threads(1)
    # Before transformers does it, which would wait for hours.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks, rank = Ranks(Path(sys.argv[1])), dist.get_rank()
    if rank == 0:
        for name, config in CONFIGS.items():
            tiny.save_base(ranks.folder / name, config())
    dist.barrier()
    result: dict[str, Any] = {name: run_case(ranks, name) for name in CASES}
    result["files"] = run_files(ranks)
    result["errors"] = run_errors(ranks)
    result["data parallel"] = run_data_parallel(ranks)
    (ranks.folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
