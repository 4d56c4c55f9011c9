"""The sparse forward of a gated MLP.

A sparse MLP is the dense module with its class changed in place: names, parameters, hooks, LoRA
adapters and tensor-parallel plans survive, and :func:`remove_sparsity` gives the dense module
back. Thresholds live in non-persistent fp32 buffers that ``.to(dtype)`` does not round.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .derived import Derived
from .kernels import (
    ACTIVATIONS,
    MAX_OP_TOKENS,
    Backend,
    gated_mlp,
    gated_mlp_reference,
    keep_mask,
    masked_hidden,
    preview_of,
)
from .shards import Sharded, find_shard
from .sites import Site
from .weights import Weights, device_of, may_copy

# Names that make a sparse class: gate, up, kind of activation, its child, down.
Parts = tuple[str, str | None, str, str | None, str]

# In none of them may .to(dtype) round a number.
_BUFFERS = (
    "catsparse_threshold",
    "catsparse_mean",
    "catsparse_bias",
    "catsparse_product_threshold",
    "catsparse_preview",
    "catsparse_preview_scale",
)


class KeepCounter(Protocol):
    """What a sparsity meter hangs on a module: called with the masks ``[..., I]`` of the neurons
    that the first decision keeps and of those kept in all (without a second one the same)."""

    def __call__(self, keep: Tensor, kept: Tensor) -> None: ...


class Observer(Protocol):
    """What calibration of a sparse model hangs on a module: called with the module's input
    ``[..., H]``, and the gate's (before the activation) and up's output ``[..., I]``."""

    def __call__(self, x: Tensor, gate: Tensor, up: Tensor) -> None: ...


class SparseMLP(Derived):
    """Mixin put before the dense class; see :func:`add_sparsity`.

    Few tokens (decode, at most ``MAX_OP_TOKENS``) run ``catsparse::gated_mlp`` on the raw weights,
    by the backend's kernel where one serves, else in torch. More tokens, training, and children
    whose weights cannot be read (LoRA, quantized, offloaded, hooked, with a bias) call the children
    and mask between them: the same maths. With the ``dense`` prefill policy calls above
    ``MAX_OP_TOKENS`` are not masked at all.

    The kernel wants the rows of w_down^T contiguous. A copy of them is made at the first decode and
    costs a third of the layer's memory; without it (``catsparse_down_copy`` False) the kernel reads
    all of w_down. Torch's own matmuls never see the transposed layout.

    With ``catsparse_preview_bits`` a preview of w_gate decides or, with ``catsparse_of_products``,
    one of w_gate and w_up: on the product. It is made from the weights when it is needed first and
    again when they changed, with gradients enabled in every forward; of LoRA layers it is that of
    the merged weights. So training decides as inference will. Where the weights cannot be read, in
    compiled training, and in all paths of a layer whose kernel does not take the preview
    (``why_not_preview``), the gate or the product itself decides, at the same threshold.
    """

    dense_class: ClassVar[type[nn.Module]]

    catsparse_threshold: Tensor
    catsparse_prefill: str
    catsparse_enabled: bool
    catsparse_counter: KeepCounter | None
    catsparse_observer: Observer | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``, dropping neurons whose |gate| is at most the threshold."""
        # Packed batches are (1, T, H): the number of tokens decides, never shape[1].
        few = x.numel() <= MAX_OP_TOKENS * x.shape[-1]
        if not self.catsparse_enabled or (self.catsparse_prefill == "dense" and not few):
            return super().forward(x)  # type: ignore[no-any-return]
        if few and self._op_applies(x):
            weights = self.raw_weights(x.dtype)
            if weights is not None and self._is_ready():
                return self.forward_few(x, weights)
        return self._masked(x)

    def forward_few(self, x: Tensor, weights: Weights) -> Tensor:
        """The op on raw weights, for at most ``MAX_OP_TOKENS`` tokens."""
        choice = self._catsparse_choice
        op = gated_mlp_reference
        preview, scale = self.catsparse_preview, self.catsparse_preview_scale
        few = 0 if choice is None else choice.op_tokens
        if few and x.numel() <= few * x.shape[-1]:
            op = partial(gated_mlp, backend=self.catsparse_backend.value)
            if self.catsparse_down_copy and (
                self._catsparse_down_t is not None or may_copy(weights.down_t)
            ):
                weights = weights._replace(down_t=self.down_transposed())
            if not self.previews(x.numel() // x.shape[-1]):
                preview = scale = None
        threshold, product = self.limits(preview)
        y: Tensor = op(
            x,
            *weights[:3],
            threshold,
            self.site_act,
            self.catsparse_mean,
            self.catsparse_bias,
            product,
            preview,
            scale,
            *weights[3:],
        )
        of_outputs = self.output_scale
        return y if of_outputs is None else (y.float() * of_outputs).to(y.dtype)

    def limits(self, preview: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The op's threshold and product threshold where ``preview``, or without one the exact
        weights, decide. On the exact product a second decision does, behind a gate that keeps all.
        """
        threshold = self.catsparse_threshold
        if preview is None and self.catsparse_of_products:
            return threshold.new_full((), -1.0), threshold
        return threshold, self.catsparse_product_threshold

    def previews(self, tokens: int) -> bool:
        """Whether a preview, if there is one, decides in a call of so few tokens: not where dense
        matmuls of the op read all anyway."""
        choice = self._catsparse_choice
        return choice is None or not choice.kernel_tokens < tokens <= choice.op_tokens

    def _op_applies(self, x: Tensor) -> bool:
        """Inference in one dtype that nobody is watching; a meter needs the mask."""
        return (
            self.catsparse_counter is None
            and self.catsparse_observer is None
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _masked(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._forget()  # fused optimizers step past the version counter
        gate = getattr(self, self.site_gate)(x)
        if self.site_up is None:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = getattr(self, self.site_up)(x)
        return self.mask_and_project(x, gate, up)

    def mask_and_project(
        self, x: Tensor, gate: Tensor, up: Tensor, foretell: bool = True
    ) -> Tensor:
        """What is left to do once the input ``[..., H]`` has been multiplied by w_gate and w_up:
        ``[..., I]`` each, the gate before its activation. Returns ``[..., H]``. Without
        ``foretell`` the exact weights decide even if there is a preview."""
        child = self.site_act_child
        act = getattr(self, child) if child else ACTIVATIONS[self.site_act]
        g = act(gate)
        if self.catsparse_observer is not None:
            self.catsparse_observer(x, gate, up)
        decides = self._foretold(x, act) if foretell else None
        if decides is None and self.catsparse_of_products:
            decides = (g * up).detach()
        threshold, product = self.catsparse_threshold, self.catsparse_product_threshold
        if self.catsparse_counter is not None:
            asked, h = g if decides is None else decides, g * up
            keep = keep_mask(asked, h, threshold)
            kept = keep if product is None else keep_mask(asked, h, threshold, product)
            self.catsparse_counter(keep, kept)
        h = masked_hidden(g, up, threshold, self.catsparse_mean, product, decides)
        return getattr(self, self.site_down)(h)  # type: ignore[no-any-return]

    def _foretold(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the preview foretells, ``[..., I]``; None if the exact weights decide."""
        if self.why_not_preview() is not None:
            return None
        preview, scale = self.fresh_preview()
        with torch.no_grad():
            if preview is None or scale is None:
                return None
            neurons = preview.shape[0] // 2 if self.catsparse_of_products else preview.shape[0]
            return preview_of(x, preview, scale, neurons, act)

    def set_threshold(
        self, threshold: Tensor, mean: Tensor | None, product_threshold: Tensor | None = None
    ) -> None:
        """Change the thresholds (fp32, 0-d or ``[I]``; None for no second decision) and means
        (fp32 ``[I]``) in place."""
        device = self.catsparse_threshold.device
        self.catsparse_threshold = threshold.to(device)
        self.catsparse_mean = _moved(mean, device)
        self.catsparse_product_threshold = _moved(product_threshold, device)
        key, down_t = self._catsparse_key, self._catsparse_down_t
        self.refresh()
        if key is not None and key == self._catsparse_key:  # the copy is of these very weights
            self._catsparse_down_t = down_t

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseMLP:
        exact = {name: self._buffers.get(name) for name in _BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers.get(name)
            if value is not None and moved is not None:
                # Same device as the others, but never rounded to their dtype.
                self._buffers[name] = value.to(moved.device)
        self._catsparse_down_t = None
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        parts = (cls.site_gate, cls.site_up, cls.site_act, cls.site_act_child, cls.site_down)
        sharded = issubclass(cls, Sharded)
        own = {"_catsparse_key": None, "_catsparse_down_t": None}  # of these very weights
        return _rebuild, (cls.dense_class, parts, sharded), self.__dict__ | own


def add_sparsity(
    module: nn.Module,
    site: Site,
    threshold: Tensor,
    mean: Tensor | None,
    prefill: str,
    product_threshold: Tensor | None = None,
    preview: int | None = None,
    of_products: bool = False,
    stored: Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None = None,
) -> SparseMLP:
    """Make the dense MLP at ``site`` sparse in place, by changing its class.

    Args:
        module: the dense module that ``site`` describes.
        site: from :func:`catsparse.sites.find_sites`.
        threshold: fp32, 0-d or ``[I]``.
        mean: fp32 ``[I]`` compensation, or None.
        prefill: ``masked`` or ``dense``.
        product_threshold: fp32, 0-d or ``[I]``, of the second decision; None for none.
        preview: bits of the copy of w_gate that decides, 4 or 8; None for w_gate itself.
        of_products: whether ``threshold`` is on products, and the preview of w_gate and w_up.
        stored: of w_gate and w_up, a preview that was made of the very same, or None.
    """
    device, shard = device_of(module), find_shard(module, site)
    parts = (site.gate, site.up, site.act, site.act_child, site.down)
    cls = sparse_class(type(module), parts, shard is not None)
    if shard is not None:  # each rank decides on its own neurons
        cut = [shard.cut(value) for value in (threshold, mean, product_threshold)]
        threshold, mean, product_threshold = cut[0], cut[1], cut[2]  # type: ignore[assignment]
    module.__class__ = cls
    assert isinstance(module, SparseMLP)
    for name in _BUFFERS:
        module.register_buffer(name, None, persistent=False)
    module.catsparse_threshold = threshold.to(device)
    module.catsparse_mean = _moved(mean, device)
    module.catsparse_product_threshold = _moved(product_threshold, device)
    module.catsparse_preview_bits, module.catsparse_of_products = preview, of_products
    module.catsparse_prefill = prefill
    module.catsparse_enabled = True
    module.catsparse_counter, module.catsparse_observer = None, None
    module.catsparse_backend, module.catsparse_down_copy = Backend.AUTO, True
    module._catsparse_key, module._catsparse_left_out = None, False
    _rebind_hooked_forward(module)
    if shard is not None:
        module.catsparse_shard = shard
    elif stored is not None:
        module.adopt_preview(stored)
    module.refresh()
    return module


def _moved(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def remove_sparsity(module: SparseMLP) -> nn.Module:
    """Undo :func:`add_sparsity`; the parameters are the very same objects."""
    for name in _BUFFERS:
        delattr(module, name)
    for name in [
        name for name in module.__dict__ if name.startswith(("catsparse_", "_catsparse_"))
    ]:
        delattr(module, name)
    module.__class__ = module.dense_class  # type: ignore[assignment]
    _rebind_hooked_forward(module)
    return module


def sparse_class(dense: type[nn.Module], parts: Parts, sharded: bool = False) -> type[SparseMLP]:
    """The sparse counterpart of a dense MLP class, whose neurons may be spread over processes; one
    class for equal arguments."""
    if (dense, parts, sharded) not in _CLASSES:
        gate, up, act, act_child, down = parts
        members = {
            "site_gate": gate,
            "site_up": up,
            "site_act": act,
            "site_act_child": act_child,
            "site_down": down,
            "dense_class": dense,
            "__module__": __name__,
        }
        bases = (Sharded, SparseMLP, dense) if sharded else (SparseMLP, dense)
        _CLASSES[dense, parts, sharded] = type(f"Sparse{dense.__name__}", bases, members)
    return _CLASSES[dense, parts, sharded]


_CLASSES: dict[tuple[type[nn.Module], Parts, bool], type[SparseMLP]] = {}


def sparse_modules(model: nn.Module) -> dict[str, SparseMLP]:
    """The sparse MLPs of a model by name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseMLP)}


def _rebuild(dense: type[nn.Module], parts: Parts, sharded: bool = False) -> SparseMLP:
    cls = sparse_class(dense, parts, sharded)
    return cls.__new__(cls)


def _rebind_hooked_forward(module: nn.Module) -> None:
    """Point accelerate's bound forwards at the new class: what it wraps, and what it leaves."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is module:
            module.__dict__[name] = types.MethodType(type(module).forward, module)
