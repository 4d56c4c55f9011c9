"""sum.cuh from Python: the second launch of kernels whose blocks write partial outputs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import Kernel, find_kernel

SUM = Path(__file__).with_name("sum.cuh")
# Shared memory left to the second kernel, so that its blocks can wait beside the first one's.
LEFT = 8192
_COLUMNS, _THREADS = 32, 256


class _Sum(ctypes.Structure):
    """``Sum`` of sum.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("parts", "tokens", "columns")),
    ]


def find_sum(module: ctypes.c_void_p) -> Kernel:
    return find_kernel(module, "sum_partials", _THREADS)


def launch_sum(
    kernel: Kernel, partial: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    """y = bias + sum of the parts, rounded, + residual, on the current stream.

    Args:
        partial: ``[parts, T * columns]`` fp32.
        bias: ``[columns]`` fp32. residual, y: ``[T, columns]``.
    """
    tokens, columns = y.shape
    total = _Sum(
        partial.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        y.data_ptr(),
        partial.shape[0],
        tokens,
        columns,
    )
    stream = torch.cuda.current_stream().cuda_stream
    kernel.launch(-(-tokens * columns // _COLUMNS), total, stream, early=True)
