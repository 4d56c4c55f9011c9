"""The torch reference of ``catsparse::gated_mlp``: the truth every kernel is tested against.

It computes in the dtype of its inputs, step for step as a dense module does, so a threshold that
keeps everything gives the dense result bit for bit; upcast the inputs for a high-precision truth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Calls of up to this many tokens are decode; above it, masked dense matmuls win, because the
# union of the tokens' masks keeps nearly every row.
MAX_OP_TOKENS = 16

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def masked_hidden(g: Tensor, u: Tensor, threshold: Tensor, mean: Tensor | None) -> Tensor:
    """g * u where |g| > threshold, else ``mean`` (or 0): the input of the down projection.

    The comparison is in fp32. A gate rounded to bf16 decides alike, since thresholds lie half-way
    between two bf16 magnitudes. The gradient passes kept neurons only (and reaches ``mean``).

    Args:
        g: ``[..., I]`` activated gate.
        u: ``[..., I]`` up projection.
        threshold: fp32, 0-d or ``[I]``.
        mean: ``[I]`` or None.
    """
    h = g * u
    fill = h.new_zeros(()) if mean is None else mean.to(h.dtype)
    return torch.where(g.float().abs() > threshold, h, fill)


def gated_mlp_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Plain torch form of :func:`catsparse.kernels.gated_mlp`; same arguments and result."""
    g = ACTIVATIONS[act](F.linear(x, w_gate))
    h = g * F.linear(x, w_up)
    if mean is not None:
        h = (h - mean).to(x.dtype)  # mean is fp32: one rounding, after the subtraction
    h = torch.where(g.float().abs() > threshold, h, 0.0)
    y = F.linear(h, w_down_t.t())
    return y if bias is None else (y + bias).to(x.dtype)
