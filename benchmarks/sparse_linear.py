"""catsparse::sparse_linear on a GPU: attention's projections with inputs dropped -> rows, a table.

    python benchmarks/sparse_linear.py [shape ...]

One token, bf16, the norm in front included (none before o), weights outside the caches. Beside it
torch's dense product and our own (linear.cu); all take turns in one run, as CUDA graphs, after each
was checked against the reference. The table in docs/kernels.md was made by this script.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from catsparse.bench.gpu import capture, gpu_seconds
from catsparse.bench.op import graph_calls
from catsparse.bench.rows import (
    TOLERANCE,
    Probe,
    commit,
    device_name,
    last_level_cache,
    versions,
)
from catsparse.bench.shapes import Shape, find_shape
from catsparse.errors import CatsparseError
from catsparse.kernels import sparse_linear_reference
from catsparse.kernels.linear import linear
from catsparse.kernels.sparse_linear_cuda import launch_sparse_linear
from catsparse.kernels.stream import Norm, rms_norm

SHAPES = ("llama-3.2-1b", "mistral-7b", "llama-3-70b")
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.7)
ROUNDS, INPUTS, DTYPE = 31, 8, torch.bfloat16
RESULTS = Path(__file__).parent / "results" / "sparse-linear-cuda.jsonl"


@dataclass
class Variant:
    impl: str
    sparsity: float
    call: Callable[[int, Tensor], Tensor]
    seconds: list[float] = field(default_factory=list)
    max_err: float = 0.0


def parts_of(shape: Shape) -> dict[str, tuple[int, list[int]]]:
    """Inputs, and outputs of each product that shares them."""
    size = shape.head_dim or shape.hidden // shape.heads
    query, key = shape.heads * size, shape.kv_heads * size
    return {"qkv": (shape.hidden, [query, key, key]), "o": (query, [shape.hidden])}


class Setup:
    """Copies of one layer's weights that exceed the caches, inputs, and the calls on them."""

    def __init__(self, inputs: int, outputs: list[int], normed: bool) -> None:
        torch.manual_seed(0)
        self.weight_bytes = inputs * sum(outputs) * DTYPE.itemsize
        # A call that drops 70% still must not find its rows in the cache.
        count = 2 + 20 * last_level_cache(torch.device("cuda")) // self.weight_bytes
        self.weights = [
            [torch.randn(n, inputs, device="cuda", dtype=DTYPE) / inputs**0.5 for n in outputs]
            for _ in range(count)
        ]
        self.transposed = [[w.t().contiguous() for w in weights] for weights in self.weights]
        self.x = [torch.randn(1, inputs, device="cuda", dtype=DTYPE) for _ in range(INPUTS)]
        gain = torch.rand(inputs, device="cuda", dtype=DTYPE) + 0.5
        self.norm = Norm(gain, 1e-5) if normed else None
        self.biases = [None] * len(outputs)

    def normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else rms_norm(x, self.norm)

    def torch_dense(self, layer: int, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = F.rms_norm(x, x.shape[-1:], self.norm.weight, self.norm.eps)
        y: Tensor = torch.cat([F.linear(x, w) for w in self.weights[layer]], dim=-1)
        return y

    def our_dense(self, layer: int, x: Tensor) -> Tensor:
        return linear(x, self.weights[layer], self.biases, self.norm)

    def sparse(self, threshold: Tensor, layer: int, x: Tensor) -> Tensor:
        return launch_sparse_linear(x, self.transposed[layer], threshold, norm=self.norm)

    def threshold(self, sparsity: float) -> Tensor:
        """The quantile over all inputs, halfway to the next value: no rounding flips a decision."""
        if not sparsity:
            return torch.tensor(-1.0, device="cuda")
        values = torch.cat([self.normed(x) for x in self.x]).float().abs().flatten().sort().values
        at = values[int(sparsity * len(values)) - 1]
        return (at + values[values > at][0]) / 2

    def error(self, variant: Variant) -> float:
        """Of the first layer, over the largest value; :class:`CatsparseError` if it is large."""
        whole, threshold = torch.cat(self.weights[0]), self.threshold(variant.sparsity)
        worst = 0.0
        for x in self.x[:2]:
            truth = sparse_linear_reference(self.normed(x).float(), whole.float().t(), threshold)
            y = variant.call(0, x).float()
            worst = max(worst, float((y - truth).abs().max() / truth.abs().max()))
        if not worst <= TOLERANCE[DTYPE]:
            raise CatsparseError(f"{variant.impl} at {variant.sparsity} differs by {worst:.2g}")
        return worst


def measure(name: str, part: str, inputs: int, outputs: list[int]) -> list[dict[str, object]]:
    setup, probe = Setup(inputs, outputs, part == "qkv"), Probe(torch.device("cuda"))
    variants = [
        Variant("dense", 0.0, setup.torch_dense),
        Variant("linear", 0.0, setup.our_dense),
        *(
            Variant("sparse_linear", s, partial(setup.sparse, setup.threshold(s)))
            for s in SPARSITIES
        ),
    ]
    count = len(setup.weights)
    calls = graph_calls(count)

    def work(variant: Variant) -> None:
        for number in range(calls):
            variant.call(number % count, setup.x[number % INPUTS])

    graphs = []
    for variant in variants:
        variant.max_err = setup.error(variant)
        graphs.append(capture(partial(work, variant), variant.impl))
    for number in range(ROUNDS + 1):
        for variant, graph in zip(variants, graphs, strict=True):
            took = gpu_seconds(graph.replay) / calls
            if number:  # the first round warms up
                variant.seconds.append(took)
        probe.measure()
    medians = [1e6 * statistics.median(v.seconds) for v in variants]
    best = min(medians[:2])
    limits = [1e6 * setup.weight_bytes * (1 - v.sparsity) / probe.bandwidth for v in variants]
    return [
        {
            "what": "sparse_linear",
            "name": name,
            "part": part,
            "impl": v.impl,
            "device": device_name(torch.device("cuda")),
            "dtype": "bfloat16",
            "tokens": 1,
            "sparsity": v.sparsity,
            "p50": median,
            "limit": limit,
            "of_limit": median / limit,
            "vs_dense": best / median,
            "max_err": v.max_err,
            "versions": versions(),
            "commit": commit(),
        }
        for v, median, limit in zip(variants, medians, limits, strict=True)
    ]


def main() -> None:
    rows = []
    head = ["", "torch, dense", "`linear`, dense", "none dropped"]
    print(f"| {' | '.join([*head, *(f'{s:.0%}' for s in SPARSITIES[1:])])} |")
    print("|---" * (len(head) + len(SPARSITIES) - 1) + "|")
    for name in sys.argv[1:] or SHAPES:
        for part, (inputs, outputs) in parts_of(find_shape(name)).items():
            found = measure(name, part, inputs, outputs)
            cells = [f"{r['p50']:.1f}" for r in found]
            print(f"| {name}, {part} | {' | '.join(cells)} |", flush=True)
            rows += found
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
