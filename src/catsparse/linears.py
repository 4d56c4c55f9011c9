"""The sparse forward of a linear layer: inputs of small magnitude are left out.

As with :mod:`catsparse.modules`, the layer's class is changed in place: names, parameters and hooks
survive, and :func:`remove_input_sparsity` gives the dense layer back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .kernels import (
    MAX_OP_TOKENS,
    Backend,
    Choice,
    choose_linear_backend,
    keep_inputs,
    masked_input,
    sparse_linear,
    sparse_linear_reference,
)
from .weights import Version, may_copy, version_of, why_no_matrix

_BUFFERS = ("catsparse_threshold", "catsparse_mean", "catsparse_bias")
_PROBES = 16  # elements by which a copy is known to be still that of its weight


class InputCounter(Protocol):
    """What a sparsity meter hangs on a layer: called with the mask ``[..., H]`` of kept inputs."""

    def __call__(self, keep: Tensor) -> None: ...


class SparseLinear(nn.Linear):
    """A linear layer, its class put before ``nn.Linear``'s; see :func:`add_input_sparsity`.

    Few tokens (decode, at most ``MAX_OP_TOKENS``) run ``catsparse::sparse_linear``, by the
    backend's kernel where one serves; more tokens, training, hooks and autocast mask the input and
    run the dense layer: the same maths.

    The kernels want the weights of an input in one row. On a GPU the weight itself is laid out so
    (name and shape stay, and there is no second copy); on a CPU, where torch's matmuls are slow on
    that layout, a copy is made at the first decode, unless ``catsparse_down_copy`` is False.
    """

    dense_class: ClassVar[type[nn.Module]] = nn.Linear

    catsparse_threshold: Tensor
    catsparse_mean: Tensor | None
    catsparse_bias: Tensor | None
    catsparse_prefill: str
    catsparse_enabled: bool
    catsparse_counter: InputCounter | None
    catsparse_backend: Backend
    catsparse_down_copy: bool
    # What follows from the weight and is made anew when it changes.
    _catsparse_key: Version | None
    _catsparse_choice: Choice | None
    _catsparse_copy: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H_out]``, without inputs whose |x| is at most the threshold."""
        few = x.numel() <= MAX_OP_TOKENS * x.shape[-1]
        if not self.catsparse_enabled or (self.catsparse_prefill == "dense" and not few):
            return super().forward(x)
        if few and self._op_applies(x):
            return self._decode(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._forget()  # fused optimizers step past the version counter
        if self.catsparse_counter is not None:
            self.catsparse_counter(keep_inputs(x, self.catsparse_threshold))
        return super().forward(masked_input(x, self.catsparse_threshold, self.catsparse_mean))

    def _op_applies(self, x: Tensor) -> bool:
        """Inference in one dtype that nobody is watching, and what the op needs is there."""
        return (
            self.catsparse_counter is None
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and self.why_not_raw() is None
            and self.weight.dtype == x.dtype
            and self._is_ready()
        )

    def _decode(self, x: Tensor) -> Tensor:
        choice, weight_t = self._catsparse_choice, self.weight.t()
        op = sparse_linear_reference
        if choice is not None and x.numel() <= choice.kernel_tokens * x.shape[-1]:
            op = sparse_linear
            copy = self._catsparse_copy
            weight_t = weight_t if copy is None else copy
        return op(x, weight_t, self.catsparse_threshold, self.catsparse_mean, self.catsparse_bias)

    def why_not_raw(self) -> str | None:
        """Why the layer must be called instead of reading its weight; None if it need not."""
        return why_no_matrix("the layer", self, SparseLinear)

    def prepare_decode(self) -> None:
        """Make what few-token calls need of the weight, before a forward that cannot."""
        if self.why_not_raw() is None:
            self._is_ready()

    def rows_by_input(self) -> Tensor | None:
        """W^T ``[H, H_out]`` with contiguous rows, or None where there is none."""
        if self._catsparse_copy is not None:
            return self._catsparse_copy
        return self.weight.detach().t() if self.weight.t().is_contiguous() else None

    def _is_ready(self) -> bool:
        if not torch.compiler.is_compiling() and self._is_stale():
            self.refresh()
        return self.catsparse_mean is None or self.catsparse_bias is not None

    def _is_stale(self) -> bool:
        if self._catsparse_key != version_of(self.weight):
            return True
        copy = self._catsparse_copy
        # A LoRA merge writes through .data, which no version tells; it changes every element.
        return copy is not None and not torch.equal(_probe(self.weight), _probe(copy.t()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the backend, lay the weight out or copy it, and compute the bias."""
        if self.why_not_raw() is not None:
            self._forget()
            return
        choice = self.choose_backend(self.catsparse_backend, self.catsparse_down_copy)
        copy, bias = None, None
        if choice.kernel_tokens and may_copy(self.weight):
            if self.weight.device.type == "cpu":
                copy = self.weight.detach().t().contiguous()
            elif not self.weight.t().is_contiguous():
                self.weight.data = self.weight.data.t().contiguous().t()
        if self.bias is not None:
            bias = self.bias.detach().float()
        if self.catsparse_mean is not None:
            mean = self.catsparse_mean.to(self.weight.device)
            part = torch.cat([rows.float() @ mean for rows in self.weight.split(1024)])
            bias = part if bias is None else part + bias
        self._catsparse_choice, self._catsparse_copy = choice, copy
        self.catsparse_bias = bias
        self._catsparse_key = version_of(self.weight)

    def choose_backend(self, asked: Backend, down_copy: bool) -> Choice:
        """What this layer would run if ``asked`` to."""
        sizes = self.in_features, self.out_features
        choice = choose_linear_backend(asked, self.weight.device, self.weight.dtype, sizes)
        if choice.kernel_tokens and not down_copy:
            reason = f"the {choice.backend.value} kernel needs the weights of an input in one row"
            return Choice(Backend.TORCH, 0, reason)
        return choice

    def set_backend(self, backend: Backend, down_copy: bool) -> None:
        """Choose how few-token calls run; see :func:`catsparse.set_backend`."""
        self.catsparse_backend, self.catsparse_down_copy = backend, down_copy
        self.refresh()

    def set_threshold(
        self, threshold: Tensor, mean: Tensor | None, product_threshold: Tensor | None = None
    ) -> None:
        """Change threshold (fp32, 0-d or ``[H]``) and means (fp32 ``[H]``) in place."""
        assert product_threshold is None
        device = self.catsparse_threshold.device
        self.catsparse_threshold = threshold.to(device)
        self.catsparse_mean = None if mean is None else mean.to(device)
        self._catsparse_key = None

    def train(self, mode: bool = True) -> SparseLinear:
        if self.training and not mode:
            self._forget()
        super().train(mode)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _forget(self) -> None:
        self._catsparse_key, self._catsparse_choice, self._catsparse_copy = None, None, None
        self.catsparse_bias = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        exact = {name: self._buffers.get(name) for name in _BUFFERS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = self._buffers.get(name)
            if value is not None and moved is not None:
                self._buffers[name] = value.to(moved.device)  # never rounded
        self._catsparse_copy, self._catsparse_key = None, None
        return self

    def __getstate__(self) -> dict[str, Any]:
        own = {"_catsparse_key": None, "_catsparse_copy": None}  # of this very weight
        return self.__dict__ | own


def add_input_sparsity(
    linear: nn.Module, threshold: Tensor, mean: Tensor | None, prefill: str
) -> SparseLinear:
    """Make a plain ``nn.Linear`` sparse in place, by changing its class.

    Args:
        linear: the dense layer.
        threshold: fp32, 0-d or ``[H]``.
        mean: fp32 ``[H]`` compensation, or None.
        prefill: ``masked`` or ``dense``.
    """
    assert type(linear) is nn.Linear
    linear.__class__ = SparseLinear
    assert isinstance(linear, SparseLinear)
    device = linear.weight.device
    for name in _BUFFERS:
        linear.register_buffer(name, None, persistent=False)
    linear.catsparse_threshold = threshold.to(device)
    linear.catsparse_mean = None if mean is None else mean.to(device)
    linear.catsparse_prefill = prefill
    linear.catsparse_enabled = True
    linear.catsparse_counter = None
    linear.catsparse_backend, linear.catsparse_down_copy = Backend.AUTO, True
    linear._forget()
    return linear


def remove_input_sparsity(linear: SparseLinear) -> nn.Module:
    """Undo :func:`add_input_sparsity`; the parameters are the very same objects."""
    for name in [*_BUFFERS, *vars(linear)]:
        if name.startswith(("catsparse_", "_catsparse_")):
            delattr(linear, name)
    if not linear.weight.is_contiguous() and linear.weight.t().is_contiguous():
        linear.weight.data = linear.weight.data.contiguous()
    dense: nn.Module = linear
    dense.__class__ = nn.Linear
    return dense


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse linear layers of a model by name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def _probe(weight: Tensor) -> Tensor:
    """A few elements of ``weight`` ``[rows, columns]``, along its diagonal."""
    diagonal = weight.detach().diagonal()
    return diagonal[:: max(1, len(diagonal) // _PROBES)].contiguous()
