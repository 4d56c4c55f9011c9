"""Tokens/s of transformers and of catsparse.generate, dense beside sparse, in one run -> rows.

    python benchmarks/engines.py [--shape mistral-7b] [--device cuda] [--dtype bfloat16]

Random weights of the shape. transformers' rates are of `model.generate` of the same object, dense
and sparse; catsparse's of its captured step. The median of some rounds in turn, each a prompt of
100 tokens and a long answer less a short one. `benchmarks/serving.py` has vLLM's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import catsparse
from catsparse.bench.checks import check
from catsparse.bench.rows import commit, device_name, parse_dtype, versions
from catsparse.bench.shapes import find_shape, random_model
from catsparse.surgery import run_dense

RESULTS = Path(__file__).parent / "results" / "engines.jsonl"
CONTEXT, ROUNDS = 100, 3
ENGINES = ("transformers", "catsparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--preview", type=int, default=4)
    parser.add_argument("--short", type=int, default=16)
    parser.add_argument("--long", type=int, default=80)
    args = parser.parse_args()
    shape, dtype = find_shape(args.shape), parse_dtype(args.dtype)
    model = random_model(shape, dtype, args.device)
    ids = torch.randint(shape.vocab, (4, 128), generator=torch.Generator().manual_seed(0))
    calibration = catsparse.calibrate(model, ids, preview=args.preview, progress=False)
    prompt = ids[:1, :CONTEXT].to(args.device)
    rates: dict[tuple[str, float], list[float]] = {}
    for sparsity in (0.5, 0.7):
        catsparse.sparsify(model, calibration, sparsity, "product", prefill="dense")
        wrong = check(model, prompt)  # no wrong result is timed
        print(f"sparsity {sparsity}: largest error {wrong:.2g}")
        for round_number in range(ROUNDS + 1):
            for engine in ENGINES:
                for at in (0.0, sparsity):
                    with run_dense(model) if at == 0 else nullcontext():
                        took = seconds(model, engine, prompt, args.long)
                        took -= seconds(model, engine, prompt, args.short)
                    if round_number:  # the first round warms up
                        rate = (args.long - args.short) / took
                        rates.setdefault((engine, at), []).append(rate)
        catsparse.densify(model)
    rows = [row(args, engine, at, found) for (engine, at), found in rates.items()]
    dense = {r["impl"]: r["p50"] for r in rows if r["sparsity"] == 0}
    for r in rows:
        r["vs_dense"] = r["p50"] / dense[r["impl"]]
        print(f"{r['impl']:>12} {r['sparsity']:.1f} {r['p50']:8.2f} tokens/s {r['vs_dense']:.2f}")
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)


def seconds(model: Any, engine: str, prompt: torch.Tensor, new_tokens: int) -> float:
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    wait = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    if engine == "catsparse":
        catsparse.generate(model, prompt, **options)
    else:
        model.generate(prompt, pad_token_id=0, **options)
    wait()
    return time.perf_counter() - start


def row(args: Any, engine: str, sparsity: float, rates: list[float]) -> dict[str, Any]:
    return {
        "what": "decode",
        "name": args.shape,
        "impl": engine,
        "device": device_name(torch.device(args.device)),
        "threads": 0 if args.device == "cuda" else torch.get_num_threads(),
        "dtype": args.dtype,
        "tokens": 1,
        "context": CONTEXT,
        "method": "product" if sparsity else None,
        "preview": args.preview if sparsity else None,
        "sparsity": sparsity,
        "p50": statistics.median(rates),
        "rounds": len(rates),
        "versions": versions(),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
