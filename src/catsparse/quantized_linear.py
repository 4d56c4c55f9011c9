"""A linear layer that holds a packed weight.

Decode reads the packed rows (:mod:`catsparse.kernels.packed_linear`, and the gated MLP's op); many
tokens and training make the weights of one layer floats at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CatsparseError
from .kernels import FORMATS, MAX_OP_TOKENS, dequantize_weight, packed_linear, quantize
from .kernels.preview import preview_shapes


class QuantizedLinear(nn.Linear):
    """A linear layer that holds a packed weight; made by :meth:`of`.

    ``.to(dtype)`` changes what floats it computes in, never the packed weight or its scales.

    Attributes:
        weight: a parameter without gradient, ``[out, in]`` packed by output or, ``by_input``,
            ``[in, out]`` packed by input, as the gated MLP's kernels want W_down; see
            :mod:`catsparse.kernels.formats`.
        weight_scale: its scales, a buffer.
        weights: the format's name.
    """

    weight_scale: Tensor
    _like: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: str,
        by_input: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty one, to be loaded; ``dtype`` is that of its inputs."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.by_input = weights, by_input
        rows, columns = (in_features, out_features)[:: 1 if by_input else -1]
        shape, scales, of_scales = (rows, columns), (rows,), torch.float32
        if weights == "int4":
            (shape, scales), of_scales = preview_shapes(rows, columns, 4), torch.bfloat16  # type: ignore[assignment]
        packed = torch.empty(shape, dtype=FORMATS[weights], device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(scales, dtype=of_scales, device=device))
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))

    @classmethod
    def of(cls, linear: nn.Linear, weights: str, by_input: bool = False) -> QuantizedLinear:
        """``linear`` in a format of :data:`catsparse.kernels.FORMATS`; its bias is the same one.

        Raises:
            CatsparseError: int4 does not fit the layer.
        """
        weight = linear.weight.detach()
        turned = weight.t().contiguous() if by_input else weight
        try:
            packed, scale = quantize(turned, weights)
        except ValueError as error:
            raise CatsparseError(
                f"a layer of {tuple(weight.shape)} has {error}; take int8"
            ) from error
        sizes = linear.in_features, linear.out_features
        made = cls(*sizes, weights, by_input, dtype=weight.dtype, device="meta")
        made.weight = nn.Parameter(packed, requires_grad=False)
        made.weight_scale = scale
        made._like = weight.new_empty(0)
        made.bias = linear.bias
        return made.train(linear.training)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of its inputs."""
        return self._like.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        few = 0 < x.numel() <= MAX_OP_TOKENS * x.shape[-1]
        if few and not self.by_input and not torch.is_grad_enabled():
            y = packed_linear(x, self.weight, self.weight_scale)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dequantized(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[out, in]`` in floats; ``by_input`` a transposed view."""
        w = dequantize_weight(self.weight.detach(), self.weight_scale, dtype)
        return w.t() if self.by_input else w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        packed, scale = self.weight.detach(), self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != packed.dtype:  # fp8 counts as floats
            self.weight = nn.Parameter(packed.to(self.weight.device), requires_grad=False)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self
