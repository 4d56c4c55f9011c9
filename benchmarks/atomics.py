"""What sums in a fixed order cost the CUDA kernel, against atomic additions to one output.

The other version is made from the same source: blocks add to one zeroed output instead of writing
partial ones, and the second launch only rounds it. Its results differ from run to run. Both take
turns in one run, as CUDA graphs. Prints rows: medians in microseconds.

    python benchmarks/atomics.py [shape ...]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from catsparse.bench.gpu import capture, gpu_seconds
from catsparse.bench.setup import INPUTS, Setup
from catsparse.bench.shapes import find_shape
from catsparse.kernels import Call, cuda

ORDERED = cuda.SOURCE
STORE = "*(float4 *)(to + at + e) = make_float4(v[0], v[1], v[2], v[3]);"
ADD = """asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + at + e), "f"(v[0]),
    "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");"""
PLACE = "p.partial + ((long long)blockIdx.x * p.tokens + t) * p.columns"
CALLS, ROUNDS = 16, 21


class OneOutput:
    """torch, but a partial output is one zeroed row: what the atomic version adds to."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, blocks: int, size: int, **options: Any) -> Tensor:
        return torch.zeros(1, size, **options)


def use(source: Path, atomic: bool) -> None:
    cuda.SOURCE = source
    cuda.torch = OneOutput() if atomic else torch  # type: ignore[assignment]
    cuda._build.cache_clear()


def atomic_source(folder: Path) -> Path:
    text = ORDERED.read_text(encoding="utf-8")
    assert text.count(STORE) == 1
    assert text.count(PLACE) == 1
    assert text.count("p.parts;") == 1
    text = text.replace(STORE, ADD)
    text = text.replace(PLACE, "p.partial + (long long)t * p.columns").replace("p.parts;", "1;")
    path = folder / ORDERED.name
    path.write_text(text, encoding="utf-8")
    return path


@torch.no_grad()
def main(names: list[str]) -> None:
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        versions = {"ordered": ORDERED, "atomic": atomic_source(Path(folder))}
        for name in names:
            setup = Setup(find_shape(name), torch.bfloat16, 1, device, "cuda", True)
            weights = [setup.weights(layer) for layer in range(len(setup.layers))]
            layers = [(gate, up, down.t().contiguous()) for gate, up, down in weights]
            for sparsity in (0.0, 0.5, 0.9):
                thresholds = setup.thresholds(sparsity)
                graphs, first = {}, {}
                for version, source in versions.items():
                    use(source, version == "atomic")
                    results: list[Tensor] = []

                    def work(results: list[Tensor] = results) -> None:
                        results.clear()
                        for call in range(CALLS):
                            layer = call % len(layers)  # noqa: B023
                            x, limit = setup.inputs[call % INPUTS], thresholds[layer]  # noqa: B023
                            results.append(cuda.launch(Call(x, *layers[layer], limit, "silu")))  # noqa: B023

                    work()
                    first[version] = results[0].float()
                    graphs[version] = capture(work, version)
                difference = (first["ordered"] - first["atomic"]).abs().max()
                assert difference < 0.02 * first["ordered"].abs().max(), "versions disagree"
                seconds: dict[str, list[float]] = {version: [] for version in graphs}
                for _ in range(ROUNDS):
                    for version, graph in graphs.items():
                        seconds[version].append(gpu_seconds(graph.replay) / CALLS)
                ordered, atomic = (1e6 * statistics.median(seconds[v]) for v in versions)
                row = {
                    "what": "fixed_order",
                    "name": name,
                    "device": torch.cuda.get_device_name(device),
                    "dtype": "bfloat16",
                    "sparsity": sparsity,
                    "ordered": round(ordered, 2),
                    "atomic": round(atomic, 2),
                    "ordered_costs": round(ordered / atomic - 1, 4),
                }
                print(json.dumps(row), flush=True)
            use(ORDERED, False)


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama-3.2-1b", "mistral-7b", "llama-3-70b"])
