"""Tokens/s of vLLM, dense beside sparse, by batch size -> rows and a table; needs vLLM and a GPU.

    python benchmarks/serving.py [--shape mistral-7b] [--batch 1,2,4,16,64] [--work FOLDER]
        [--variants dense,dense-fp8]

Random weights of the shape are written once; every variant is a process of its own that loads
them: dense, sparse by directories of thresholds over them, prompts dense, and if asked for dense in
fp8 as vLLM quantizes it. A sparse layer is
checked against the fp32 reference before anything is timed. A rate is the batch over the time of a
step, which is the difference of a long and a short run over the tokens between them: the median of
some rounds. The table in docs/serving.md was made by this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from catsparse.files import write_atomic

RESULTS = Path(__file__).parent / "results" / "vllm-cuda.jsonl"
CONTEXT, SHORT, LONG, ROUNDS = 100, 16, 144, 3
MAKE, MADE, FP8 = "make", "made", "dense-fp8"
# Method, bits of the preview, sparsity.
VARIANTS = (("product", 4, 0.5), ("energy", None, 0.5), ("product", 4, 0.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="mistral-7b")
    parser.add_argument("--batch", default="1,2,4,16,64")
    parser.add_argument("--variants", help="names, 'dense' first; default: all but dense-fp8")
    parser.add_argument("--work", type=Path, default=Path("out/serving"))
    parser.add_argument("--run", help=argparse.SUPPRESS)  # a variant's folder, in its process
    args = parser.parse_args()
    batches = [int(part) for part in args.batch.split(",")]
    if args.run is not None:
        if args.run == MAKE:
            make(args.work, args.shape)
        else:
            measure(args.work, args.run, batches)
        return
    if not (args.work / MADE).exists():
        child(args, MAKE)
    names = ["dense", *map(folder_of, VARIANTS)]
    if args.variants:
        names = args.variants.split(",")
        if names[0] != "dense" or not {*names} <= {"dense", FP8, *map(folder_of, VARIANTS)}:
            parser.error(f"--variants takes dense, {FP8} and {', '.join(map(folder_of, VARIANTS))}")
    rows = [row for name in names for row in kept(args, name)]
    dense = {
        row["tokens"]: row["p50"]
        for row in rows
        if row["weights"] == "bf16" and not row["sparsity"]
    }
    for row in rows:
        row["vs_dense"] = row["p50"] / dense[row["tokens"]]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows, batches))


def folder_of(variant: tuple[str, int | None, float]) -> str:
    method, preview, sparsity = variant
    return f"{method}{preview or ''}-{sparsity:.0%}"


def kept(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """A variant's rows, which an interrupted run goes on from in the same folder."""
    path = args.work / f"{name}-{args.batch}.json"
    if not path.exists():
        rows = json.dumps(child(args, name))
        write_atomic(path, lambda file: file.write_text(rows, encoding="utf-8"))
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def child(args: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """A process's rows: it gives the GPU's memory back when it ends."""
    command = [sys.executable, __file__, "--shape", args.shape, "--batch", args.batch]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--work", str(args.work), "--run", name], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{(done.stdout + done.stderr)[-6000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"what"')]
    took = time.perf_counter() - start
    print(f"{name}: {len(lines)} rows, {took:.0f} s", file=sys.stderr, flush=True)
    return [json.loads(line) | {"name": args.shape} for line in lines]


def make(work: Path, shape: str) -> None:
    """The weights, and a directory of thresholds for every variant."""
    import catsparse
    from catsparse import hub
    from catsparse.bench.shapes import find_shape, random_model

    base = work / "dense"
    random_model(find_shape(shape), torch.bfloat16, "cuda").save_pretrained(base)
    model = hub.load_dense_model(str(base), dtype=torch.bfloat16).to("cuda")
    windows = torch.randint(3, 30_000, (4, 256), generator=torch.Generator().manual_seed(0))
    for preview in {preview for _, preview, _ in VARIANTS}:
        calibration = catsparse.calibrate(model, windows, preview=preview, progress=False)
        for variant in VARIANTS:
            if variant[1] == preview:
                catsparse.sparsify(model, calibration, variant[2], variant[0], prefill="dense")
                catsparse.save(model, work / folder_of(variant))
                catsparse.densify(model)
    (work / MADE).touch()


def measure(work: Path, name: str, batches: list[int]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    from vllm import LLM, SamplingParams

    from catsparse.bench.rows import commit, device_name, versions

    options: dict[str, Any] = {}
    if name == FP8:
        options = {"quantization": "fp8"}
    elif name != "dense":
        from catsparse.vllm_plugin import register

        register()  # the package may run from its source tree, where no entry point is
        settings = {"quant_method": "cats", "artifact": str(work / name)}
        options = {"quantization": "cats", "hf_overrides": {"quantization_config": settings}}
    llm = LLM(
        str(work / "dense"),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.8,
        **options,
    )
    error = 0.0 if name in ("dense", FP8) else check(llm)
    for batch in batches:
        ids = torch.randint(3, 30_000, (batch, CONTEXT), generator=torch.Generator().manual_seed(1))
        prompts = [{"prompt_token_ids": row} for row in ids.tolist()]

        def seconds(new: int, prompts: list[Any] = prompts) -> float:
            wanted = SamplingParams(
                temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
            )
            start = time.perf_counter()
            llm.generate(prompts, wanted, use_tqdm=False)
            return time.perf_counter() - start

        seconds(SHORT)
        steps = [(seconds(LONG) - seconds(SHORT)) / (LONG - SHORT) for _ in range(ROUNDS)]
        impl, _, sparsity = name.removesuffix("-fp8").partition("-")
        row = {
            "what": "vllm",
            "impl": impl,
            "device": device_name(torch.device("cuda")),
            "dtype": "bfloat16",
            "weights": "fp8" if name == FP8 else "bf16",
            "tokens": batch,
            "context": CONTEXT,
            "prefill": "dense",
            "sparsity": float(sparsity.rstrip("%") or 0) / 100,
            "p50": batch / statistics.median(steps),
            "max_err": error,
            "versions": versions() | {"vllm": __import__("vllm").__version__},
            "commit": commit(),
        }
        print("\n" + json.dumps(row), flush=True)


def check(llm: Any) -> float:
    """Largest error of a layer's result, over the largest value, against the fp32 reference."""
    from catsparse.kernels import gated_mlp_reference
    from catsparse.vllm_plugin.layers import shards_of

    shard = next(iter(llm.apply_model(shards_of)[0].values()))
    weights = shard.raw_weights(torch.bfloat16)
    assert weights is not None
    gate, up, down_t = weights.floats(torch.float32)
    x = torch.randn(1, gate.shape[1], device=gate.device, dtype=torch.bfloat16)
    preview = shard.catsparse_preview, shard.catsparse_preview_scale
    threshold, product = shard.limits(preview[0])
    means = shard.catsparse_mean, shard.catsparse_bias
    with torch.no_grad():
        y = shard(x).float()
        truth = gated_mlp_reference(
            *(x.float(), gate, up, down_t, threshold, shard.site_act, *means, product, *preview)
        )
    error = float((y - truth).abs().max() / truth.abs().max())
    if not error < 4e-2:
        raise SystemExit(f"the sparse layer differs from the reference by {error:.2g}")
    return error


def table(rows: list[dict[str, Any]], batches: list[int]) -> str:
    lines = [f"| | {' | '.join(map(str, batches))} |", "|---" * (len(batches) + 1) + "|"]
    keys = ("impl", "weights", "sparsity")
    for kind in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        cells = [
            f"{row['p50']:.0f} ({row['vs_dense']:.2f})"
            for row in rows
            if tuple(row[key] for key in keys) == kind
        ]
        impl, weights, sparsity = kind
        label = f"{impl}, {weights}" if impl == "dense" else f"{impl}, {sparsity:.0%}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
