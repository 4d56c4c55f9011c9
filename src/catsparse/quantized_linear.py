"""A linear layer that holds a packed weight.

Decode reads the packed rows (:mod:`catsparse.kernels.packed_linear`, and the gated MLP's op); many
tokens and training make the weights of one layer floats at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import Codes, floats_of, quantized_by
from .config import GPTQ, OWN
from .errors import CatsparseError
from .kernels import FORMATS, MAX_OP_TOKENS, dequantize_weight, packed_linear, quantize
from .kernels.preview import preview_shapes

# What rows call weights that are not packed.
FLOAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class QuantizedLinear(nn.Linear):
    """A linear layer that holds a packed weight; made by :meth:`of`.

    ``.to(dtype)`` changes what floats it computes in, never the packed weight or its scales.

    Attributes:
        weight: a parameter without gradient, ``[out, in]`` packed by output or, ``by_input``,
            ``[in, out]`` packed by input, as the gated MLP's kernels want W_down; see
            :mod:`catsparse.kernels.formats`.
        weight_scale: its scales, a buffer.
        output_scale: fp32 ``[out]``, another factor of each output, a buffer; None for none. It
            is what a checkpoint's scale by output becomes in a layer that lies by input.
        weights: the format's name.
        source: ``own`` if codes and scales are those that the checkpoint came with, ``gptq`` if
            they were rounded with data; None for round to nearest.
    """

    weight_scale: Tensor
    output_scale: Tensor | None
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
        self.source: str | None = None
        rows, columns = (in_features, out_features)[:: 1 if by_input else -1]
        shape, scales, of_scales = (rows, columns), (rows,), torch.float32
        if weights == "int4":
            (shape, scales), of_scales = preview_shapes(rows, columns, 4), torch.bfloat16  # type: ignore[assignment]
        packed = torch.empty(shape, dtype=FORMATS[weights], device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(scales, dtype=of_scales, device=device))
        self.register_buffer("output_scale", None)
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))

    @classmethod
    def of(cls, linear: nn.Linear, weights: str, by_input: bool = False) -> QuantizedLinear:
        """``linear`` in a format of :data:`catsparse.kernels.FORMATS`; its bias is the same one.
        One that another library quantized is rounded again.

        Raises:
            CatsparseError: int4 does not fit the layer.
        """
        other = quantized_by(linear) is not None
        weight = floats_of(linear) if other else linear.weight.detach()
        turned = weight.t().contiguous() if by_input else weight
        try:
            packed, scale = quantize(turned, weights)
        except ValueError as error:
            raise CatsparseError(
                f"a layer of {tuple(weight.shape)} has {error}; take int8"
            ) from error
        return cls._of_packed(linear, weights, packed, scale, by_input, weight)

    @classmethod
    def of_rounded(
        cls, linear: nn.Linear, weights: str, packed: Tensor, scale: Tensor, by_input: bool
    ) -> QuantizedLinear:
        """``linear`` with a weight that was rounded with data; see :mod:`catsparse.gptq`."""
        made = cls._of_packed(linear, weights, packed, scale, by_input, linear.weight)
        made.source = GPTQ
        return made

    @classmethod
    def _of_packed(
        cls,
        linear: nn.Linear,
        weights: str,
        packed: Tensor,
        scale: Tensor,
        by_input: bool,
        like: Tensor,
    ) -> QuantizedLinear:
        sizes = linear.in_features, linear.out_features
        made = cls(*sizes, weights, by_input, dtype=like.dtype, device="meta")
        made.weight = nn.Parameter(packed, requires_grad=False)
        made.weight_scale = scale
        made._like = like.detach().new_empty(0)
        made.bias = linear.bias
        return made.train(linear.training)

    @classmethod
    def of_codes(
        cls, linear: Any, codes: Codes, dtype: torch.dtype, by_input: bool = False
    ) -> QuantizedLinear:
        """A layer of a checkpoint's own ``codes``, int8 or fp8 where ``by_input``.

        By input, each row has the same power of two as its scale, so that sums stay in the range of
        half precision, and :attr:`output_scale` has what is left: the same weights, bit for bit.
        """
        weight, scale = codes.packed, codes.scale
        sizes = linear.in_features, linear.out_features
        made = cls(*sizes, codes.weights, by_input, dtype=dtype, device="meta")
        if by_input:
            most = torch.frexp(scale.abs().max())[1]
            unit = torch.ldexp(torch.ones((), device=scale.device), most)
            made.output_scale = scale / unit
            weight, scale = weight.t().contiguous(), unit.repeat(weight.shape[1])
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight_scale, made.source = scale, OWN
        made._like = torch.empty(0, dtype=dtype, device=weight.device)
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
        scale = self.output_scale
        first = dtype if scale is None else torch.float32
        w = dequantize_weight(self.weight.detach(), self.weight_scale, first)
        if scale is not None:
            w = (w * (scale if self.by_input else scale[:, None])).to(dtype)
        return w.t() if self.by_input else w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        packed, scale, of_outputs = self.weight.detach(), self.weight_scale, self.output_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype != packed.dtype:  # fp8 counts as floats
            self.weight = nn.Parameter(packed.to(self.weight.device), requires_grad=False)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        if of_outputs is not None:
            self.output_scale = of_outputs.to(self.weight_scale.device)
        return self


def weights_of_model(model: Any) -> str | None:
    """The format that :func:`catsparse.quantize_weights` packed a model in, with ``own-`` before it
    for a checkpoint's own codes and ``gptq-`` for codes rounded with data; None for floats."""
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    kinds = {m.weights if m.source is None else f"{m.source}-{m.weights}" for m in packed}
    return kinds.pop() if len(kinds) == 1 else None


def weights_name(model: Any) -> str:
    """What rows call a model's weights: a format, or a dtype of floats."""
    return weights_of_model(model) or FLOAT_NAMES.get(model.dtype, str(model.dtype))
