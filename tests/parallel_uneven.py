"""What tests/test_tensor_parallel_uneven.py has three processes do; run by torchrun, with a folder.

Neurons that cannot be dealt out evenly, bf16, and LoRA adapters. Each rank writes what it saw to
``rank<R>.json``.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import catsparse
import tiny
from parallel_run import compared, difference, generated, measured

RANKS = 3
HEADS = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
NEURONS = {"odd": 51, "fewer on the last": 50, "bf16": 50}
TOO_FEW = 4  # two ranks take two each, and the third has none
MLP = ["gate_proj", "up_proj", "down_proj"]


def load(folder: Path, spread: bool, dtype: torch.dtype = torch.float32) -> Any:
    plan = {"distributed_config": DistributedConfig(tp_size=RANKS, tp_plan="auto")}
    options = plan if spread else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def run_uneven(folder: Path, preview: int | None) -> dict[str, Any]:
    pair = [load(folder, spread) for spread in (False, True)]
    ids = tiny.tokens(8, 32, seed=7)
    seen = [catsparse.calibrate(m, ids, progress=False, preview=preview) for m in pair]
    for model in pair:
        catsparse.sparsify(model, seen[0], 0.5)
    whole, part = pair
    saved = folder / f"saved-{preview}"
    catsparse.save(part, saved)
    again = [catsparse.load(saved, dtype=torch.float32), part]
    return {
        "logits": [difference(tiny.logits(part, n), tiny.logits(whole, n)) for n in (1, 5, 24)],
        "calibration": compared(*seen, {"sparsity": 0.5}),
        "tokens": [generated(whole), generated(part)],
        "meter": [measured(model) for model in pair],
        "explain": catsparse.explain(part).splitlines()[0],
        "saved": difference(*(tiny.logits(model) for model in again)),
    }


def spread_of(pair: list[Any], length: int) -> float:
    """How far the model in parts is from the whole one: the root mean square, in bf16 steps."""
    one, other = (tiny.logits(model, length).float() for model in pair)
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt()) * 256


def run_bf16(folder: Path) -> dict[str, Any]:
    """Ranks add up in bf16, dense or sparse."""
    pair = [load(folder, spread, torch.bfloat16) for spread in (False, True)]
    result: dict[str, Any] = {"dense": [spread_of(pair, n) for n in (1, 5, 24)]}
    ids = tiny.tokens(8, 32, seed=7)
    calibration = catsparse.calibrate(pair[0], ids, progress=False)
    for model in pair:
        catsparse.sparsify(model, calibration, 0.5)
    result["sparse"] = [spread_of(pair, n) for n in (1, 5, 24)]
    return result


def adapt(model: Any, targets: list[str]) -> Any:
    """The same adapter on the whole model and on one in parts."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                value = torch.randn(parameter.shape, generator=generator) * 0.2
                if isinstance(parameter.data, DTensor):
                    mesh, placed = parameter.device_mesh, parameter.placements
                    parameter.to_local().copy_(distribute_tensor(value, mesh, placed).to_local())
                else:
                    parameter.copy_(value)
    return adapted


def run_adapters(folder: Path) -> dict[str, Any]:
    ids, found = tiny.tokens(8, 32, seed=7), dict[str, Any]()
    for name, targets in {"attention": ["q_proj", "o_proj"], "mlp": MLP}.items():
        after = []
        for spread in (False, True):
            model = load(folder, spread)
            plain = tiny.logits(model)
            catsparse.sparsify(model, catsparse.calibrate(model, ids, progress=False), 0.5)
            after.append(adapt(model, targets))
        before = [adapt(load(folder, spread), targets) for spread in (False, True)]
        seen = [catsparse.calibrate(model, ids, progress=False) for model in before]
        for model in before:
            catsparse.sparsify(model, seen[0], 0.5)
        found[name] = {
            "adapted after": apart(after),
            "adapted before": apart(before),
            "calibration": compared(*seen, {"sparsity": 0.5}),
            "matters": difference(tiny.logits(after[0]), plain),
            "explain": catsparse.explain(after[1]).splitlines()[0],
            "meter": [measured(model) for model in after],
        }
    return found | {"files": run_adapter_files(folder, after), "gradients": gradients(folder)}


def apart(pair: list[Any]) -> list[float]:
    return [difference(*(tiny.logits(m, n) for m in reversed(pair))) for n in (1, 5, 24)]


def run_adapter_files(folder: Path, pair: list[Any]) -> dict[str, Any]:
    """A fine-tuned model's folder, written by one process, loaded in parts."""
    saved = folder / "adapted"
    if dist.get_rank() == 0:
        catsparse.save(pair[0], saved)
    dist.barrier()
    plan = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    part = catsparse.load(saved, dtype=torch.float32, distributed_config=plan)
    return {
        "loaded": apart([pair[0], part]),
        "merged": said(
            lambda: catsparse.load(
                saved, dtype=torch.float32, distributed_config=plan, merge_adapter=True
            )
        ),
        "saved": said(lambda: catsparse.save(pair[1], folder / "never")),
        "saved merged": said(lambda: catsparse.save(pair[1], folder / "never", merge=True)),
    }


def gradients(folder: Path) -> float:
    """Of an adapter of the up projection."""
    ids, found = tiny.tokens(2, 24), list[dict[str, Tensor]]()
    calibration = catsparse.calibrate(load(folder, False), ids, progress=False)
    for spread in (False, True):
        model = adapt(catsparse.sparsify(load(folder, spread), calibration, 0.5), ["up_proj"])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(
            {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        )
    assert found[0].keys() == found[1].keys()
    return max(difference(found[1][name], found[0][name]) for name in found[0])


def said(call: Any) -> str:
    try:
        call()
    except catsparse.CatsparseError as error:
        return str(error)
    return "nothing"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    if rank == 0:
        for size in {*NEURONS.values(), TOO_FEW}:
            config = tiny.llama_config(intermediate_size=size, **HEADS)
            tiny.save_base(folder / str(size), config)
    dist.barrier()
    result: dict[str, Any] = {
        "odd": run_uneven(folder / "51", None),
        "fewer on the last": run_uneven(folder / "50", None),
        "preview": run_uneven(folder / "50", 4),
        "bf16": run_bf16(folder / "50"),
        "adapters": run_adapters(folder / "50"),
        "too few": said(
            lambda: catsparse.calibrate(
                load(folder / str(TOO_FEW), True), tiny.tokens(8, 32), progress=False
            )
        ),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
