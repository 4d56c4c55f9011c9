"""One op, ``catsparse::gated_mlp``: schema, shape function and implementations by device.

Tensors only: nothing here knows a model. ``torch.ops.catsparse.gated_mlp`` traces under
``torch.compile(fullgraph=True)`` as one opaque node. It has no gradient; training goes through
:func:`catsparse.kernels.reference.masked_hidden` and autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend, Choice, choose_backend
from .cpu import gated_mlp_cpu
from .cuda import gated_mlp_cuda
from .reference import ACTIVATIONS, MAX_OP_TOKENS, gated_mlp_reference, masked_hidden

__all__ = [
    "ACTIVATIONS",
    "MAX_OP_TOKENS",
    "Backend",
    "Choice",
    "choose_backend",
    "gated_mlp",
    "gated_mlp_reference",
    "masked_hidden",
]

torch.library.define(
    "catsparse::gated_mlp",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold, str act, "
    "Tensor? mean=None, Tensor? bias=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("catsparse::gated_mlp", "cpu", gated_mlp_cpu)
torch.library.impl("catsparse::gated_mlp", "cuda", gated_mlp_cuda)


@torch.library.impl("catsparse::gated_mlp", "default")
def _(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    return gated_mlp_reference(x, w_gate, w_up, w_down_t, threshold, act, mean, bias)


@torch.library.register_fake("catsparse::gated_mlp")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_down_t.shape[1]))


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sparse gated MLP: y = sum over kept i of (g_i u_i - mean_i) w_down_t[i] + bias.

    g = act(w_gate x), u = w_up x, and neuron i is kept iff |g_i| > threshold_i
    (CATS, arXiv 2404.08763, equations 3-5; a negative threshold keeps every neuron).

    Args:
        x: ``[..., H]`` activations, fp32, bf16 or fp16.
        w_gate: ``[I, H]``, x's dtype.
        w_up: ``[I, H]``, x's dtype.
        w_down_t: ``[I, H_out]``, x's dtype; any strides, so ``down.weight.t()`` will do, but only
            contiguous rows can be skipped.
        threshold: fp32, 0-d (one for the layer) or ``[I]`` (one a neuron).
        act: ``silu``, ``gelu_tanh``, ``gelu`` or ``relu``.
        mean: ``[I]`` fp32, stands in for a dropped neuron's g_i u_i; give ``bias`` with it.
        bias: ``[H_out]`` fp32, w_down @ mean.
        backend: on a GPU, ``auto`` (the fastest for so many tokens), ``cuda`` (the CUDA kernel for
            any number of them) or ``triton``, if it takes the call; a CPU has one kernel only.

    Returns:
        ``[..., H_out]`` in x's dtype.
    """
    return torch.ops.catsparse.gated_mlp(  # type: ignore[no-any-return]
        x, w_gate, w_up, w_down_t, threshold, act, mean, bias, backend
    )
