"""The decode step of a plain decoder in our own kernels: five launches a layer.

Norms, rotary embedding, cache writes and residual sums are part of the launch that needs them, and
each kernel asks for its weights before the one ahead has ended. With more than four sequences the
products are torch's, as they read everything anyway. The step is used only once it has given what
the model's own layers give on the prompt at hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import gated_mlp
from ..kernels.attention import Scratch, attention
from ..kernels.cuda import launch
from ..kernels.linear import linear
from ..kernels.stream import Norm
from ..surgery import run_dense
from .cache import WindowCache
from .step import ModelStep, State
from .structure import Decoder, Layer, Mlp, NotPlain, find_decoder

# Of a layer's update, beside the rounding of its output.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# (w_down^T, threshold, mean, bias)
_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

_WARNED: set[str] = set()


class FusedStep:
    """See :class:`catsparse.decoding.step.Step`; made by :meth:`try_build`."""

    windowed: ClassVar[bool] = False

    def __init__(self, decoder: Decoder, cache: WindowCache, batch: int) -> None:
        self.decoder = decoder
        self._few = batch <= decoder.few
        device, dtype = decoder.head.device, decoder.dtype
        hidden = decoder.head.shape[1]
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
        self._mlps = [self._weights(layer.mlp) for layer in decoder.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of buffers, tables and transposed copies that dense MLPs have none of."""
        own = (self._x, self._h, self._qkv, self._attended, self._cosines, self._sines)
        pairs = zip(self._mlps, self.decoder.layers, strict=True)
        copies = [weights[0] for weights, layer in pairs if layer.mlp.module is None]
        return sum(t.nbytes for t in (*own, self._scratch.partial, *copies))

    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        x = self._x.copy_(self.decoder.embed(tokens[:, 0]))
        for index, weights in enumerate(self._mlps):
            self._layer(index, x, state, weights)
        return self._logits(x)

    def _layer(self, index: int, x: Tensor, state: State, weights: _Weights) -> None:
        """One layer, in place."""
        layer: Layer = self.decoder.layers[index]
        cached: Any = state.cache.layers[index]
        qkv = self._product(x, layer.qkv, layer.qkv_bias, layer.norm, out=self._qkv)
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
        h = self._product(attended, (layer.o,), (layer.o_bias,), residual=x, out=self._h)
        down_t, threshold, mean, bias = weights
        mlp = layer.mlp
        if not self._few:
            normed = _normed(h, layer.mlp_norm)
            y = gated_mlp(normed, mlp.gate, mlp.up, down_t, threshold, mlp.act, mean, bias)
            torch.add(h, y, out=x)
            return
        launch(
            h,
            mlp.gate,
            mlp.up,
            down_t,
            threshold,
            mlp.act,
            mean,
            bias,
            norm=layer.mlp_norm,
            residual=h,
            out=x,
            early=True,
        )

    def _logits(self, x: Tensor) -> Tensor:
        decoder = self.decoder
        return self._product(x, (decoder.head,), (decoder.head_bias,), decoder.norm)

    def _product(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """:func:`catsparse.kernels.linear.linear`, by torch for many sequences."""
        if self._few:
            return linear(x, weights, biases, norm, residual, out)
        x = x if norm is None else _normed(x, norm)
        parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        y = y if residual is None else residual + y
        return y if out is None else out.copy_(y)

    def _weights(self, mlp: Mlp) -> _Weights:
        """A dense MLP is one that keeps every neuron."""
        module = mlp.module
        if module is None:
            return mlp.down.detach().t().contiguous(), self._keep_all, None, None
        if module.catsparse_mean is not None and module.catsparse_bias is None:
            module.refresh()
        down_t = module.down_transposed()
        if not module.catsparse_enabled:
            return down_t, self._keep_all, None, None
        return down_t, module.catsparse_threshold, module.catsparse_mean, module.catsparse_bias

    @classmethod
    def try_build(cls, model: Any, cache: WindowCache, batch: int) -> FusedStep | None:
        """The step, or None: if it does not compute what the model does, a warning says so."""
        step = build(model, cache, batch)
        if isinstance(step, FusedStep):
            return step
        return None


@torch.no_grad()
def build(model: Any, cache: WindowCache, batch: int) -> FusedStep | str:
    """The step for a cache that holds a prompt, or why there is none."""
    try:
        decoder = find_decoder(model, [layer.is_sliding for layer in cache.layers], batch)
        step = FusedStep(decoder, cache, batch)
        _check(model, step, cache, batch)
    except NotPlain as reason:
        return str(reason)
    return step


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """RMS norm, rounded where transformers' modules round."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (wide * (norm.offset + norm.weight.float())).to(x.dtype)
    return norm.weight * wide.to(x.dtype)


def _check(model: Any, step: FusedStep, cache: WindowCache, batch: int) -> None:
    """Run the model's own layers on a token after the prompt, and each of ours on their inputs.

    Both dense: a gate next to its threshold may be decided either way, and a real difference would
    drown in that. Both write the slot that the next step overwrites.

    Raises:
        NotPlain: a layer's result differs by more than rounding.
    """
    device = step.decoder.head.device
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=device)
    starts = torch.zeros(batch, dtype=torch.int64, device=device)
    mask = torch.ones(batch, cache.slots, dtype=torch.bool, device=device)
    state = State(tokens, cache.cursor.position, starts, mask, cache)
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        seen.append((before[:, -1].clone(), after[:, -1].clone()))

    hooks: list[Any] = [
        m.register_forward_hook(note, with_kwargs=True) for m in step.decoder.modules
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
        step._layer(index, x, state, (step._mlps[index][0], step._keep_all, None, None))
        _compare(f"layer {index}", x, after, after - before)
    _compare("output layer", step._logits(step._x.copy_(seen[-1][1])), logits, logits)


def _compare(name: str, ours: Tensor, theirs: Tensor, update: Tensor) -> None:
    eps = torch.finfo(theirs.dtype).eps
    allowed = TOLERANCE[theirs.dtype] * float(update.float().norm())
    allowed += eps * float(theirs.float().norm())
    error = float((ours.float() - theirs.float()).norm())
    if not error <= allowed:
        message = f"its {name} computes otherwise (by {error / allowed:.2g} times the tolerance)"
        if message not in _WARNED:
            _WARNED.add(message)
            warnings.warn(f"decode runs the model's own forward: {message}", stacklevel=2)
        raise NotPlain(message)
