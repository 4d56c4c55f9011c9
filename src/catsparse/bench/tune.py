"""``bench tune``: how well the CUDA kernel's rule for plans does against every other plan."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CatsparseError
from ..kernels import Call
from ..kernels.cuda import launch, why_not_cuda, why_not_sizes
from ..kernels.stream import Plan, find_plan
from .gpu import capture, gpu_seconds
from .op import graph_calls
from .rows import TOLERANCE, commit, device_name, quantiles, versions
from .setup import INPUTS, Setup
from .shapes import Shape

_PIECE = 16  # bytes, the kernel's


@dataclass(frozen=True)
class TuneRow:
    """One plan on one kind of call, as a line of rows.jsonl.

    Attributes:
        what: ``tune``. name: the shape. plan: threads, rows and chunks of :class:`Plan`.
        rule: whether it is the plan that the kernel takes by itself.
        p20, p50, p80: microseconds. vs_rule: the rule's median over this one's.
    """

    what: str
    name: str
    device: str
    dtype: str
    tokens: int
    sparsity: float
    plan: dict[str, int]
    rule: bool
    p20: float
    p50: float
    p80: float
    vs_rule: float
    versions: dict[str, str]
    commit: str | None


@dataclass
class _Timed:
    plan: Plan
    sparsity: float
    graph: torch.cuda.CUDAGraph
    thresholds: list[Tensor]  # the graph reads them
    seconds: list[float] = field(default_factory=list)


def candidates(row_bytes: int, tokens: int) -> list[Plan]:
    """The rule's plan first, then whatever else a block can be."""
    pieces = -(-row_bytes // _PIECE)
    plans = [find_plan(row_bytes, tokens)]
    for columns, rows, chunks in itertools.product((1, 2, 4), (2, 4, 8), (1, 2, 3, 4)):
        threads = -(-pieces // (32 * columns)) * 32
        if 64 <= threads <= 512 and columns * tokens <= 8:
            plans.append(Plan(threads, rows, chunks))
    return list(dict.fromkeys(plans))


def bench_tune(
    shape: Shape,
    dtype: torch.dtype,
    sparsities: Sequence[float],
    tokens: int,
    device: torch.device,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[TuneRow]:
    """Time every plan for one MLP shape in turn, in one run.

    Raises:
        CatsparseError: the kernel cannot run here or does not take the shape, or a plan's result
            disagrees with the rule's.
    """
    reason = why_not_cuda(device) or why_not_sizes(
        device, dtype, shape.hidden, shape.intermediate, shape.hidden
    )
    if reason is not None:
        raise CatsparseError(f"there is nothing to tune: {reason}")
    if tokens > 4:
        raise CatsparseError(f"a launch takes at most 4 tokens, not {tokens}")
    setup = Setup(shape, dtype, tokens, device, "cuda", True)
    weights = [setup.weights(layer) for layer in range(len(setup.layers))]
    layers = [(gate, up, down.t().contiguous()) for gate, up, down in weights]
    timed = []
    with torch.no_grad():
        for plan in candidates(shape.hidden * dtype.itemsize, tokens):
            for s in sorted(set(sparsities)):
                timed.append(_prepare(setup, layers, plan, s))
            advance()
        for round_number in range(rounds + 1):
            for entry in timed:
                took = gpu_seconds(entry.graph.replay) / graph_calls(len(layers))
                if round_number:  # the first round warms up
                    entry.seconds.append(took)
            advance()
    return _rows(setup, timed)


def _prepare(
    setup: Setup, layers: list[tuple[Tensor, Tensor, Tensor]], plan: Plan, sparsity: float
) -> _Timed:
    thresholds = setup.thresholds(sparsity)

    def call(number: int, plan: Plan | None) -> Tensor:
        layer, x = number % len(layers), setup.inputs[number % INPUTS]
        call = Call(x, *layers[layer], thresholds[layer], setup.shape.act)
        return launch(call, plan=plan)

    expected, y = call(0, None).float(), call(0, plan).float()
    error = float((y - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[setup.dtype]:
        raise CatsparseError(f"{plan} differs from the rule's result by {error:.2g}")

    def work() -> None:
        for number in range(graph_calls(len(layers))):
            call(number, plan)

    work()
    return _Timed(plan, sparsity, capture(work, str(plan)), thresholds)


def _rows(setup: Setup, timed: list[_Timed]) -> list[TuneRow]:
    rule = timed[0].plan
    base = {e.sparsity: statistics.median(e.seconds) for e in timed if e.plan == rule}
    rows = []
    for entry in timed:
        p20, p50, p80 = quantiles([1e6 * s for s in entry.seconds])
        rows.append(
            TuneRow(
                what="tune",
                name=setup.shape.name,
                device=device_name(setup.device),
                dtype=str(setup.dtype).removeprefix("torch."),
                tokens=setup.tokens,
                sparsity=entry.sparsity,
                plan={
                    "threads": entry.plan.threads,
                    "rows": entry.plan.rows,
                    "chunks": entry.plan.chunks,
                },
                rule=entry.plan == rule,
                p20=p20,
                p50=p50,
                p80=p80,
                vs_rule=1e6 * base[entry.sparsity] / p50,
                versions=versions(),
                commit=commit(),
            )
        )
    return rows
