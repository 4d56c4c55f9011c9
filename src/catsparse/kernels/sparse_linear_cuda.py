"""sparse_linear.cu from Python: which calls it takes, its layout, the launch.

As with the gated MLP nothing depends on the data but what is read, so calls can be captured in a
CUDA graph, and sums have a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .arguments import linear_fits
from .cuda import why_not_cuda
from .nvrtc import Kernel, compile_source, find_kernel, load_module
from .stream import (
    DTYPES,
    MOST_PIECES,
    NUMBERS,
    PIECE,
    STREAM,
    WEIGHTS,
    Norm,
    NormArgument,
    Plan,
    Storage,
    arch,
    defines,
    find_plan,
    group_size,
    shared_bytes,
    stage_count,
    template,
    whole_pieces,
)
from .sums import LEFT, SUM, find_sum, launch_sum

SOURCE = Path(__file__).with_name("sparse_linear.cu")
PARTS = 3  # sparse_linear.cu's
MOST_INPUTS = 2**24  # a list entry holds the input and four bits


class _Problem(ctypes.Structure):
    """``Problem`` of sparse_linear.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p * PARTS),
        *((name, ctypes.c_void_p) for name in ("threshold", "mean", "partial")),
        ("stride", ctypes.c_longlong * PARTS),
        ("part_columns", ctypes.c_int * PARTS),
        ("norm", NormArgument),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "columns", "threshold_stride")),
        *((name, ctypes.c_int) for name in ("capacity", "pitch", "stages")),
    ]


@dataclass(frozen=True)
class _Built:
    main: Kernel
    sum: Kernel
    blocks: int
    capacity: int
    stages: int


def why_not_sparse_linear(
    device: torch.device, dtype: torch.dtype, inputs: int, outputs: Sequence[int]
) -> str | None:
    """Why sparse_linear.cu does not take layers with so many inputs and outputs, beside each
    other; None if it does."""
    reason = why_not_cuda(device)
    if reason is not None:
        return reason
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if len(outputs) > PARTS or inputs >= MOST_INPUTS:
        return f"{len(outputs)} layers of {inputs} inputs are too many"
    if any(columns * dtype.itemsize % PIECE for columns in outputs):
        return f"rows of {list(outputs)} elements are not whole 16-byte pieces"
    row = sum(outputs) * dtype.itemsize
    if row > MOST_PIECES * PIECE or _layout(device, row, inputs, group_size(row))[2] < 2:
        return f"{inputs} rows of {sum(outputs)} elements do not fit in shared memory"
    return None


def sparse_linear_cuda(
    x: Tensor, weight_t: Tensor, threshold: Tensor, mean: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """:func:`catsparse.kernels.sparse_linear.sparse_linear` for CUDA tensors, reading kept rows of
    ``weight_t`` only, in groups of at most four tokens, each with its own union of masks; None for
    what the kernel does not take."""
    if not linear_fits(x, weight_t, threshold, mean, bias) or not whole_pieces(weight_t):
        return None
    inputs, columns = weight_t.shape
    if why_not_sparse_linear(x.device, x.dtype, inputs, [columns]) is not None:
        return None
    rows = x.reshape(-1, inputs).contiguous()
    group = group_size(columns * x.element_size())
    y = x.new_empty(len(rows), columns)
    for part, out in zip(rows.split(group), y.split(group), strict=True):
        launch_sparse_linear(part, [weight_t], threshold, mean, bias, out=out)
    return y.view(*x.shape[:-1], columns)


def launch_sparse_linear(
    x: Tensor,
    weights_t: Sequence[Tensor],
    threshold: Tensor,
    mean: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel on x ``[T, H]``, T at most :func:`catsparse.kernels.stream.group_size`.

    Args:
        weights_t: ``[H, N_i]`` each, with contiguous rows; see :func:`why_not_sparse_linear`.
        bias: ``[N]`` fp32, of all of them.
        norm: of x, on its way in, before the decision.
        residual: ``[T, N]``, added to the rounded result; may be ``out``.
        out: ``[T, N]``, contiguous.
    """
    tokens, inputs = x.shape
    x = x if x.data_ptr() % PIECE == 0 else x.clone()
    threshold = threshold.contiguous()
    mean, bias = (None if v is None else v.contiguous() for v in (mean, bias))
    outputs = [w.shape[1] for w in weights_t]
    columns = sum(outputs)
    built = _build(x.device, x.dtype, template(tokens), inputs, columns)
    partial = torch.empty(built.blocks, tokens * columns, dtype=torch.float32, device=x.device)
    y = x.new_empty(tokens, columns) if out is None else out
    missing = PARTS - len(outputs)
    problem = _Problem(
        x.data_ptr(),
        (ctypes.c_void_p * PARTS)(*(w.data_ptr() for w in weights_t)),
        threshold.data_ptr(),
        None if mean is None else mean.data_ptr(),
        partial.data_ptr(),
        (ctypes.c_longlong * PARTS)(*(w.stride(0) for w in weights_t)),
        (ctypes.c_int * PARTS)(*outputs, *[0] * missing),
        NormArgument.of(norm),
        tokens,
        inputs,
        columns,
        threshold.dim(),
        built.capacity,
        columns * x.element_size(),
        built.stages,
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        built.main.launch(built.blocks, problem, stream, early=True)
        launch_sum(built.sum, partial, bias, residual, y)
    return y


@functools.cache
def _build(
    device: torch.device, dtype: torch.dtype, tokens: int, inputs: int, columns: int
) -> _Built:
    row = columns * dtype.itemsize
    blocks, capacity, stages, plan = _layout(device, row, inputs, tokens)
    code = compile_sparse_linear(dtype, tokens, row, plan, arch(device))
    module = load_module(code, device)
    shared = stages * plan.rows * row + _list_bytes(capacity, tokens)
    kernel = find_kernel(module, "sparse_linear", plan.threads + 32, shared)
    return _Built(kernel, find_sum(module), blocks, capacity, stages)


def compile_sparse_linear(
    dtype: torch.dtype, tokens: int, row: int, plan: Plan, target: str
) -> bytes:
    """For rows of so many bytes."""
    each = -(-row // (PIECE * plan.threads))
    even = row == plan.threads * each * PIECE
    constants = defines(Storage(dtype), tokens, plan, each, even)
    return compile_source((NUMBERS, WEIGHTS, STREAM, SUM, SOURCE), constants, target)


def _layout(device: torch.device, row: int, inputs: int, tokens: int) -> tuple[int, int, int, Plan]:
    """(blocks, inputs of a block at most, stages, plan)."""
    blocks = min(torch.cuda.get_device_properties(device).multi_processor_count, inputs)
    capacity = -(-inputs // blocks)
    plan = find_plan(row, tokens)
    room = shared_bytes(device) - LEFT - _list_bytes(capacity, tokens)
    rows = plan.rows
    while rows > 1 and stage_count(room, rows * row) < 4:
        rows //= 2
    plan = Plan(plan.threads, rows, plan.chunks)
    return blocks, capacity, stage_count(room, rows * row), plan


def _list_bytes(capacity: int, tokens: int) -> int:
    return 4 * capacity * (template(tokens) + 1)
