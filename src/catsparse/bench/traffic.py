"""Bytes that a decode step reads on one GPU: weights, previews and cache, of any share of a model.

What a batch keeps, what experts are visited and how ranks cut a layer, by hand and in closed form;
nothing here knows how fast a byte is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .. import footprint
from ..errors import CatsparseError
from ..footprint import preview_bytes
from ..kernels.cuda import auto_tokens
from ..kernels.stream import group_size
from .shapes import Shape

WEIGHTS = ("bf16", "fp8", "int8", "int4")
ENGINES = ("catsparse", "vllm")
BF16 = 2  # bytes: of activations, the cache, the router and the embedding, which stay bf16


@dataclass(frozen=True)
class Setting:
    """What decodes.

    Attributes:
        shape: of the model; with ``experts`` its MLP is one expert's.
        sparsity: fraction of neurons that one token drops.
        batch: sequences of a step. context: tokens of each in the cache.
        weights: of all linear layers, one of :data:`WEIGHTS`.
        preview: its bits, 4 or 8; None if the exact gate decides.
        products: the preview is of gate and up.
        overlap: 0 if tokens drop neurons independently, 1 if all drop the same: :func:`union`.
        tp: ranks that share every layer. pp: stages that layers are dealt to.
        experts: MLPs of a layer. active: those that a token visits, each equally likely.

    Raises:
        CatsparseError: the numbers do not go together.
    """

    shape: Shape
    sparsity: float = 0.0
    batch: int = 1
    context: int = 100
    weights: str = "bf16"
    preview: int | None = None
    products: bool = False
    overlap: float = 0.0
    tp: int = 1
    pp: int = 1
    experts: int = 1
    active: int = 1

    def __post_init__(self) -> None:
        shape, tp = self.shape, self.tp
        if not shape.layers:
            raise CatsparseError(f"{shape.name} is the shape of an MLP; name a model's")
        if any(size % tp for size in (shape.heads, shape.intermediate)) or (
            shape.kv_heads % tp and tp % shape.kv_heads
        ):
            raise CatsparseError(
                f"the {shape.heads} heads, {shape.kv_heads} key-value heads and "
                f"{shape.intermediate} neurons of {shape.name} cannot be cut over {tp} GPUs; give "
                "another --tp"
            )
        if self.pp > shape.layers:
            raise CatsparseError(
                f"{shape.name} has {shape.layers} layers, which do not make {self.pp} stages; "
                "give a smaller --pp"
            )
        if self.active > self.experts:
            raise CatsparseError(
                f"a token cannot visit {self.active} of {self.experts} experts; give a smaller "
                "--active-experts"
            )
        if self.weights == "int4" and self.preview is not None:
            raise CatsparseError("an int4 gate is its own preview; leave --preview out")

    @property
    def dense(self) -> Setting:
        """The same with nothing dropped."""
        return replace(self, sparsity=0.0, preview=None, products=False)


@dataclass(frozen=True)
class Layer:
    """Bytes on one rank.

    Attributes:
        attention: weights of q, k, v and o.
        mlp: weights of the MLPs that a step reads, previews included.
        dense_mlp: those that it would read with nothing dropped.
        cache: keys and values of all sequences.
        by_preview: share of the step's MLP calls that a preview decides.
    """

    attention: float
    mlp: float
    dense_mlp: float
    cache: float
    by_preview: float


def union(sparsity: float, tokens: int, overlap: float) -> float:
    """Share of neurons that all of some tokens drop: s^(T^(1 - overlap)).

    Independent tokens leave out s^T; dependent ones as much as fewer independent ones.
    ``benchmarks/unions.py`` measures what overlap real masks have.
    """
    return float(sparsity ** (tokens ** (1 - overlap))) if tokens else 1.0


def row_bytes(hidden: int, weights: str) -> float:
    """Bytes of ``hidden`` weights and their scales, as :mod:`catsparse.kernels.formats` packs."""
    if weights == "bf16":
        return BF16 * hidden
    return preview_bytes(hidden, 4) if weights == "int4" else hidden + 4


def sparse_tokens(setting: Setting, engine: str) -> int:
    """The most tokens of a step for which ``engine`` runs the sparse kernel.

    catsparse: what its op takes by itself. vLLM: as many of them as leave something to skip, of
    the prefill policy ``dense``.

    Raises:
        CatsparseError: vLLM does not take such weights beside ``cats``.
    """
    if engine == "vllm" and setting.weights != "bf16" and setting.sparsity:
        raise CatsparseError(
            f"vLLM takes no {setting.weights} weights beside cats; leave --weights out, or give "
            "--engine catsparse"
        )
    hidden = setting.shape.hidden
    packed = None if setting.weights == "bf16" else setting.weights
    most = auto_tokens(torch.bfloat16, BF16 * hidden, packed)
    if engine == "catsparse":
        return most
    return footprint.sparse_tokens(
        *(most, setting.sparsity, None, setting.preview, hidden, BF16, setting.products)
    )


def layer_bytes(setting: Setting, most: int) -> Layer:
    """What a layer of one rank reads in a step.

    Args:
        most: tokens of an MLP's call for which the sparse kernel runs: :func:`sparse_tokens`.
    """
    shape, tp = setting.shape, setting.tp
    head_size = _head_size(shape)
    kv_heads = max(1, shape.kv_heads // tp)  # fewer heads than ranks: each holds a copy of one
    rows = (shape.heads // tp + 2 * kv_heads) * head_size
    attention = rows * row_bytes(shape.hidden, setting.weights)
    attention += shape.hidden * row_bytes(shape.heads // tp * head_size, setting.weights)
    mlp, dense, by_preview = 0.0, 0.0, 0.0
    for tokens, chance in visits(setting.batch, setting.experts, setting.active):
        if tokens:
            mlp += setting.experts * chance * _mlp_bytes(setting, tokens, most)
            dense += setting.experts * chance * _mlp_bytes(setting.dense, tokens, most)
            by_preview += chance * (tokens <= most and setting.preview is not None)
    router = BF16 * shape.hidden * setting.experts if setting.experts > 1 else 0
    cache = setting.batch * setting.context * 2 * kv_heads * head_size * BF16
    visited = 1 - visits(setting.batch, setting.experts, setting.active)[0][1]
    return Layer(attention + router, mlp, dense, cache, by_preview / visited)


def visits(batch: int, experts: int, active: int) -> list[tuple[int, float]]:
    """(tokens, chance that an expert gets so many of a batch), from 0 to ``batch`` tokens."""
    p = active / experts
    if p == 1:
        return [(0, 0.0), (batch, 1.0)]
    found = []
    for n in range(batch + 1):  # by logarithms: a binomial of thousands overflows
        ways = math.lgamma(batch + 1) - math.lgamma(n + 1) - math.lgamma(batch - n + 1)
        found.append((n, math.exp(ways + n * math.log(p) + (batch - n) * math.log1p(-p))))
    return found


def _mlp_bytes(setting: Setting, tokens: int, most: int) -> float:
    """Of one MLP's weights on a rank, for a call of so many tokens."""
    hidden, neurons = setting.shape.hidden, setting.shape.intermediate // setting.tp
    row = row_bytes(hidden, setting.weights)
    if tokens > most or not setting.sparsity:
        return 3 * neurons * row
    # The kernel takes longer calls in groups, each of which reads what its own tokens keep.
    group = min(tokens, group_size(BF16 * hidden))
    groups = math.ceil(tokens / group)
    kept = 1 - union(setting.sparsity, group, setting.overlap)
    if setting.preview is None:
        return groups * neurons * row * (1 + 2 * kept)
    copies = (2 if setting.products else 1) * preview_bytes(hidden, setting.preview)
    return groups * neurons * (copies + 3 * row * kept)


def head_bytes(setting: Setting) -> float:
    """Of the output layer on one rank."""
    rows = math.ceil(setting.shape.vocab / setting.tp)
    return rows * row_bytes(setting.shape.hidden, setting.weights)


def memory_bytes(setting: Setting, layer: Layer) -> float:
    """What the GPU that holds most has to hold: weights, the transposed copy of W_down (packed
    weights have none), previews, embedding and output layer, and the cache of as many batches as
    there are stages."""
    shape, pp = setting.shape, setting.pp
    mlps = setting.experts * _mlp_bytes(setting.dense, 1, 0)
    if setting.sparsity and setting.weights == "bf16":
        mlps *= 4 / 3
    if setting.preview is not None:
        neurons = setting.experts * shape.intermediate // setting.tp
        copies = 2 if setting.products else 1
        mlps += copies * neurons * preview_bytes(shape.hidden, setting.preview)
    embedding, head = math.ceil(shape.vocab / setting.tp) * BF16 * shape.hidden, head_bytes(setting)
    ends = embedding + head
    if pp > 1 or (shape.tied and setting.weights == "bf16"):  # a packed head is no embedding
        ends = max(embedding, head)  # the first stage has the one, the last the other
    return math.ceil(shape.layers / pp) * (layer.attention + mlps + pp * layer.cache) + ends


def _head_size(shape: Shape) -> int:
    return shape.head_dim or shape.hidden // shape.heads
