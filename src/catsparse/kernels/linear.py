"""linear.cu from Python: y = round(w norm(x) + bias) + residual, for the decode step.

Not an op of its own: the step (decoding/fused.py) calls it while its graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import Kernel, compile_source, find_kernel, load_module
from .stream import (
    DTYPES,
    MOST_PIECES,
    NUMBERS,
    PIECE,
    STREAM,
    Norm,
    NormArgument,
    Plan,
    arch,
    defines,
    find_plan,
    shared_bytes,
    stage_count,
    template,
    whole_pieces,
)

SOURCE = Path(__file__).with_name("linear.cu")
PARTS = 3  # linear.cu's
# Shared memory left to the attention kernel, whose blocks run beside those of the product after it.
_LEFT = 24 * 1024
_DOT_BYTES = 16 * 1024  # partial dots of the rows that a block finishes at a time, at most


class _Linear(ctypes.Structure):
    """``Linear`` of linear.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p * PARTS),
        ("bias", ctypes.c_void_p * PARTS),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("stride", ctypes.c_longlong * PARTS),
        ("rows", ctypes.c_int * PARTS),
        ("norm", NormArgument),
        *((name, ctypes.c_int) for name in ("tokens", "hidden", "total")),
        *((name, ctypes.c_int) for name in ("capacity", "pitch", "stages")),
    ]


@dataclass(frozen=True)
class _Built:
    kernel: Kernel
    blocks: int
    capacity: int
    stages: int


def why_not_linear(weights: Sequence[Tensor]) -> str | None:
    """Why linear.cu does not take these matrices, one below the other; None if it does."""
    first = weights[0]
    if len(weights) > PARTS or any(w.dtype != first.dtype for w in weights):
        return f"{len(weights)} matrices of different dtypes, or more than {PARTS}"
    if first.dtype not in DTYPES:
        return f"no kernel for {str(first.dtype).removeprefix('torch.')}"
    if any(w.shape[1] != first.shape[1] or not whole_pieces(w) for w in weights):
        return f"rows of {first.shape[1]} elements are not whole 16-byte pieces"
    row = first.shape[1] * first.element_size()
    total = sum(w.shape[0] for w in weights)
    if row > MOST_PIECES * PIECE or _layout(first.device, row, total, 1)[2] < 2:
        return f"{total} rows of {first.shape[1]} do not fit in shared memory"
    return None


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The product, which reads weights before the kernel ahead of it has ended.

    Args:
        x: ``[T, H]`` contiguous, T at most :func:`catsparse.kernels.stream.group_size`.
        weights: ``[N_i, H]`` each, x's dtype; see :func:`why_not_linear`.
        biases: ``[N_i]`` each, or None.
        residual: ``[T, N]``, added to the rounded product; may be ``out``.
        out: ``[T, N]``, contiguous.
    """
    tokens, hidden = x.shape
    rows = [w.shape[0] for w in weights]
    total = sum(rows)
    y = x.new_empty(tokens, total) if out is None else out
    built = _build(x.device, x.dtype, template(tokens), hidden, total)
    missing = PARTS - len(weights)
    argument = _Linear(
        x.data_ptr(),
        (ctypes.c_void_p * PARTS)(*(w.data_ptr() for w in weights)),
        (ctypes.c_void_p * PARTS)(*(None if b is None else b.data_ptr() for b in biases)),
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
        (ctypes.c_longlong * PARTS)(*(w.stride(0) for w in weights)),
        (ctypes.c_int * PARTS)(*rows, *[0] * missing),
        NormArgument.of(norm),
        tokens,
        hidden,
        total,
        built.capacity,
        hidden * x.element_size(),
        built.stages,
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        built.kernel.launch(built.blocks, argument, stream, early=True)
    return y


@functools.cache
def _build(
    device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, total: int
) -> _Built:
    row = hidden * dtype.itemsize
    blocks, capacity, stages, plan = _layout(device, row, total, tokens)
    each = -(-row // PIECE // plan.threads)
    even = row == plan.threads * each * PIECE
    code = compile_source(
        (NUMBERS, STREAM, SOURCE), defines(dtype, tokens, plan, each, even), arch(device)
    )
    shared = stages * plan.rows * row + _dot_bytes(capacity, tokens, plan)
    kernel = find_kernel(load_module(code, device), "linear", plan.threads + 32, shared)
    return _Built(kernel, blocks, capacity, stages)


def _layout(device: torch.device, row: int, total: int, tokens: int) -> tuple[int, int, int, Plan]:
    """(blocks, rows that a block finishes at a time, stages, plan)."""
    blocks = min(torch.cuda.get_device_properties(device).multi_processor_count, total)
    plan = find_plan(row, tokens)
    rows = plan.rows
    while rows > 1 and stage_count(shared_bytes(device) - _LEFT - _DOT_BYTES, rows * row) < 4:
        rows //= 2
    plan = Plan(plan.threads, rows, plan.chunks)
    most = _DOT_BYTES // _dot_bytes(1, tokens, plan)
    capacity = min(-(-total // blocks), most)
    capacity = -(-capacity // rows) * rows if capacity < most else most // rows * rows
    room = shared_bytes(device) - _LEFT - _dot_bytes(capacity, tokens, plan)
    return blocks, capacity, stage_count(room, rows * row), plan


def _dot_bytes(rows: int, tokens: int, plan: Plan) -> int:
    return 4 * rows * tokens * (plan.threads // 32 | 1)
