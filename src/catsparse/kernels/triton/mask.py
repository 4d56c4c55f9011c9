"""The Triton kernel that stands between the dense matmuls of a masked gated MLP.

In one pass over ``[T, I]``: h = |act(z)| > threshold ? act(z) u - mean : 0. A dense module takes
two passes for as much, torch's own operations six.
"""

# Triton's language has no types that a checker could use.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .stream import _activation


@triton.jit
def mask_kernel(
    z,
    u,
    threshold,
    mean,
    h,
    TOTAL,
    I,
    ACT: tl.constexpr,
    PER_NEURON: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < TOTAL
    neuron = at % I
    g = _activation(tl.load(z + at, mask=live, other=0.0).to(tl.float32), ACT)
    value = g * tl.load(u + at, mask=live, other=0.0).to(tl.float32)
    if HAS_MEAN:
        value -= tl.load(mean + neuron, mask=live, other=0.0)
    if PER_NEURON:
        limit = tl.load(threshold + neuron, mask=live, other=0.0)
    else:
        limit = tl.load(threshold)
    value = tl.where(tl.abs(g) > limit, value, 0.0)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=live)
