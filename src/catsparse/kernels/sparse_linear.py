"""The op ``catsparse::sparse_linear``: a linear layer that reads the weights of kept inputs only.

y = sum over kept j of (x_j - mean_j) weight_t[j] + bias; input j is kept iff |x_j| > threshold_j
(TEAL, arXiv 2408.14690, equation 2; WINA's thresholds, arXiv 2505.19427, are one for each input).
Tensors only. It traces as one opaque node and has no gradient; training masks the input instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import sparse_linear_cpu
from .sparse_linear_cuda import sparse_linear_cuda


class LinearCall(NamedTuple):
    """The arguments of :func:`sparse_linear`, where they are described."""

    x: Tensor
    weight_t: Tensor
    threshold: Tensor
    mean: Tensor | None = None
    bias: Tensor | None = None


def keep_inputs(x: Tensor, threshold: Tensor) -> Tensor:
    """Which inputs are kept, bool as ``x``; compared in fp32."""
    return x.float().abs() > threshold


def masked_input(x: Tensor, threshold: Tensor, mean: Tensor | None) -> Tensor:
    """x where kept, else ``mean`` (or 0), in x's dtype: what a dense layer is given instead of x.

    The gradient passes kept inputs only.
    """
    fill = x.new_zeros(()) if mean is None else mean.to(x.dtype)
    return torch.where(keep_inputs(x, threshold), x, fill)


def sparse_linear_reference(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Plain torch form of :func:`sparse_linear`; same arguments and result."""
    h = x if mean is None else (x - mean).to(x.dtype)  # one rounding, after the subtraction
    h = torch.where(keep_inputs(x, threshold), h, 0.0)
    y = F.linear(h, weight_t.t())
    return y if bias is None else (y + bias).to(x.dtype)


torch.library.define(
    "catsparse::sparse_linear",
    "(Tensor x, Tensor weight_t, Tensor threshold, Tensor? mean=None, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _implement(run: Callable[[LinearCall], Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **named: run(LinearCall(*arguments, **named))


def _by(kernel: Callable[..., Tensor | None]) -> Callable[..., Tensor]:
    def run(call: LinearCall) -> Tensor:
        y = kernel(*call)
        return sparse_linear_reference(*call) if y is None else y

    return _implement(run)


def _fake(*arguments: Any, **named: Any) -> Tensor:
    call = LinearCall(*arguments, **named)
    return call.x.new_empty((*call.x.shape[:-1], call.weight_t.shape[1]))


torch.library.impl("catsparse::sparse_linear", "cpu", _by(sparse_linear_cpu))
torch.library.impl("catsparse::sparse_linear", "cuda", _by(sparse_linear_cuda))
torch.library.impl(
    "catsparse::sparse_linear", "default", _implement(lambda call: sparse_linear_reference(*call))
)
torch.library.register_fake("catsparse::sparse_linear", _fake)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer on the inputs of large magnitude.

    Args:
        x: ``[..., H]`` activations, fp32, bf16 or fp16.
        weight_t: ``[H, H_out]``, x's dtype, the layer's weight transposed; any strides, but only
            contiguous rows can be skipped.
        threshold: fp32, 0-d or ``[H]``; negative keeps every input.
        mean: ``[H]`` fp32, stands in for a dropped input; give ``bias`` with it.
        bias: ``[H_out]`` fp32: the layer's own, and with ``mean`` W mean.

    Returns:
        ``[..., H_out]`` in x's dtype.
    """
    return torch.ops.catsparse.sparse_linear(  # type: ignore[no-any-return]
        x, weight_t, threshold, mean, bias
    )
