"""``bench op``: one gated MLP with cold caches, dense and sparse interleaved in one run.

On a CPU each call is timed by the clock. On a GPU calls on all layers are one CUDA graph, whose
replay is timed by events and divided by the calls, since launches would cost more than the work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from ..kernels import FORMATS
from ..quantized_linear import FLOAT_NAMES
from .gpu import capture, gpu_seconds
from .peers import Peer
from .rows import Probe, Row, commit, device_name, quantiles, seconds, versions
from .setup import INPUTS, KINDS, Setup, Variant
from .shapes import Shape

GRAPH_CALLS = 24  # at least


def bench_op(
    shape: Shape,
    dtype: torch.dtype,
    sparsities: Sequence[float],
    tokens: int,
    device: torch.device,
    rounds: int,
    backend: str = "auto",
    down_copy: bool = True,
    peers: dict[str, Peer] | None = None,
    preview: int | None = None,
    advance: Callable[[], None] = lambda: None,
    formats: Sequence[str] = (),
) -> list[Row]:
    """Time one MLP shape; the rows' order is dense, own kernel at sparsity 0, then each sparsity.

    Calls go round enough layers that each finds its weights outside the caches, and take the
    variants in turn. Every variant is checked against the fp32 reference before it is timed.

    Args:
        peers: other implementations to run beside, by name.
        preview: also the op with previews of so many bits, of the gate and of products, as
            ``catsparse_preview4`` and ``catsparse_product4``.
        advance: called after every round.
        formats: of :data:`catsparse.kernels.FORMATS`: also the op on weights packed so, as
            ``catsparse_int8`` and the like.

    Raises:
        CatsparseError: a variant disagrees with the reference, the shape is too small to be kept
            out of the caches, or the backend cannot run.
    """
    setup = Setup(shape, dtype, tokens, device, backend, down_copy, preview, formats)
    variants = [Variant("dense", 0.0, setup.dense)]
    if device.type == "cuda":
        variants.append(Variant("dense_compiled", 0.0, setup.dense_compiled()))
    for kind in KINDS if preview is not None and setup.runs_kernel else KINDS[:1]:
        name = f"catsparse_{kind}{preview}" if kind else "catsparse"
        for s in sorted({0.0, *sparsities} if not kind else {*sparsities} - {0.0}):
            skipped = setup.bytes_skipped(s, kind) * setup.runs_kernel
            variants.append(Variant(name, s, setup.sparse(s, kind), skipped, kind))
    for name, s in itertools.product(formats, sorted({0.0, *sparsities})):
        skipped = setup.bytes_skipped(s, name)
        call = setup.sparse_packed(s, name)
        variants.append(Variant(f"catsparse_{name}", s, call, skipped, name))
    for (name, peer), s in itertools.product((peers or {}).items(), sorted(set(sparsities))):
        # What a peer reads is its own affair; it is held against what it might have skipped.
        variants.append(Variant(name, s, setup.peer(peer, s), setup.bytes_skipped(s)))
    with torch.no_grad():
        for variant in variants:
            variant.max_err = setup.error(variant)
            for layer in range(len(setup.layers)):  # whatever is made at first use, is made here
                variant.call(layer, setup.inputs[0])
        probe = Probe(device)
        take = _graph_timer(setup, variants) if device.type == "cuda" else _timer(setup, variants)
        for round_number in range(rounds + 1):
            for place, variant in enumerate(variants):
                took = take(place, round_number)
                if round_number:  # the first round warms up
                    variant.seconds.append(took)
            probe.measure()
            advance()
    return _rows(setup, variants, probe)


def _timer(setup: Setup, variants: Sequence[Variant]) -> Callable[[int, int], float]:
    """(place of a variant, round) -> seconds of one call, by the clock."""
    count = len(setup.layers)

    def take(place: int, round_number: int) -> float:
        # Neighbouring calls never share a layer, and every variant meets them all.
        layer = (place + round_number * _stride(variants, setup)) % count
        x, call = setup.inputs[round_number % INPUTS], variants[place].call
        return seconds(lambda: call(layer, x), setup.device)

    return take


def graph_calls(layers: int) -> int:
    """Calls of one graph: every layer equally often, and enough to hide the graph's own start."""
    return -(-max(GRAPH_CALLS, layers) // layers) * layers


def _graph_timer(setup: Setup, variants: Sequence[Variant]) -> Callable[[int, int], float]:
    """(place of a variant, round) -> seconds of a call, from a graph of calls on every layer."""
    count = len(setup.layers)
    calls = graph_calls(count)

    def work(variant: Variant) -> None:
        for number in range(calls):
            variant.call(number % count, setup.inputs[number % INPUTS])

    graphs = [capture(lambda v=v: work(v), v.impl) for v in variants]  # type: ignore[misc]
    return lambda place, _: gpu_seconds(graphs[place].replay) / calls


def _stride(variants: Sequence[Variant], setup: Setup) -> int:
    """Layers from one round's first call to the next's: coprime to their number."""
    count = len(setup.layers)
    return next(n for n in itertools.count(len(variants)) if math.gcd(n, count) == 1)


def _rows(setup: Setup, variants: list[Variant], probe: Probe) -> list[Row]:
    device, own = setup.device, {"dense": 0.0, "dense_compiled": 0.0, "catsparse": 0.0}
    medians = [(v, quantiles([1e6 * s for s in v.seconds])) for v in variants]
    best = min(q[1] for v, q in medians if own.get(v.impl) == v.sparsity)
    rows = []
    for v, (p20, p50, p80) in medians:
        packed = v.kind if v.kind in FORMATS else ""
        limit = 1e6 * setup.weight_bytes[packed] * (1 - v.bytes_skipped) / probe.bandwidth
        rows.append(
            Row(
                what="op",
                name=setup.shape.name,
                impl=v.impl,
                device=device_name(device),
                threads=torch.get_num_threads() if device.type == "cpu" else 0,
                dtype=str(setup.dtype).removeprefix("torch."),
                weights=packed or FLOAT_NAMES[setup.dtype],
                tokens=setup.tokens,
                context=0,
                sparsity=v.sparsity,
                bytes_skipped=v.bytes_skipped,
                p20=p20,
                p50=p50,
                p80=p80,
                limit=limit,
                of_limit=p50 / limit,
                vs_dense=best / p50,
                max_err=v.max_err,
                versions=versions(),
                commit=commit(),
            )
        )
    return rows
