"""The decode step's kernels as plain torch, so that the step itself runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catsparse.decoding import fused, structure
from catsparse.kernels import (
    MAX_OP_TOKENS,
    Backend,
    Call,
    Choice,
    dequantize_weight,
    gated_mlp_reference,
    sparse_linear_reference,
)
from catsparse.kernels.cuda import AUTO_TOKENS
from catsparse.kernels.stream import Norm
from catsparse.linears import SparseLinear
from catsparse.modules import SparseMLP


def rms(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (normed * (norm.offset + norm.weight.float())).to(x.dtype)
    return norm.weight * normed.to(x.dtype)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scales: Sequence[Tensor | None] = (),
) -> Tensor:
    x = rms(x, norm)
    floats = [dequantize_weight(w, s, x.dtype) for w, s in zip(weights, scales, strict=True)]
    y = torch.cat([F.linear(x, w, b) for w, b in zip(floats, biases, strict=True)], dim=1)
    y = y if residual is None else residual + y
    return y if out is None else out.copy_(y)


def attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position: Tensor,
    starts: Tensor,
    scratch: Any,
    scale: float,
    q_norm: Norm | None,
    k_norm: Norm | None,
    window: int,
    out: Tensor,
) -> Tensor:
    tokens, few, _, size = keys.shape
    many = out.shape[1] // size
    q, k, v = qkv.view(tokens, -1, size).split([many, few, few], dim=1)

    def turned(x: Tensor) -> Tensor:
        at = position - starts
        other = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * cosines[at][:, None] + other * sines[at][:, None]

    used = int(position)
    keys[:, :, used], values[:, :, used] = turned(rms(k, k_norm)), v
    slots = torch.arange(used + 1)
    seen = slots >= starts[:, None]
    if window:
        seen = seen & (slots > used - window)
    y = F.scaled_dot_product_attention(
        turned(rms(q, q_norm))[:, :, None],
        keys[:, :, : used + 1].repeat_interleave(many // few, 1),
        values[:, :, : used + 1].repeat_interleave(many // few, 1),
        attn_mask=seen[:, None, None],
        scale=scale,
    )
    return out.copy_(y.reshape(tokens, -1))


def launch(call: Call, norm: Norm | None, residual: Tensor, out: Tensor, early: bool) -> Tensor:
    return out.copy_(residual + gated_mlp_reference(*call._replace(x=rms(call.x, norm))))


def launch_sparse_linear(
    x: Tensor,
    weights_t: Sequence[Tensor],
    threshold: Tensor,
    mean: Tensor | None,
    bias: Tensor | None,
    norm: Norm | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    weight_t = torch.cat(list(weights_t), dim=1)
    y = sparse_linear_reference(rms(x, norm), weight_t, threshold, mean, bias)
    return out.copy_(y if residual is None else residual + y)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them in the kernels' place, and let every layer pass for one on a GPU."""
    for kernel in (linear, attention, launch, launch_sparse_linear):
        monkeypatch.setattr(fused, kernel.__name__, kernel)
    scratch = SimpleNamespace(partial=torch.empty(0))
    monkeypatch.setattr(fused, "Scratch", SimpleNamespace(make=lambda *_: scratch))
    for name in ("why_not_cuda", "why_not_linear", "why_not_sizes", "why_not_sparse_linear"):
        monkeypatch.setattr(structure, name, lambda *_: None)

    def choose(module: SparseMLP | SparseLinear, *_: Any) -> Choice:
        dtype = next(module.parameters()).dtype
        tokens = AUTO_TOKENS.get(dtype, MAX_OP_TOKENS)
        return Choice(Backend.CUDA, tokens, "stands in for a GPU")

    monkeypatch.setattr(SparseMLP, "choose_backend", choose)
    monkeypatch.setattr(SparseLinear, "choose_backend", choose)
