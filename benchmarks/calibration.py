"""What calibration costs over the plain forward passes it rides on: time and peak memory.

    python benchmarks/calibration.py [MODEL] [--tokens N] [--device cuda]

Each figure comes from a process of its own that alternates plain and calibrating passes over the
same tokens (time, medians) or does only one kind (peak memory). Rows go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from catsparse import calibrate, hub

RESULTS = Path(__file__).parent / "results"
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=hub.DEFAULT_MODEL)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", choices=("time", "plain", "calibrate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_child(args)))
        return
    parts = {kind: _run_child(kind) for kind in ("time", "plain", "calibrate")}
    row = {
        "model": Path(args.model).name,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": args.tokens,
        "rounds": args.rounds,
        **parts["time"],
        "plain_peak_mb": parts["plain"]["peak_mb"],
        "calibrate_peak_mb": parts["calibrate"]["peak_mb"],
    }
    row["time_ratio"] = row["calibrate_seconds"] / row["plain_seconds"]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"calibration-{row['model']}-{args.device}.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    print(json.dumps(row, indent=2))


def _run_child(kind: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().split("\n")[-1])
    return result


def _child(args: argparse.Namespace) -> dict[str, float]:
    model = hub.load_dense_model(args.model).to(args.device)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(
        2, model.config.vocab_size, (args.tokens // args.seq_len, args.seq_len), generator=generator
    )

    def plain() -> None:
        with torch.no_grad():
            for ids in windows.split(BATCH):
                model(input_ids=ids.to(args.device), use_cache=False)
        _wait(args.device)

    def calibrating() -> None:
        calibrate(model, windows, batch_size=BATCH, progress=False)
        _wait(args.device)

    if args.child == "time":
        seconds: dict[str, list[float]] = {"plain": [], "calibrate": []}
        plain()  # warm
        for _ in range(args.rounds):
            for name, work in (("plain", plain), ("calibrate", calibrating)):
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
        return {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    plain() if args.child == "plain" else calibrating()
    if args.device == "cpu":
        return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return {"peak_mb": torch.cuda.max_memory_allocated() / 2**20}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
