"""Whether the arguments of a call belong together: what every kernel asks before it takes one."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS


def belong_together(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    act: str,
    mean: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Shapes, dtypes and devices as :func:`catsparse.kernels.gated_mlp` says, and nothing empty.

    So every pointer taken from them covers what a kernel reads, strides aside.
    """
    if x.dim() == 0 or w_gate.dim() != 2 or w_down_t.dim() != 2:
        return False
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    vectors = [(mean, neurons), (bias, columns)]
    if threshold.dim():
        vectors.append((threshold, neurons))
    return (
        act in ACTIVATIONS
        and x.shape[-1] == hidden
        and min(x.numel(), neurons, columns) > 0
        and w_up.shape == w_gate.shape
        and w_down_t.shape[0] == neurons
        and all(w.dtype == x.dtype and w.device == x.device for w in (w_gate, w_up, w_down_t))
        and threshold.dtype == torch.float32
        and threshold.device == x.device
        and all(
            v.dtype == torch.float32 and v.shape == (n,) and v.device == x.device
            for v, n in vectors
            if v is not None
        )
    )
