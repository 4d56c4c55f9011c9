"""The CPU kernels behind the ops: checks, and calls of cpu.c through ctypes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .arguments import Call, belong_together, linear_fits
from .build import Library, load_library
from .formats import FORMATS
from .preview import preview_bits
from .reference import ACTIVATIONS, MAX_OP_TOKENS, gated_mlp_reference

SOURCE = Path(__file__).with_name("cpu.c")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHTS = (*DTYPES, *FORMATS.values())  # by their numbers in cpu_weights.h
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class _Matrix(ctypes.Structure):
    """``Matrix`` of cpu_weights.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scale")),
        ("stride", ctypes.c_int64),
    ]


class _Problem(ctypes.Structure):
    """``Problem`` of cpu.c."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, _Matrix) for name in ("gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("threshold", "mean", "bias", "product_threshold")),
        *((name, ctypes.c_void_p) for name in ("preview", "preview_scale", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "neurons", "columns")),
        *((name, ctypes.c_int64) for name in ("threshold_stride", "product_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "weights", "act", "threads")),
        ("down_transposed", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("preview_bits", "preview_products")),
    ]


def cpu_library() -> Library:
    """The compiled kernel, built at the first call, or why there is none."""
    return load_library(SOURCE)


def gated_mlp_cpu(call: Call) -> Tensor:
    """:func:`catsparse.kernels.gated_mlp` for CPU tensors, skipping what is dropped.

    ``w_down_t`` with contiguous rows is read row by row, kept neurons only; a transposed view of
    ``w_down`` is read whole. With a preview only kept rows of ``w_gate`` are read too. Anything the
    kernel does not take goes to the torch reference.
    """
    library = cpu_library().handle
    if library is None or not _fits(call):
        return gated_mlp_reference(*call)
    call = call.made_contiguous()
    x, w_gate, w_up, w_down_t, threshold, *_ = call
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    transposed = _row_stride(w_down_t) is not None
    w_down = w_down_t if transposed else w_down_t.t()
    y = x.new_empty((*x.shape[:-1], call.columns))
    problem = _Problem(
        rows.data_ptr(),
        _matrix(w_gate, call.gate_scale),
        _matrix(w_up, call.up_scale),
        _matrix(w_down, call.down_scale),
        threshold.data_ptr(),
        _pointer(call.mean),
        _pointer(call.bias),
        _pointer(call.product_threshold),
        _pointer(call.preview),
        _pointer(call.preview_scale),
        y.data_ptr(),
        rows.shape[0],
        rows.shape[1],
        w_gate.shape[0],
        call.columns,
        threshold.dim(),
        0 if call.product_threshold is None else call.product_threshold.dim(),
        DTYPES.index(x.dtype),
        _WEIGHTS.index(w_gate.dtype),
        _ACTIVATION_NUMBERS[call.act],
        torch.get_num_threads(),
        transposed,
        0 if call.preview is None else preview_bits(call.preview, rows.shape[1]),
        call.previews_products,
    )
    if library.catsparse_gated_mlp(ctypes.byref(problem)):
        raise MemoryError(f"no memory for the work space of {w_gate.shape[0]} neurons")
    return y


def packed_linear_cpu(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor | None:
    """:func:`catsparse.kernels.packed_linear.packed_linear` for CPU tensors, which must belong
    together and be at most ``MAX_OP_TOKENS`` tokens; None for what the kernel does not take."""
    library = cpu_library().handle
    if library is None or x.dtype not in DTYPES or _row_stride(weight) is None:
        return None
    rows, scale = x.reshape(-1, x.shape[-1]).contiguous(), scale.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    problem = _Problem(
        x=rows.data_ptr(),
        gate=_matrix(weight, scale),
        y=y.data_ptr(),
        tokens=rows.shape[0],
        hidden=rows.shape[1],
        neurons=weight.shape[0],
        columns=weight.shape[0],
        dtype=DTYPES.index(x.dtype),
        weights=_WEIGHTS.index(weight.dtype),
        threads=torch.get_num_threads(),
    )
    if library.catsparse_packed_linear(ctypes.byref(problem)):
        raise MemoryError(f"no memory for the work space of {weight.shape[0]} rows")
    return y


def sparse_linear_cpu(
    x: Tensor, weight_t: Tensor, threshold: Tensor, mean: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """:func:`catsparse.kernels.sparse_linear.sparse_linear` for CPU tensors, reading kept rows of
    ``weight_t`` only; None for what the kernel does not take."""
    library = cpu_library().handle
    inputs, columns = weight_t.shape
    if (
        library is None
        or _row_stride(weight_t) is None
        or not linear_fits(x, weight_t, threshold, mean, bias)
        or x.numel() > MAX_OP_TOKENS * inputs
    ):
        return None
    rows = x.reshape(-1, inputs).contiguous()
    threshold = threshold.contiguous()
    mean, bias = (None if v is None else v.contiguous() for v in (mean, bias))
    y = x.new_empty((*x.shape[:-1], columns))
    problem = _Problem(
        x=rows.data_ptr(),
        down=_matrix(weight_t),
        threshold=threshold.data_ptr(),
        mean=_pointer(mean),
        bias=_pointer(bias),
        y=y.data_ptr(),
        tokens=rows.shape[0],
        hidden=inputs,
        neurons=inputs,
        columns=columns,
        threshold_stride=threshold.dim(),
        dtype=DTYPES.index(x.dtype),
        weights=DTYPES.index(x.dtype),
        threads=torch.get_num_threads(),
        down_transposed=1,
    )
    if library.catsparse_sparse_linear(ctypes.byref(problem)):
        raise MemoryError(f"no memory for the work space of {inputs} inputs")
    return y


def _fits(call: Call) -> bool:
    """Whether every pointer that cpu.c gets covers what it reads."""
    x, w_gate, w_up, w_down_t = call[:4]
    return (
        belong_together(call)
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and x.numel() <= MAX_OP_TOKENS * x.shape[-1]
        and all(_row_stride(w) is not None for w in (w_gate, w_up))
        and (_row_stride(w_down_t) or _row_stride(w_down_t.t())) is not None
        and (call.weights is None or _row_stride(w_down_t) is not None)
        # A preview of int4 weights would be as large as they are.
        and (call.weights != "int4" or call.preview is None)
    )


def _matrix(weight: Tensor, scale: Tensor | None = None) -> _Matrix:
    return _Matrix(weight.data_ptr(), _pointer(scale), _row_stride(weight))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _row_stride(weight: Tensor) -> int | None:
    """Elements from one row to the next, or None where rows are not contiguous."""
    rows, columns = weight.shape
    if columns > 1 and weight.stride(1) != 1:
        return None
    return weight.stride(0) if rows > 1 else columns
