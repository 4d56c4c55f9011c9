"""A model of decode speed: what a step reads, over how fast a GPU reads it.

A step's time on one GPU is

    weights / (efficiency x bandwidth) x (1 + token x (batch - 1))
    + cache / (cache_efficiency x bandwidth) + layers x (layer + preview + 2 sums over ranks)

The constants are :class:`Costs`, fitted on measured dense rows in :mod:`.costs`; what sparsity
does to the time follows from the bytes, :mod:`.traffic`. docs/scale.md holds it against measured
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import CatsparseError
from ..kernels import MAX_OP_TOKENS
from .traffic import BF16, Layer, Setting, head_bytes, layer_bytes, memory_bytes, sparse_tokens

LOGITS = 4  # bytes of one


@dataclass(frozen=True)
class Costs:
    """What a step costs beside its bytes at the GPU's bandwidth.

    Attributes:
        efficiency: of the probed bandwidth, at which weights stream.
        token: a further sequence lengthens that stream by this share.
        layer: seconds a layer: launches, and what waits for them.
        cache_efficiency: of the probed bandwidth, at which keys and values are read.
        preview: seconds a layer that a decision on a preview takes beside its bytes.
    """

    efficiency: float
    token: float
    layer: float
    cache_efficiency: float = 1.0
    preview: float = 0.0


@dataclass(frozen=True)
class Machine:
    """One engine on GPUs of a kind.

    Attributes:
        engine: of :data:`.traffic.ENGINES`, says how many tokens of a step run sparse; or ``op``.
        bandwidth: bytes/s that a kernel which only reads gets from memory.
        few: of steps by the sparse kernels, dense ones of as many tokens included.
        many: of steps with more tokens.
        link_latency: seconds that a sum over ranks or a hop takes beside its bytes.
        link_bandwidth: bytes/s from GPU to GPU in one direction.
    """

    engine: str
    bandwidth: float
    few: Costs
    many: Costs
    link_latency: float
    link_bandwidth: float


@dataclass(frozen=True)
class Step:
    """A simulated decode step.

    Attributes:
        layer: a layer's bytes on one rank.
        head: bytes of the output layer on one rank.
        weights, cache, fixed, links: seconds of all layers and the output layer.
        latency: seconds from one token of a sequence to its next.
        slowest: seconds of the slowest stage.
        memory: bytes that the fullest GPU holds: :func:`.traffic.memory_bytes`.
    """

    layer: Layer
    head: float
    weights: float
    cache: float
    fixed: float
    links: float
    latency: float
    slowest: float
    memory: float


def simulate(setting: Setting, machine: Machine) -> Step:
    """One decode step of ``setting`` on ``machine``.

    Raises:
        CatsparseError: the engine does not take so many sequences, or such weights.
    """
    if machine.engine == "catsparse" and setting.batch > MAX_OP_TOKENS:
        raise CatsparseError(
            f"the step of catsparse.generate takes up to {MAX_OP_TOKENS} sequences, not "
            f"{setting.batch}; give --engine vllm"
        )
    shape, batch, pp = setting.shape, setting.batch, setting.pp
    most = sparse_tokens(setting, machine.engine)
    layer = layer_bytes(setting, most)
    # By tokens alone, as the whole step changes its kernels with them, dense or not.
    few = machine.engine != "catsparse" or batch <= most
    costs = machine.few if few else machine.many
    head = head_bytes(setting)
    speed = costs.efficiency * machine.bandwidth / (1 + costs.token * (batch - 1))
    weights = (layer.attention + layer.mlp) / speed
    cache = layer.cache / (costs.cache_efficiency * machine.bandwidth)
    fixed = costs.layer + costs.preview * layer.by_preview
    message = batch * shape.hidden * BF16
    links = 2 * sum_seconds(message, setting.tp, machine)
    each = weights + cache + fixed + links
    # Each rank holds a part of the logits and gets the others'.
    gather = batch * shape.vocab * LOGITS
    logits = sum_seconds(gather / 2, setting.tp, machine)
    last = head / speed + logits
    hop = machine.link_latency + message / machine.link_bandwidth if pp > 1 else 0.0
    longest, shortest = math.ceil(shape.layers / pp), shape.layers // pp
    return Step(
        layer,
        head,
        weights=shape.layers * weights + head / speed,
        cache=shape.layers * cache,
        fixed=shape.layers * fixed,
        links=shape.layers * links + logits + (pp - 1) * hop,
        latency=shape.layers * each + last + (pp - 1) * hop,
        slowest=max(longest * each, shortest * each + last),
        memory=memory_bytes(setting, layer),
    )


def sum_seconds(size: float, ranks: int, machine: Machine) -> float:
    """Adding up ``size`` bytes over ranks: each sends and gets them but its own share, twice."""
    if ranks == 1:
        return 0.0
    return machine.link_latency + 2 * (ranks - 1) / ranks * size / machine.link_bandwidth


@dataclass(frozen=True)
class Simulated:
    """One simulated figure, a line of simulated.jsonl; ``what`` tells it from measured ones.

    Attributes:
        name: shape. gpu: its name, or its bandwidth.
        overlap, batch, context, weights, preview, products, tp, pp, experts, active_experts: see
            :class:`.traffic.Setting`.
        sparsity: fraction of neurons that one token drops.
        bytes_skipped: fraction of the MLP bytes of the dense step that is not read.
        read_gb: GB that a step reads through one rank of every stage, the cache included.
        memory_gb: GB that the fullest GPU holds.
        tokens_per_second: of all sequences of one batch.
        full_tokens_per_second: of as many batches as there are stages, all under way.
        bytes_allow: speedup over dense if nothing but bytes took time.
        vs_dense: speedup over the dense step.
        weights_time, cache_time, fixed_time, links_time: shares of the step's time: reading
            weights, keys and values; what layers take beside; sums over ranks and hops.
    """

    what: str
    name: str
    engine: str
    gpu: str
    weights: str
    preview: int | None
    products: bool
    overlap: float
    sparsity: float
    batch: int
    context: int
    tp: int
    pp: int
    experts: int
    active_experts: int
    bytes_skipped: float
    read_gb: float
    memory_gb: float
    tokens_per_second: float
    full_tokens_per_second: float
    bytes_allow: float
    vs_dense: float
    weights_time: float
    cache_time: float
    fixed_time: float
    links_time: float


def simulated_row(setting: Setting, machine: Machine, gpu: str) -> Simulated:
    """``setting`` beside the same with nothing dropped."""
    step, dense = simulate(setting, machine), simulate(setting.dense, machine)
    layers, layer = setting.shape.layers, step.layer
    read = layers * (layer.attention + layer.mlp + layer.cache) + step.head
    unread = layer.dense_mlp - layer.mlp
    return Simulated(
        what="simulated",
        name=setting.shape.name,
        engine=machine.engine,
        gpu=gpu,
        weights=setting.weights,
        preview=setting.preview,
        products=setting.products,
        overlap=setting.overlap,
        sparsity=setting.sparsity,
        batch=setting.batch,
        context=setting.context,
        tp=setting.tp,
        pp=setting.pp,
        experts=setting.experts,
        active_experts=setting.active,
        bytes_skipped=unread / layer.dense_mlp,
        read_gb=read / 1e9,
        memory_gb=step.memory / 1e9,
        tokens_per_second=setting.batch / step.latency,
        full_tokens_per_second=setting.batch / step.slowest,
        bytes_allow=1 + layers * unread / read,
        vs_dense=dense.latency / step.latency,
        weights_time=step.weights / step.latency,
        cache_time=step.cache / step.latency,
        fixed_time=step.fixed / step.latency,
        links_time=step.links / step.latency,
    )
