"""linear.cu from Python: y = round(w norm(x) + bias) + residual, for the decode step.

Not an op of its own: the step (decoding/fused.py) calls it while its graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .formats import columns_of, format_of
from .nvrtc import Kernel, compile_source, find_kernel, load_module
from .stream import (
    DTYPES,
    MOST_PIECES,
    NUMBERS,
    PIECE,
    STREAM,
    WEIGHTS,
    MatrixArgument,
    Norm,
    NormArgument,
    Plan,
    Storage,
    arch,
    defines,
    find_plan,
    shared_bytes,
    template,
    whole_pieces,
)
from .sums import LEFT
from .tiles import OWN, PREVIEW, TILE, Ring, digit_bytes, find_ring, tile_defines

SOURCE = Path(__file__).with_name("linear.cu")
PARTS = 3  # linear.cu's
# Attention's blocks find no room beside those of a product: on their multiprocessors its rows would
# be in the way of all that they load, and the step take longer. The sum of a gated MLP's partial
# outputs does run beside the product after it, so in the first round half as much is asked for.
_FIRST_BYTES = 32 * 1024
_DOT_BYTES = 16 * 1024  # partial dots of the rows that a block finishes at a time, at most


class _Linear(ctypes.Structure):
    """``Linear`` of linear.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("w", MatrixArgument * PARTS),
        ("bias", ctypes.c_void_p * PARTS),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int * PARTS),
        ("norm", NormArgument),
        *((name, ctypes.c_int) for name in ("tokens", "hidden", "total")),
        *((name, ctypes.c_int) for name in ("capacity", "pitch", "stage", "stages")),
    ]


@dataclass(frozen=True)
class _Built:
    kernel: Kernel
    blocks: int
    capacity: int
    stage: int
    stages: int


def why_not_linear(weights: Sequence[Tensor], dtype: torch.dtype | None = None) -> str | None:
    """Why linear.cu does not take these matrices, one below the other, with x in ``dtype`` (None
    for theirs); None if it does. They are all in ``dtype``, or in one format of
    :mod:`catsparse.kernels.formats`."""
    first = weights[0]
    dtype = dtype or first.dtype
    if len(weights) > PARTS or any(w.dtype != first.dtype for w in weights):
        return f"{len(weights)} matrices of different dtypes, or more than {PARTS}"
    storage = Storage(dtype, format_of(first))
    if dtype not in DTYPES or (storage.weights is None and first.dtype != dtype):
        return f"no kernel for {str(first.dtype).removeprefix('torch.')}"
    hidden = columns_of(first)
    if any(columns_of(w) != hidden or not whole_pieces(w) for w in weights):
        return f"rows of {hidden} elements are not whole 16-byte pieces"
    total = sum(w.shape[0] for w in weights)
    most = hidden * dtype.itemsize > MOST_PIECES * PIECE
    if most or _layout(first.device, storage, hidden, total, 1)[2] < 2:
        return f"{total} rows of {hidden} do not fit in shared memory"
    return None


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    scales: Sequence[Tensor | None] = (None,) * PARTS,
) -> Tensor:
    """The product, which reads weights before the kernel ahead of it has ended.

    Args:
        x: ``[T, H]`` contiguous, T at most :func:`catsparse.kernels.stream.group_size`.
        weights: ``[N_i, H]`` each, x's dtype or packed; see :func:`why_not_linear`.
        biases: ``[N_i]`` each, or None.
        residual: ``[T, N]``, added to the rounded product; may be ``out``.
        out: ``[T, N]``, contiguous.
        scales: of packed weights.
    """
    tokens, hidden = x.shape
    rows = [w.shape[0] for w in weights]
    total = sum(rows)
    y = x.new_empty(tokens, total) if out is None else out
    storage = Storage(x.dtype, format_of(weights[0]))
    built = _build(x.device, storage, template(tokens), hidden, total)
    missing = PARTS - len(weights)
    argument = _Linear(
        x.data_ptr(),
        (MatrixArgument * PARTS)(*map(MatrixArgument.of, weights, scales)),
        (ctypes.c_void_p * PARTS)(*(None if b is None else b.data_ptr() for b in biases)),
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
        (ctypes.c_int * PARTS)(*rows, *[0] * missing),
        NormArgument.of(norm),
        tokens,
        hidden,
        total,
        built.capacity,
        storage.row_bytes(hidden),
        built.stage,
        built.stages,
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        built.kernel.launch(built.blocks, argument, stream, early=True)
    return y


@functools.cache
def _build(device: torch.device, storage: Storage, tokens: int, hidden: int, total: int) -> _Built:
    blocks, capacity, stages, plan = _layout(device, storage, hidden, total, tokens)
    code = compile_linear(storage, tokens, hidden, plan, arch(device))
    stage = _ring(storage, hidden, plan, 0).stage
    shared = shared_bytes(device) - LEFT  # all, used or not
    kernel = find_kernel(load_module(code, device), "linear", plan.threads + 32, shared)
    return _Built(kernel, blocks, capacity, stage, stages)


def compile_linear(storage: Storage, tokens: int, hidden: int, plan: Plan, target: str) -> bytes:
    """For rows of so many inputs."""
    pieces = -(-hidden * storage.dtype.itemsize // PIECE)
    each = -(-pieces // plan.threads)
    own = tile_defines(_ring(storage, hidden, plan, 0).tiles)
    own["UNDER_WAY_FIRST"] = _FIRST_BYTES
    constants = defines(storage, tokens, plan, each, pieces == plan.threads * each, **own)
    return compile_source((NUMBERS, WEIGHTS, STREAM, PREVIEW, SOURCE), constants, target)


def _layout(
    device: torch.device, storage: Storage, hidden: int, total: int, tokens: int
) -> tuple[int, int, int, Plan]:
    """(blocks, rows that a block finishes at a time, stages, plan)."""
    blocks = min(torch.cuda.get_device_properties(device).multi_processor_count, total)
    plan = find_plan(hidden * storage.dtype.itemsize, tokens, storage.weights)
    room = shared_bytes(device) - LEFT - _other_bytes(storage, hidden, tokens)
    rows = plan.rows
    while rows > 1 and not _ring(
        storage, hidden, replace(plan, rows=rows), room - _DOT_BYTES
    ).holds(4):
        rows //= 2
    plan = replace(plan, rows=rows)
    step = TILE if storage.weights == "int4" else rows
    most = _DOT_BYTES // _dot_bytes(1, tokens, plan)
    capacity = min(-(-total // blocks), most)
    capacity = -(-capacity // step) * step if capacity < most else most // step * step
    ring = _ring(storage, hidden, plan, room - _dot_bytes(capacity, tokens, plan))
    return blocks, capacity, ring.stages if ring.holds(2) else 0, plan


def _ring(storage: Storage, hidden: int, plan: Plan, room: int) -> Ring:
    row = storage.staged_bytes(hidden)
    return find_ring(room, plan.rows, row, hidden, OWN if storage.weights == "int4" else None)


def _other_bytes(storage: Storage, hidden: int, tokens: int) -> int:
    return digit_bytes(storage.dtype, hidden, tokens) if storage.weights == "int4" else 0


def _dot_bytes(rows: int, tokens: int, plan: Plan) -> int:
    return 4 * rows * tokens * (plan.threads // 32 | 1)
