"""The arguments of a call, and whether they belong together: what every kernel asks first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formats import columns_of, format_of, is_packed
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
    gate_scale: Tensor | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def columns(self) -> int:
        """H_out, however w_down_t is packed."""
        return columns_of(self.w_down_t)

    @property
    def weights(self) -> str | None:
        """The format of packed weights; None for floats."""
        return format_of(self.w_gate)

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


_CONTIGUOUS = (
    *("threshold", "mean", "bias", "product_threshold", "preview", "preview_scale"),
    *("gate_scale", "up_scale", "down_scale"),
)


def belong_together(call: Call) -> bool:
    """Shapes, dtypes and devices as :func:`catsparse.kernels.gated_mlp` says, and nothing empty.

    So every pointer taken from them covers what a kernel reads, strides aside.
    """
    x, w_gate, w_up, w_down_t = call[:4]
    scales = (call.gate_scale, call.up_scale, call.down_scale)
    matrices = list(zip((w_gate, w_up, w_down_t), scales, strict=True))
    if x.dim() == 0 or w_gate.dim() != 2 or w_down_t.dim() != 2:
        return False
    if not all(is_packed(w, scale) for w, scale in matrices):
        return False
    neurons, columns = w_gate.shape[0], call.columns
    vectors: list[tuple[Tensor | None, int | None]] = [(call.mean, neurons), (call.bias, columns)]
    for limit in (call.threshold, call.product_threshold):
        if limit is not None:
            vectors.append((limit, neurons if limit.dim() else None))
    dtype = x.dtype if call.weights is None else w_gate.dtype
    return (
        call.act in ACTIVATIONS
        and x.shape[-1] == columns_of(w_gate)
        and min(x.numel(), neurons, columns) > 0
        and w_up.shape == w_gate.shape
        and w_down_t.shape[0] == neurons
        and all(w.dtype == dtype and w.device == x.device for w, _ in matrices)
        and all(
            v.dtype == torch.float32
            and v.shape == (() if n is None else (n,))
            and v.device == x.device
            for v, n in vectors
            if v is not None
        )
        and _is_preview(call.preview, call.preview_scale, neurons, x)
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


def _is_preview(preview: Tensor | None, scale: Tensor | None, neurons: int, x: Tensor) -> bool:
    if preview is None or scale is None:
        return preview is scale
    hidden = x.shape[-1]
    if preview.dim() != 2 or not (bits := preview_bits(preview, hidden)):
        return False
    rows = preview.shape[0]
    return (
        rows in (neurons, 2 * neurons)
        and (preview.shape, scale.shape) == preview_shapes(rows, hidden, bits)
        and (preview.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
        and preview.device == scale.device == x.device
    )
