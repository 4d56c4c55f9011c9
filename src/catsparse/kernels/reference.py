"""The torch reference of ``catsparse::gated_mlp``: the truth every kernel is tested against.

It computes in the dtype of its inputs, step for step as a dense module does, so a threshold that
keeps everything gives the dense result bit for bit; upcast the inputs for a high-precision truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import dequantize_weight
from .preview import dequantize

# Calls of up to this many tokens are decode; above it, masked dense matmuls win, because the
# union of the tokens' masks keeps nearly every row.
MAX_OP_TOKENS = 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def keep_mask(
    g: Tensor, h: Tensor, threshold: Tensor, product_threshold: Tensor | None = None
) -> Tensor:
    """Which neurons are kept: |g| > threshold and, if there is a second decision, |h| > its own.

    The comparisons are in fp32. A gate rounded to bf16 decides alike, since thresholds lie half-way
    between two bf16 magnitudes.

    Args:
        g: ``[..., I]`` activated gate, or its preview. h: ``[..., I]`` gate times up.
        threshold, product_threshold: fp32, 0-d or ``[I]``.
    """
    keep = g.float().abs() > threshold
    return keep if product_threshold is None else keep & (h.float().abs() > product_threshold)


def masked_hidden(
    g: Tensor,
    u: Tensor,
    threshold: Tensor,
    mean: Tensor | None,
    product_threshold: Tensor | None = None,
    preview: Tensor | None = None,
) -> Tensor:
    """g * u where kept, else ``mean`` (or 0): the input of the down projection.

    The gradient passes kept neurons only (and reaches ``mean``).

    Args:
        g: ``[..., I]`` activated gate.
        u: ``[..., I]`` up projection.
        threshold, product_threshold: of :func:`keep_mask`.
        mean: ``[I]`` or None.
        preview: ``[..., I]`` from :func:`preview_of`, which then decides instead of g.
    """
    h = g * u
    keep = keep_mask(g if preview is None else preview, h, threshold, product_threshold)
    fill = h.new_zeros(()) if mean is None else mean.to(h.dtype)
    return torch.where(keep, h, fill)


def preview_of(
    x: Tensor, preview: Tensor, scale: Tensor, neurons: int, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """What the preview foretells, ``[..., I]``: the activated gate g, or the product g u.

    Args:
        x: ``[..., H]``.
        preview, scale: from :func:`catsparse.kernels.preview.make_preview`.
        neurons: I.
        act: the activation.
    """
    z = F.linear(x, dequantize(preview, scale, x.shape[-1], x.dtype))
    if preview.shape[0] == neurons:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * up


def gated_mlp_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    product_threshold: Tensor | None = None,
    preview: Tensor | None = None,
    preview_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Plain torch form of :func:`catsparse.kernels.gated_mlp`; same arguments and result."""
    w_gate = dequantize_weight(w_gate, gate_scale, x.dtype)
    w_up = dequantize_weight(w_up, up_scale, x.dtype)
    w_down_t = dequantize_weight(w_down_t, down_scale, x.dtype)
    g = decided = ACTIVATIONS[act](F.linear(x, w_gate))
    if preview is not None and preview_scale is not None:
        decided = preview_of(x, preview, preview_scale, w_gate.shape[0], ACTIVATIONS[act])
    h = g * F.linear(x, w_up)
    keep = keep_mask(decided, h, threshold, product_threshold)
    if mean is not None:
        h = (h - mean).to(x.dtype)  # mean is fp32: one rounding, after the subtraction
    h = torch.where(keep, h, 0.0)
    y = F.linear(h, w_down_t.t())
    return y if bias is None else (y + bias).to(x.dtype)
