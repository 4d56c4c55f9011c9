"""What ``bench op`` times: layers that exceed the caches, their inputs, thresholds and copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CatsparseError
from ..footprint import PACKED_BYTES, bytes_skipped
from ..kernels import (
    ACTIVATIONS,
    dequantize,
    dequantize_weight,
    gated_mlp,
    gated_mlp_reference,
    make_preview,
    quantize,
)
from ..modules import SparseMLP, add_sparsity
from ..sites import find_sites
from ..surgery import set_backend
from .peers import Peer
from .rows import TOLERANCE, last_level_cache
from .shapes import Shape

INPUTS = 8  # different inputs, each with every layer in turn
MAX_LAYERS = 256

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
    """One thing to time: ``call(layer, input)``; ``kind`` of KINDS tells what decides, or names the
    format of packed weights, which then decide themselves."""

    impl: str
    sparsity: float
    call: Callable[[int, Tensor], Tensor]
    bytes_skipped: float = 0.0
    kind: str = ""
    max_err: float = 0.0
    seconds: list[float] = field(default_factory=list)


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
        formats: Sequence[str] = (),
    ) -> None:
        self.shape, self.dtype, self.tokens, self.device = shape, dtype, tokens, device
        self.down_copy, self.bits = down_copy, preview
        self.backend = backend
        sizes = {"": dtype.itemsize, **{name: PACKED_BYTES[name] for name in formats}}
        self.weight_bytes = {k: 3 * shape.hidden * shape.intermediate * n for k, n in sizes.items()}
        torch.manual_seed(0)
        # Even a call that drops everything reads the gate, a third of the bytes.
        count = 1 + -(-6 * last_level_cache(device) // int(min(self.weight_bytes.values())))
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
        # Of each layer (w_gate, w_up, w_down_t) and their scales.
        self.packed: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        for name in formats:
            self.packed[name] = [self._pack(layer, name) for layer in range(len(self.modules))]
            self.previews[name] = self.previews[""]
            self.deciding[name] = [
                self._foretold(dequantize_weight(weights[0], scales[0], torch.float32))
                for weights, scales in self.packed[name]
            ]

    @torch.no_grad()
    def _pack(self, layer: int, name: str) -> tuple[list[Tensor], list[Tensor]]:
        gate, up, down = self.weights(layer)
        try:
            pairs = [quantize(w, name) for w in (gate, up, down.t().contiguous())]
        except ValueError as error:
            raise CatsparseError(f"{self.shape.name} in {name}: {error}") from error
        return [w for w, _ in pairs], [scale for _, scale in pairs]

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

    def sparse_packed(self, sparsity: float, name: str) -> Callable[[int, Tensor], Tensor]:
        thresholds, layers = self.thresholds(sparsity, name), self.packed[name]

        def call(layer: int, x: Tensor) -> Tensor:
            (gate, up, down_t), (gate_scale, up_scale, down_scale) = layers[layer]
            return gated_mlp(
                *(x, gate, up, down_t, thresholds[layer], self.shape.act),
                gate_scale=gate_scale,
                up_scale=up_scale,
                down_scale=down_scale,
                backend=self.backend,
            )

        return call

    def peer(self, peer: Peer, sparsity: float) -> Callable[[int, Tensor], Tensor]:
        thresholds = self.thresholds(sparsity)
        calls = [peer(*self.weights(layer)) for layer in range(len(self.layers))]
        return lambda layer, x: calls[layer](x, thresholds[layer], self.shape.act)

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.modules[layer].raw_weights(self.dtype)
        assert weights is not None
        gate, up, down_t = (w.detach() for w in weights[:3])
        return gate, up, down_t.t()

    def _unpacked(self, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(w_gate, w_up, w_down_t) of the first layer, as a variant of this kind has them."""
        if kind in self.packed:
            pairs = zip(*self.packed[kind][0], strict=True)
            gate, up, down_t = (dequantize_weight(w, scale, dtype) for w, scale in pairs)
            return gate, up, down_t
        gate, up, down = (w.to(dtype) for w in self.weights(0))
        return gate, up, down.t()

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
                weights = self._unpacked(variant.kind, dtype)
                arguments = (x.to(dtype), *weights, threshold, self.shape.act)
                truth = gated_mlp_reference(*arguments, *extra).float()
                errors.append(float((y - truth).abs().max() / truth.abs().max()))
            if not min(errors) <= TOLERANCE[self.dtype]:  # NaN too
                raise CatsparseError(
                    f"{variant.impl} at sparsity {variant.sparsity} differs from the reference by "
                    f"{min(errors):.2g} of its largest value; a wrong result is not timed"
                )
            worst = max(worst, min(errors))
        return worst


def _gap(values: Tensor, sparsity: float) -> Tensor:
    """The middle of the widest gap, in ratio, within a thousandth of the quantile."""
    ordered = values.sort().values
    n = len(ordered)
    low = max(0, min(n - 2, int((sparsity - 0.001) * n)))
    near = ordered[low : max(low + 2, int((sparsity + 0.001) * n))]
    at = int((near[1:] / near[:-1].clamp(min=1e-30)).argmax())
    return (near[at] + near[at + 1]) / 2
