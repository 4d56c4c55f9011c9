"""A sparse model spread over processes says what it says in one.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py

One process makes the bundled model sparse, saves it and generates; then all load their part of it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from transformers.distributed import DistributedConfig

import catsparse

# transformers' own plan is tp_plan="auto". The bundled model's five key and value heads cannot be
# dealt out to two ranks, so its attention is put together again on each of them.
PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def make(folder: str) -> None:
    """The bundled model with half of its neurons dropped."""
    model = catsparse.hub.load_dense_model("default", dtype=torch.float32)
    texts = [catsparse.hub.bundled_text("calibration").read_text()]
    tokenizer = catsparse.hub.load_tokenizer("default")
    calibration = catsparse.calibrate(model, texts, tokenizer, tokens=20_000, progress=False)
    catsparse.save(catsparse.sparsify(model, calibration, sparsity=0.5), folder)


def generate(model: Any) -> list[int]:
    ids = catsparse.hub.load_tokenizer("default")("The captain looked", return_tensors="pt")
    ids = ids["input_ids"].to(model.device)
    out = catsparse.generate(model, ids, max_new_tokens=24, do_sample=False)
    return [int(token) for token in out[0, ids.shape[1] :]]


def main() -> int:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(minutes=5))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    where = [tempfile.mkdtemp(prefix="catsparse-") if rank == 0 else ""]
    dist.broadcast_object_list(where)
    folder, alone = where[0], []
    if rank == 0:
        make(folder)
        alone = generate(catsparse.load(folder, dtype=torch.float32))
    dist.barrier()

    spread = DistributedConfig(tp_size=ranks, tp_plan=PLAN)
    model = catsparse.load(folder, dtype=torch.float32, distributed_config=spread)
    together: list[Any] = [None] * ranks
    dist.all_gather_object(together, (generate(model), catsparse.explain(model).split("\n")[0]))
    equal = [tokens == alone for tokens, _ in together]
    if rank == 0:
        print("one process:", *alone)
        for number, (tokens, how) in enumerate(together):
            print(f"rank {number}:     ", *tokens)
            print(f"  {how}")
        print("equal tokens" if all(equal) else "tokens differ")
        shutil.rmtree(folder)
    dist.destroy_process_group()
    return 0 if rank or all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
