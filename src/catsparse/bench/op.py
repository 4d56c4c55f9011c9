"""``bench op``: one gated MLP with cold caches, dense and sparse interleaved in one run.

On a CPU each call is timed by the clock. On a GPU calls on all layers are one CUDA graph, whose
replay is timed by events and divided by the calls, since launches would cost more than the work.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CatsparseError
from ..footprint import bytes_skipped
from ..kernels import ACTIVATIONS, dequantize, gated_mlp_reference, make_preview
from ..modules import SparseMLP, add_sparsity
from ..sites import find_sites
from ..surgery import set_backend
from .gpu import capture, gpu_seconds
from .peers import Peer
from .rows import (
    TOLERANCE,
    Probe,
    Row,
    commit,
    device_name,
    last_level_cache,
    quantiles,
    seconds,
    versions,
)
from .shapes import Shape

INPUTS = 8  # different inputs, each with every layer in turn
MAX_LAYERS = 256
GRAPH_CALLS = 24  # at least

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, as Llama's."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        h, i = shape.hidden, shape.intermediate
        self.gate_proj = nn.Linear(h, i, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(h, i, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(i, h, bias=False, dtype=dtype, device=device)
        self.act_fn = _ACTIVATION_MODULES[shape.act]()
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


# What decides: the gate itself, its preview, or a preview of products.
KINDS = ("", "preview", "product")
Preview = tuple[Tensor | None, Tensor | None]  # packed, and its scales


@dataclass
class Variant:
    """One thing to time: ``call(layer, input)``; ``kind`` of KINDS tells what decides."""

    impl: str
    sparsity: float
    call: Callable[[int, Tensor], Tensor]
    bytes_skipped: float = 0.0
    kind: str = ""
    max_err: float = 0.0
    seconds: list[float] = field(default_factory=list)


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
) -> list[Row]:
    """Time one MLP shape; the rows' order is dense, own kernel at sparsity 0, then each sparsity.

    Calls go round enough layers that each finds its weights outside the caches, and take the
    variants in turn. Every variant is checked against the fp32 reference before it is timed.

    Args:
        peers: other implementations to run beside, by name.
        preview: also the op with previews of so many bits, of the gate and of products, as
            ``catsparse_preview4`` and ``catsparse_product4``.
        advance: called after every round.

    Raises:
        CatsparseError: a variant disagrees with the reference, the shape is too small to be kept
            out of the caches, or the backend cannot run.
    """
    setup = Setup(shape, dtype, tokens, device, backend, down_copy, preview)
    variants = [Variant("dense", 0.0, setup.dense)]
    if device.type == "cuda":
        variants.append(Variant("dense_compiled", 0.0, setup.dense_compiled()))
    for kind in KINDS if preview is not None and setup.runs_kernel else KINDS[:1]:
        name = f"catsparse_{kind}{preview}" if kind else "catsparse"
        for s in sorted({0.0, *sparsities} if not kind else {*sparsities} - {0.0}):
            skipped = setup.bytes_skipped(s, kind) * setup.runs_kernel
            variants.append(Variant(name, s, setup.sparse(s, kind), skipped, kind))
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


class Setup:
    """Layers that exceed the caches, inputs, thresholds and the calls on them."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        tokens: int,
        device: torch.device,
        backend: str,
        down_copy: bool,
        preview: int | None = None,
    ) -> None:
        self.shape, self.dtype, self.tokens, self.device = shape, dtype, tokens, device
        self.down_copy, self.bits = down_copy, preview
        self.weight_bytes = 3 * shape.hidden * shape.intermediate * dtype.itemsize
        torch.manual_seed(0)
        # Even a call that drops everything reads the gate, a third of the bytes.
        count = 1 + -(-6 * last_level_cache(device) // self.weight_bytes)
        if count > MAX_LAYERS:
            raise CatsparseError(
                f"{shape.name} is too small: {MAX_LAYERS} layers of it stay in the cache; take a "
                "larger shape"
            )
        self.layers = nn.ModuleList(GatedMLP(shape, dtype, device) for _ in range(max(2, count)))
        self.inputs = [
            torch.randn(tokens, shape.hidden, device=device).to(dtype) for _ in range(INPUTS)
        ]
        sites = find_sites(self.layers)[0]
        self.modules: list[SparseMLP] = []
        for site in sites:
            layer = self.layers.get_submodule(site.name)
            self.modules.append(add_sparsity(layer, site, torch.tensor(-1.0), None, "masked"))
        self.layers.eval()
        set_backend(self.layers, backend, down_copy)
        choice = self.modules[0]._catsparse_choice
        self.runs_kernel = choice is not None and tokens <= choice.kernel_tokens
        none: Preview = (None, None)
        self.previews: dict[str, list[Preview]] = {"": [none] * len(self.modules)}
        # The magnitudes that decide, ``[INPUTS, T, I]`` fp32 a layer.
        self.deciding = {"": [self._foretold(m.raw_gate_up()[0].float()) for m in self.modules]}
        for kind in KINDS[1:] if preview else ():
            made = []
            for module in self.modules:
                gate, up = module.raw_gate_up()
                made.append(make_preview(gate, preview or 0, up if kind == "product" else None))
            self.previews[kind] = [*made]
            self.deciding[kind] = [
                self._foretold(dequantize(*copy, shape.hidden, torch.float32)) for copy in made
            ]

    def _foretold(self, weight: Tensor) -> Tensor:
        """|g|, or |g u| if the weight is of both."""
        x = torch.stack(self.inputs).float()
        with torch.no_grad():
            parts = F.linear(x, weight).split(self.shape.intermediate, dim=-1)
            g = ACTIVATIONS[self.shape.act](parts[0])
            return (g if len(parts) == 1 else g * parts[1]).abs()

    def thresholds(self, sparsity: float, kind: str = "") -> list[Tensor]:
        """One a layer, in the widest gap near the quantile: no rounding flips a decision there."""
        if sparsity == 0:
            return [torch.tensor(-1.0, device=self.device)] * len(self.layers)
        return [_gap(values.flatten(), sparsity) for values in self.deciding[kind]]

    def bytes_skipped(self, sparsity: float, kind: str = "") -> float:
        """A call reads a row if any of its tokens keeps the neuron; a preview is read whole."""
        pairs = zip(self.deciding[kind], self.thresholds(sparsity, kind), strict=True)
        kept = [(values > t).any(dim=1).float().mean() for values, t in pairs]
        dropped = 1 - float(torch.stack(kept).mean())
        return bytes_skipped(
            dropped,
            dropped if self.down_copy else 0.0,
            self.bits if kind else None,
            self.shape.hidden,
            self.dtype.itemsize,
            of_products=kind == "product",
        )

    def dense(self, layer: int, x: Tensor) -> Tensor:
        module = self.modules[layer]
        module.catsparse_enabled = False
        return module(x)  # type: ignore[no-any-return]

    def dense_compiled(self) -> Callable[[int, Tensor], Tensor]:
        """Gate and up in one matrix, compiled: what dense can do at best on a GPU."""
        fused = [torch.cat(self.weights(i)[:2]) for i in range(len(self.layers))]
        down = [self.weights(i)[2] for i in range(len(self.layers))]
        activation = ACTIVATIONS[self.shape.act]

        def mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
            gate, up = F.linear(x, w_gate_up).chunk(2, dim=-1)
            return F.linear(activation(gate) * up, w_down)

        torch.compiler.reset()  # each shape its own graph, never one for them all
        compiled = torch.compile(mlp, dynamic=False)
        return lambda layer, x: compiled(x, fused[layer], down[layer])

    def sparse(self, sparsity: float, kind: str = "") -> Callable[[int, Tensor], Tensor]:
        thresholds, previews = self.thresholds(sparsity, kind), self.previews[kind]

        def call(layer: int, x: Tensor) -> Tensor:
            module = self.modules[layer]
            module.catsparse_enabled = True
            module.catsparse_threshold = thresholds[layer]
            module.catsparse_preview, module.catsparse_preview_scale = previews[layer]
            return module(x)  # type: ignore[no-any-return]

        return call

    def peer(self, peer: Peer, sparsity: float) -> Callable[[int, Tensor], Tensor]:
        thresholds = self.thresholds(sparsity)
        calls = [peer(*self.weights(layer)) for layer in range(len(self.layers))]
        return lambda layer, x: calls[layer](x, thresholds[layer], self.shape.act)

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.modules[layer].raw_weights(self.dtype)
        assert weights is not None
        gate, up, down = weights
        return gate.detach(), up.detach(), down.detach()

    def error(self, variant: Variant) -> float:
        """Largest error over the reference's largest value, on the first layer.

        A gate rounded to bf16 decides differently next to the threshold, so the nearer of two
        references counts: all in fp32, and all in the weights' dtype.

        Raises:
            CatsparseError: it is above the dtype's tolerance.
        """
        threshold, worst = self.thresholds(variant.sparsity, variant.kind)[0], 0.0
        extra = (None, None, None, *self.previews[variant.kind][0])
        for x in self.inputs[:2]:
            y = variant.call(0, x).float()
            errors = []
            for dtype in {torch.float32, self.dtype}:
                gate, up, down = (w.to(dtype) for w in self.weights(0))
                arguments = (x.to(dtype), gate, up, down.t(), threshold, self.shape.act)
                truth = gated_mlp_reference(*arguments, *extra).float()
                errors.append(float((y - truth).abs().max() / truth.abs().max()))
            if not min(errors) <= TOLERANCE[self.dtype]:  # NaN too
                raise CatsparseError(
                    f"{variant.impl} at sparsity {variant.sparsity} differs from the reference by "
                    f"{min(errors):.2g} of its largest value; a wrong result is not timed"
                )
            worst = max(worst, min(errors))
        return worst


def _stride(variants: Sequence[Variant], setup: Setup) -> int:
    """Layers from one round's first call to the next's: coprime to their number."""
    count = len(setup.layers)
    return next(n for n in itertools.count(len(variants)) if math.gcd(n, count) == 1)


def _gap(values: Tensor, sparsity: float) -> Tensor:
    """The middle of the widest gap, in ratio, within a thousandth of the quantile."""
    ordered = values.sort().values
    n = len(ordered)
    low = max(0, min(n - 2, int((sparsity - 0.001) * n)))
    near = ordered[low : max(low + 2, int((sparsity + 0.001) * n))]
    at = int((near[1:] / near[:-1].clamp(min=1e-30)).argmax())
    return (near[at] + near[at + 1]) / 2


def _rows(setup: Setup, variants: list[Variant], probe: Probe) -> list[Row]:
    device, own = setup.device, {"dense": 0.0, "dense_compiled": 0.0, "catsparse": 0.0}
    medians = [(v, quantiles([1e6 * s for s in v.seconds])) for v in variants]
    best = min(q[1] for v, q in medians if own.get(v.impl) == v.sparsity)
    rows = []
    for v, (p20, p50, p80) in medians:
        limit = 1e6 * setup.weight_bytes * (1 - v.bytes_skipped) / probe.bandwidth
        rows.append(
            Row(
                what="op",
                name=setup.shape.name,
                impl=v.impl,
                device=device_name(device),
                threads=torch.get_num_threads() if device.type == "cpu" else 0,
                dtype=str(setup.dtype).removeprefix("torch."),
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
