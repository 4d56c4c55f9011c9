"""The op ``catsparse::gated_mlp``: schema, shape function and implementations by device.

Tensors only: nothing here knows a model. ``torch.ops.catsparse.gated_mlp`` traces under
``torch.compile(fullgraph=True)`` as one opaque node. It has no gradient; training goes through
:func:`catsparse.kernels.reference.masked_hidden` and autograd. The other op is in
:mod:`catsparse.kernels.sparse_linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import Call
from .backend import Backend, Choice, Decisions, choose_backend, choose_linear_backend
from .cpu import gated_mlp_cpu
from .cuda import gated_mlp_cuda
from .formats import FORMATS, dequantize_weight, format_of, quantize
from .packed_linear import packed_linear, packed_linear_reference
from .preview import PreviewKind, dequantize, make_preview
from .reference import (
    ACTIVATIONS,
    MAX_OP_TOKENS,
    gated_mlp_reference,
    keep_mask,
    masked_hidden,
    preview_of,
)
from .sparse_linear import keep_inputs, masked_input, sparse_linear, sparse_linear_reference

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "MAX_OP_TOKENS",
    "Backend",
    "Call",
    "Choice",
    "Decisions",
    "PreviewKind",
    "choose_backend",
    "choose_linear_backend",
    "dequantize",
    "dequantize_weight",
    "format_of",
    "gated_mlp",
    "gated_mlp_reference",
    "keep_inputs",
    "keep_mask",
    "make_preview",
    "masked_hidden",
    "masked_input",
    "packed_linear",
    "packed_linear_reference",
    "preview_of",
    "quantize",
    "sparse_linear",
    "sparse_linear_reference",
]

torch.library.define(
    "catsparse::gated_mlp",
    "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold, str act, "
    "Tensor? mean=None, Tensor? bias=None, Tensor? product_threshold=None, Tensor? preview=None, "
    "Tensor? preview_scale=None, Tensor? gate_scale=None, Tensor? up_scale=None, "
    "Tensor? down_scale=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _implement(run: Callable[[Call, str], Tensor]) -> Callable[..., Tensor]:
    def implementation(*arguments: Any, backend: str = "auto", **named: Any) -> Tensor:
        if len(arguments) > len(Call._fields):
            *arguments, backend = arguments  # type: ignore[assignment]
        return run(Call(*arguments, **named), backend)

    return implementation


for _key, _run in {
    "cpu": lambda call, backend: gated_mlp_cpu(call),
    "cuda": gated_mlp_cuda,
    "default": lambda call, backend: gated_mlp_reference(*call),
}.items():
    torch.library.impl("catsparse::gated_mlp", _key, _implement(_run))
torch.library.register_fake(
    "catsparse::gated_mlp",
    _implement(lambda call, backend: call.x.new_empty((*call.x.shape[:-1], call.columns))),
)


def gated_mlp(
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
    backend: str = "auto",
) -> Tensor:
    """Sparse gated MLP: y = sum over kept i of (g_i u_i - mean_i) w_down_t[i] + bias.

    g = act(w_gate x), u = w_up x, and neuron i is kept iff |g_i| > threshold_i
    (CATS, arXiv 2404.08763, equations 3-5; a negative threshold keeps every neuron).

    Args:
        x: ``[..., H]`` activations, fp32, bf16 or fp16.
        w_gate: ``[I, H]``, x's dtype, or all three weights of one format of
            :mod:`catsparse.kernels.formats` (int8, fp8 or int4), with their scales.
        w_up: ``[I, H]``.
        w_down_t: ``[I, H_out]``; any strides, so ``down.weight.t()`` will do, but only
            contiguous rows can be skipped.
        threshold: fp32, 0-d (one for the layer) or ``[I]`` (one a neuron).
        act: ``silu``, ``gelu_tanh``, ``gelu`` or ``relu``.
        mean: ``[I]`` fp32, stands in for a dropped neuron's g_i u_i; give ``bias`` with it.
        bias: ``[H_out]`` fp32, w_down @ mean.
        product_threshold: fp32, 0-d or ``[I]``: a second decision, made before a row of w_down_t is
            read; neuron i must also have |g_i u_i| > product_threshold_i to be kept.
        preview: from :func:`catsparse.kernels.preview.make_preview`. W_gate in 4 or 8 bits (I
            rows): then g in the first decision is act(preview x), and w_gate's rows of kept
            neurons only are read. W_gate and W_up (2 I rows): then the first decision is on the
            product, and neuron i is kept iff |act(gate preview x)_i (up preview x)_i| exceeds
            threshold_i.
        preview_scale: its scales.
        gate_scale, up_scale, down_scale: of packed weights, from
            :func:`catsparse.kernels.formats.quantize`.
        backend: on a GPU, ``auto`` (the fastest for so many tokens), ``cuda`` (the CUDA kernel for
            any number of them) or ``triton``, if it takes the call; a CPU has one kernel only.

    Returns:
        ``[..., H_out]`` in x's dtype.
    """
    return torch.ops.catsparse.gated_mlp(  # type: ignore[no-any-return]
        x,
        w_gate,
        w_up,
        w_down_t,
        threshold,
        act,
        mean,
        bias,
        product_threshold,
        preview,
        preview_scale,
        gate_scale,
        up_scale,
        down_scale,
        backend,
    )
