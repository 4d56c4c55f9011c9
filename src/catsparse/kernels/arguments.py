"""The arguments of a call, and whether they belong together: what every kernel asks first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .preview import preview_bits, preview_shapes
from .reference import ACTIVATIONS


class Call(NamedTuple):
    """The arguments of :func:`catsparse.kernels.gated_mlp`, where they are described."""

    x: Tensor
    w_gate: Tensor
    w_up: Tensor
    w_down_t: Tensor
    threshold: Tensor
    act: str
    mean: Tensor | None = None
    bias: Tensor | None = None
    product_threshold: Tensor | None = None
    preview: Tensor | None = None
    preview_scale: Tensor | None = None

    @property
    def previews_products(self) -> bool:
        """Whether the preview is of W_gate and W_up, and foretells g u."""
        return self.preview is not None and self.preview.shape[0] != self.w_gate.shape[0]

    def made_contiguous(self) -> Call:
        """With vectors, preview and scales whose pointers are enough."""
        vectors = {
            name: value.contiguous()
            for name in _CONTIGUOUS
            if (value := getattr(self, name)) is not None
        }
        return self._replace(**vectors)


_CONTIGUOUS = ("threshold", "mean", "bias", "product_threshold", "preview", "preview_scale")


def belong_together(call: Call) -> bool:
    """Shapes, dtypes and devices as :func:`catsparse.kernels.gated_mlp` says, and nothing empty.

    So every pointer taken from them covers what a kernel reads, strides aside.
    """
    x, w_gate, w_up, w_down_t = call[:4]
    if x.dim() == 0 or w_gate.dim() != 2 or w_down_t.dim() != 2:
        return False
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    vectors: list[tuple[Tensor | None, int | None]] = [(call.mean, neurons), (call.bias, columns)]
    for limit in (call.threshold, call.product_threshold):
        if limit is not None:
            vectors.append((limit, neurons if limit.dim() else None))
    return (
        call.act in ACTIVATIONS
        and x.shape[-1] == hidden
        and min(x.numel(), neurons, columns) > 0
        and w_up.shape == w_gate.shape
        and w_down_t.shape[0] == neurons
        and all(w.dtype == x.dtype and w.device == x.device for w in (w_gate, w_up, w_down_t))
        and all(
            v.dtype == torch.float32
            and v.shape == (() if n is None else (n,))
            and v.device == x.device
            for v, n in vectors
            if v is not None
        )
        and _is_preview(call.preview, call.preview_scale, w_gate)
    )


def linear_fits(
    x: Tensor, weight_t: Tensor, threshold: Tensor, mean: Tensor | None, bias: Tensor | None
) -> bool:
    """Shapes, dtypes and devices as :func:`catsparse.kernels.sparse_linear.sparse_linear` says, of
    a dtype that kernels know, and nothing empty; strides aside."""
    if x.dim() == 0 or weight_t.dim() != 2 or x.numel() == 0 or weight_t.numel() == 0:
        return False
    inputs, columns = weight_t.shape
    vectors = [(threshold, inputs if threshold.dim() else None), (mean, inputs), (bias, columns)]
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.shape[-1] == inputs
        and (weight_t.dtype, weight_t.device) == (x.dtype, x.device)
        and all(
            v.dtype == torch.float32
            and v.shape == (() if n is None else (n,))
            and v.device == x.device
            for v, n in vectors
            if v is not None
        )
    )


def _is_preview(preview: Tensor | None, scale: Tensor | None, w_gate: Tensor) -> bool:
    if preview is None or scale is None:
        return preview is scale
    if preview.dim() != 2 or not (bits := preview_bits(preview, w_gate.shape[1])):
        return False
    rows = preview.shape[0]
    return (
        rows in (w_gate.shape[0], 2 * w_gate.shape[0])
        and (preview.shape, scale.shape) == preview_shapes(rows, w_gate.shape[1], bits)
        and (preview.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
        and preview.device == scale.device == w_gate.device
    )
