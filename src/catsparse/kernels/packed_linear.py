"""The op ``catsparse::packed_linear``: a dense product with packed weights.

Few tokens, as in decode, are multiplied by the packed rows themselves; for more the matrix is made
floats, one layer at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import packed_linear_cpu
from .cuda import why_not_cuda
from .formats import columns_of, dequantize_weight, is_packed
from .linear import linear, why_not_linear
from .reference import MAX_OP_TOKENS
from .stream import PIECE, group_size

torch.library.define(
    "catsparse::packed_linear",
    "(Tensor x, Tensor weight, Tensor scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def packed_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T, for inference: it has no gradient.

    Args:
        x: ``[..., H]``, fp32, bf16 or fp16.
        weight: of N rows and H columns, from :func:`catsparse.kernels.formats.quantize`.
        scale: its scales.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    return torch.ops.catsparse.packed_linear(x, weight, scale)  # type: ignore[no-any-return]


def packed_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Plain torch form of :func:`packed_linear`: the weights rounded to x's dtype."""
    return F.linear(x, dequantize_weight(weight, scale, x.dtype))


@torch.library.impl("catsparse::packed_linear", "cpu")
def _on_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    y = packed_linear_cpu(x, weight, scale) if _fits(x, weight, scale) else None
    return packed_linear_reference(x, weight, scale) if y is None else y


@torch.library.impl("catsparse::packed_linear", "cuda")
def _on_cuda(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    scale = scale.contiguous()
    if (
        not _fits(x, weight, scale)
        or scale.data_ptr() % PIECE
        or why_not_cuda(x.device) is not None
        or why_not_linear([weight], x.dtype) is not None
    ):
        return packed_linear_reference(x, weight, scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    rows = rows if rows.data_ptr() % PIECE == 0 else rows.clone()
    y = x.new_empty(len(rows), weight.shape[0])
    group = group_size(x.shape[-1] * x.element_size())
    for part, out in zip(rows.split(group), y.split(group), strict=True):
        linear(part, [weight], [None], out=out, scales=[scale])
    return y.view(*x.shape[:-1], weight.shape[0])


torch.library.impl("catsparse::packed_linear", "default")(packed_linear_reference)
torch.library.register_fake(
    "catsparse::packed_linear",
    lambda x, weight, scale: x.new_empty((*x.shape[:-1], weight.shape[0])),
)


def _fits(x: Tensor, weight: Tensor, scale: Tensor) -> bool:
    """Few tokens of a matrix that is packed and theirs."""
    return (
        x.dim() > 0
        and 0 < x.numel() <= MAX_OP_TOKENS * x.shape[-1]
        and is_packed(weight, scale)
        and columns_of(weight) == x.shape[-1]
        and weight.shape[0] > 0
        and weight.device == x.device
    )
