"""The decode step of a plain decoder in our own kernels: five launches a layer.

Norms, rotary embedding, cache writes and residual sums are part of the launch that needs them, and
each kernel asks for its weights before the one ahead has ended. With more than four sequences the
products are torch's, as they read everything anyway. The step is used only once it has given what
the model's own layers give on the prompt at hand.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels import Call, gated_mlp, sparse_linear_reference
from ..kernels.attention import Scratch, attention
from ..kernels.cuda import launch
from ..kernels.formats import columns_of
from ..kernels.linear import linear
from ..kernels.sparse_linear_cuda import launch_sparse_linear
from ..kernels.stream import Norm, rms_norm
from ..linears import SparseLinear
from ..surgery import run_dense
from ..weights import Weights
from .cache import WindowCache
from .step import ModelStep, State
from .structure import Decoder, Layer, Matrix, Mlp, NotPlain, find_decoder

# Of a layer's update, beside the rounding of its output.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class _Decision(NamedTuple):
    """What decides in a layer's gated MLP, and what stands in for dropped neurons."""

    threshold: Tensor
    mean: Tensor | None = None
    bias: Tensor | None = None
    product_threshold: Tensor | None = None
    preview: Tensor | None = None
    preview_scale: Tensor | None = None


class _Inputs(NamedTuple):
    """What layers that share a thresholded input take; see ``launch_sparse_linear``."""

    weights_t: tuple[Tensor, ...]
    threshold: Tensor
    mean: Tensor | None = None
    bias: Tensor | None = None


# Those of q, k and v, and of o; None where they are dense.
_Shared = tuple[_Inputs | None, _Inputs | None]

_WARNED: set[str] = set()
_REASONS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_COPIES: Any = WeakIdKeyDictionary()  # of weights: weak references to their transposed copies


class FusedStep:
    """See :class:`catsparse.decoding.step.Step`; made by :meth:`try_build`."""

    words: ClassVar[str] = "our kernels"
    windowed: ClassVar[bool] = False

    def __init__(self, decoder: Decoder, cache: WindowCache, batch: int) -> None:
        self.decoder = decoder
        self._few = batch <= decoder.few
        device, dtype = decoder.device, decoder.dtype
        hidden = columns_of(decoder.head.weight)
        width = decoder.heads * decoder.head_size
        wide = width + 2 * decoder.kv_heads * decoder.head_size

        def buffer(columns: int) -> Tensor:
            return torch.empty(batch, columns, dtype=dtype, device=device)

        self._x, self._h = buffer(hidden), buffer(hidden)
        self._qkv, self._attended = buffer(wide), buffer(width)
        self._scratch = Scratch.make(
            batch, decoder.heads, decoder.kv_heads, decoder.head_size, device
        )
        positions = torch.arange(cache.slots, device=device)[None]
        cosines, sines = decoder.rotary(self._x[:1, None], positions)
        if cosines.shape != (1, cache.slots, decoder.head_size):
            raise NotPlain("its rotary embedding takes part of a head only")
        self._cosines, self._sines = cosines[0].contiguous(), sines[0].contiguous()
        self._keep_all = torch.tensor(-1.0, device=device)
        if cosines.dtype != dtype or sines.dtype != dtype:
            raise NotPlain(f"its rotary embedding is {cosines.dtype}, its weights {dtype}")
        self._weights = [self._laid_out(layer.mlp) for layer in decoder.layers]
        self._decisions = [self._decision(layer.mlp) for layer in decoder.layers]
        self._inputs = [self._shared(layer) for layer in decoder.layers]

    def refresh(self) -> None:
        """Before a prompt: copies of dense weights follow what was written through ``.data``."""
        for copy, down_t in self._copies():
            copy.copy_(down_t)

    @property
    def nbytes(self) -> int:
        """Bytes of buffers, tables and transposed copies that dense MLPs have none of."""
        own = (self._x, self._h, self._qkv, self._attended, self._cosines, self._sines)
        copies = [copy for copy, _ in self._copies()]
        return sum(t.nbytes for t in (*own, self._scratch.partial, *copies))

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Transposed copies that are ours, and what they are copies of."""
        for weights, layer in zip(self._weights, self.decoder.layers, strict=True):
            if layer.mlp.down is not None:
                yield weights.down_t, layer.mlp.down.detach().t()

    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        x = self._x.copy_(self.decoder.embed(tokens[:, 0]))
        pairs = zip(self._decisions, self._inputs, strict=True)
        for index, (decision, inputs) in enumerate(pairs):
            self._layer(index, x, state, decision, inputs)
        return self._logits(x)

    def _layer(
        self, index: int, x: Tensor, state: State, decision: _Decision, inputs: _Shared
    ) -> None:
        """One layer, in place."""
        layer: Layer = self.decoder.layers[index]
        cached: Any = state.cache.layers[index]
        of_qkv, of_o = inputs
        if of_qkv is None:
            qkv = self._product(x, layer.qkv, layer.norm, out=self._qkv)
        else:
            qkv = self._sparse_product(x, of_qkv, layer.norm, out=self._qkv)
        attended = attention(
            qkv,
            cached.keys,
            cached.values,
            self._cosines,
            self._sines,
            state.position,
            state.starts,
            self._scratch,
            layer.scale,
            layer.q_norm,
            layer.k_norm,
            layer.window,
            self._attended,
        )
        if of_o is None:
            h = self._product(attended, (layer.o,), residual=x, out=self._h)
        else:
            h = self._sparse_product(attended, of_o, residual=x, out=self._h)
        mlp, weights = layer.mlp, self._weights[index]
        call = Call(h, *weights[:3], decision[0], mlp.act, *decision[1:], *weights[3:])
        if not self._few:
            call = call._replace(x=rms_norm(h, layer.mlp_norm))
            torch.add(h, gated_mlp(*call), out=x)
            return
        launch(call, norm=layer.mlp_norm, residual=h, out=x, early=True)

    def _logits(self, x: Tensor) -> Tensor:
        decoder = self.decoder
        return self._product(x, (decoder.head,), decoder.norm)

    def _product(
        self,
        x: Tensor,
        matrices: Sequence[Matrix],
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """:func:`catsparse.kernels.linear.linear`; for many sequences by torch or, of packed
        weights, some at a time."""
        weights, biases, scales = zip(*matrices, strict=True)
        if self._few:
            return linear(x, weights, biases, norm, residual, out, scales)
        if scales[0] is not None:
            y = x.new_empty(len(x), sum(len(w) for w in weights)) if out is None else out
            for at in range(0, len(x), self.decoder.few):
                some = slice(at, at + self.decoder.few)
                more = None if residual is None else residual[some]
                linear(x[some], weights, biases, norm, more, y[some], scales)
            return y
        x = x if norm is None else rms_norm(x, norm)
        products = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        y = products[0] if len(products) == 1 else torch.cat(products, dim=1)
        y = y if residual is None else residual + y
        return y if out is None else out.copy_(y)

    def _sparse_product(
        self,
        x: Tensor,
        inputs: _Inputs,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        *,
        out: Tensor,
    ) -> Tensor:
        if self._few:
            return launch_sparse_linear(x, *inputs, norm, residual, out)
        x = x if norm is None else rms_norm(x, norm)
        weight_t = torch.cat(inputs.weights_t, dim=1)
        y = sparse_linear_reference(x, weight_t, *inputs[1:])
        return out.copy_(y if residual is None else residual + y)

    def _shared(self, layer: Layer, dense: bool = False) -> _Shared:
        """Thresholds and means of a layer's inputs, or with ``dense`` what keeps them all."""

        def of(layers: tuple[SparseLinear, ...]) -> _Inputs | None:
            if not layers:
                return None
            rows = tuple(t for m in layers if (t := m.rows_by_input()) is not None)
            sparse = layers[0].catsparse_enabled and not dense
            biases = [m.catsparse_bias if sparse else m.bias for m in layers]
            bias = None
            if any(b is not None for b in biases):
                parts = (
                    torch.zeros(m.out_features, device=m.weight.device) if b is None else b.float()
                    for m, b in zip(layers, biases, strict=True)
                )
                bias = torch.cat([part.detach() for part in parts])
            if not sparse:
                return _Inputs(rows, self._keep_all, None, bias)
            return _Inputs(rows, layers[0].catsparse_threshold, layers[0].catsparse_mean, bias)

        return of(layer.qkv_sparse), of(layer.o_sparse)

    def _laid_out(self, mlp: Mlp) -> Weights:
        """With the rows of down_t contiguous."""
        if mlp.down is not None:
            return mlp.weights._replace(down_t=_transposed(mlp.down))
        if mlp.module is None:
            return mlp.weights
        mlp.module.prepare_decode()  # the weights may have changed since
        return mlp.weights._replace(down_t=mlp.module.down_transposed())

    def _decision(self, mlp: Mlp) -> _Decision:
        """A dense MLP is one that keeps every neuron."""
        module = mlp.module
        if module is None:
            return _Decision(self._keep_all)
        module.prepare_decode()
        if module.catsparse_mean is not None and module.catsparse_bias is None:
            module.refresh()
        if not module.catsparse_enabled:
            return _Decision(self._keep_all)
        preview, scale = module.catsparse_preview, module.catsparse_preview_scale
        if not module.previews(len(self._x)):
            preview = scale = None  # the exact weights decide, as in the module
        threshold, product = module.limits(preview)
        compensation = module.catsparse_mean, module.catsparse_bias
        return _Decision(threshold, *compensation, product, preview, scale)

    @classmethod
    def try_build(cls, model: Any, cache: WindowCache, batch: int) -> FusedStep | None:
        """The step, or None; :func:`why_not_fused` has the reason. If all but the results fit, a
        warning says so."""
        step = build(model, cache, batch)
        if isinstance(step, FusedStep):
            _REASONS.pop(model, None)
            return step
        _REASONS[model] = step
        return None


def why_not_fused(model: Any) -> str | None:
    """Why the last step made for ``model`` is not the fused one; None if it is, or none was."""
    return _REASONS.get(model)


@torch.no_grad()
def build(model: Any, cache: WindowCache, batch: int) -> FusedStep | str:
    """The step for a cache that holds a prompt, or why there is none."""
    try:
        decoder = find_decoder(model, [layer.is_sliding for layer in cache.layers], batch)
        step = FusedStep(decoder, cache, batch)
        _check(model, step, cache, batch)
    except NotPlain as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _told("there is no memory for the copies of its down projections")
    except torch.AcceleratorError:  # the GPU is in an unknown state
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:80]
        return _told(f"its parts do not fit together ({type(error).__name__}: {what})")
    return step


def _transposed(weight: Tensor) -> Tensor:
    """One copy for all steps of a model, as long as any of them lives."""
    turned = weight.detach().t()
    known = _COPIES.get(weight)
    copy: Tensor | None = None if known is None else known()
    # A parameter stays the same object when its model is moved or cast.
    if copy is None or (copy.shape, copy.dtype, copy.device) != (
        turned.shape,
        turned.dtype,
        turned.device,
    ):
        copy = turned.contiguous()
        _COPIES[weight] = weakref.ref(copy)
        return copy
    return copy.copy_(turned)


def _check(model: Any, step: FusedStep, cache: WindowCache, batch: int) -> None:
    """Compare right after the prompt, and at the last slot of the cache: positions may matter.

    Raises:
        NotPlain: a layer's result differs by more than rounding.
    """
    position = cache.cursor.position
    used = int(position)
    _compare_layers(model, step, cache, batch, 1)
    ahead = torch.arange(used, cache.slots, device=position.device)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    try:
        for tensor in tensors:  # the prompt's once more, and again: there must be something
            tensor[:, :, used:] = tensor[:, :, ahead % used]
        position.fill_(cache.slots - 1)
        _compare_layers(model, step, cache, batch, 2)
    finally:
        position.fill_(used)
        for tensor in tensors:
            tensor[:, :, used:] = 0


def _compare_layers(model: Any, step: FusedStep, cache: WindowCache, batch: int, part: int) -> None:
    """Run the model's own layers on a token, and each of ours on their inputs.

    Both dense: a gate next to its threshold may be decided either way, and a real difference would
    drown in that. Both write the slot that the next step overwrites.
    """
    device, vocabulary = step.decoder.device, step.decoder.head.weight.shape[0]
    # No special tokens, which often come with outsized activations.
    ids = (part * vocabulary // 3 + torch.arange(batch, device=device)) % vocabulary
    tokens = ids[:, None]
    starts = torch.zeros(batch, dtype=torch.int64, device=device)
    mask = torch.ones(batch, cache.slots, dtype=torch.bool, device=device)
    state = State(tokens, cache.cursor.position, starts, mask, cache)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        seen.append((before[:, -1].clone(), after[:, -1].clone()))

    hooks: list[Any] = [
        m.register_forward_hook(note, with_kwargs=True) for m in step.decoder.layer_modules
    ]
    try:
        with run_dense(model):
            logits = ModelStep.try_build(model, cache, batch)(tokens, state)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != len(step.decoder.layers):
        raise NotPlain("its layers do not run once each")
    if not torch.equal(step.decoder.embed(tokens[:, 0]), seen[0][0]):
        raise NotPlain("its embeddings are changed before the first layer")
    for index, (before, after) in enumerate(seen):
        x = step._x.copy_(before)
        layer = step.decoder.layers[index]
        dense = _Decision(step._keep_all)
        step._layer(index, x, state, dense, step._shared(layer, dense=True))
        _compare(f"layer {index}", x, after, after - before)
    _compare("output layer", step._logits(step._x.copy_(seen[-1][1])), logits, logits)


def _compare(name: str, ours: Tensor, theirs: Tensor, update: Tensor) -> None:
    """Each element may differ by its rounding and a little of its update; what goes beyond must be
    small beside an update of ordinary size, not beside the few outsized ones that models have."""
    tolerance, eps = TOLERANCE[theirs.dtype], torch.finfo(theirs.dtype).eps
    ours, theirs, size = ours.float(), theirs.float(), update.float().abs()
    beyond = ((ours - theirs).abs() - 2 * eps * theirs.abs() - tolerance * size).clamp(min=0)
    ordinary = size.clamp(max=10 * float(size.median()))
    error, allowed = float(beyond.norm()), tolerance * float(ordinary.norm())
    if not error <= allowed < float("inf"):
        raise NotPlain(_told(f"its {name} computes otherwise"))


def _told(reason: str) -> str:
    if reason not in _WARNED:
        _WARNED.add(reason)
        warnings.warn(f"decode runs the model's own forward: {reason}", stacklevel=2)
    return reason
