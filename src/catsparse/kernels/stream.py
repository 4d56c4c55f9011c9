"""What the streaming CUDA kernels share on the host: sources, plans, sizes of the ring."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .preview import GROUP, SCALE_GROUPS

_HERE = Path(__file__).parent
NUMBERS, WEIGHTS, STREAM = (_HERE / f"{name}.cuh" for name in ("numbers", "weights", "stream"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # by DTYPE of numbers.cuh
PIECE = 16  # bytes
MOST_PIECES = 4096  # of a row; what a consumer holds of more does not fit in the registers
_MAX_STAGES = 32  # stream.cuh's
_WEIGHT_NUMBERS = {None: 0, "int8": 1, "fp8": 2, "int4": 3}  # WEIGHT of weights.cuh


@dataclass(frozen=True)
class Plan:
    """How a kernel cuts up its work; found by ``catsparse bench tune`` (docs/kernels.md).

    Attributes:
        threads: consumers of a block. rows: rows of a stage. chunks: chunks of the gated MLP's
            decision.
    """

    threads: int
    rows: int
    chunks: int


@dataclass(frozen=True)
class Norm:
    """RMS norm of a kernel's input: x / rms(x) times ``offset + weight`` (Gemma's offset is 1).

    Attributes:
        weight: ``[H]``, x's dtype. eps: added to the mean square.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """``norm`` of ``x`` ``[..., H]`` in torch, rounded where transformers' modules round."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (wide * (norm.offset + norm.weight.float())).to(x.dtype)
    return norm.weight * wide.to(x.dtype)


class NormArgument(ctypes.Structure):
    """``Norm`` of stream.cuh."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
    ]

    @classmethod
    def of(cls, norm: Norm | None) -> NormArgument:
        return cls() if norm is None else cls(norm.weight.data_ptr(), norm.eps, norm.offset)


class MatrixArgument(ctypes.Structure):
    """``Matrix`` of stream.cuh."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("stride", ctypes.c_longlong),
    ]

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None = None) -> MatrixArgument:
        stride = weight.stride(0) * weight.element_size()
        return cls(weight.data_ptr(), None if scale is None else scale.data_ptr(), stride)


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    Attributes:
        dtype: of x, and of weights that are not packed.
        weights: the format of packed ones (:mod:`catsparse.kernels.formats`), or None.
    """

    dtype: torch.dtype
    weights: str | None = None

    def row_bytes(self, columns: int) -> int:
        """Of a matrix's row, without scales of groups."""
        if self.weights is None:
            return columns * self.dtype.itemsize
        return columns // 2 if self.weights == "int4" else columns

    def scale_bytes(self, columns: int) -> int:
        """Of the scales of a row's groups."""
        if self.weights != "int4":
            return 0
        return -(-columns // GROUP // SCALE_GROUPS) * SCALE_GROUPS * 2

    def staged_bytes(self, columns: int) -> int:
        """What a row takes in a stage of the ring."""
        return self.row_bytes(columns) + self.scale_bytes(columns)


def arch(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def shared_bytes(device: torch.device) -> int:
    """What a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def stage_count(room: int, stage: int) -> int:
    """Stages of ``stage`` bytes that ``room`` holds."""
    return min(_MAX_STAGES, room // stage)


def group_size(row_bytes: int) -> int:
    """Tokens of one launch at most: 4, fewer for long rows, as their sums stay in registers."""
    return max(1, min(4, MOST_PIECES * PIECE // row_bytes))


def find_plan(row_bytes: int, tokens: int, weights: str | None = None) -> Plan:
    """The plan for x's rows of so many bytes, or the output's, and calls of 1, 2 or 4 tokens."""
    pieces = -(-row_bytes // PIECE)
    # A consumer holds its columns of x and of the output for each token in registers.
    most = 256 if pieces * tokens <= 1024 else 512
    columns = -(-pieces // most)
    threads = -(-pieces // (32 * columns)) * 32
    rows = 2 if pieces * tokens > 2048 else 4
    return Plan(threads, rows if weights is None else 2 * rows, chunks=3)


def template(tokens: int) -> int:
    """Tokens that a kernel is built for: 1, 2 or 4."""
    return tokens if tokens < 3 else 4


def defines(
    storage: Storage, tokens: int, plan: Plan, columns: int, even: bool, **more: int
) -> tuple[tuple[str, str], ...]:
    """The constants of numbers.cuh, weights.cuh and stream.cuh, and a kernel's own."""
    constants = {
        "DTYPE": DTYPES.index(storage.dtype),
        "WEIGHT": _WEIGHT_NUMBERS[storage.weights],
        "TOKENS": tokens,
        "THREADS": plan.threads,
        "COLUMNS": columns,
        "ROWS": plan.rows,
        "EVEN": int(even),
        **more,
    }
    return tuple((name, str(value)) for name, value in constants.items())


def whole_pieces(weight: Tensor) -> bool:
    """Rows that the bulk copy engine takes: contiguous, and on 16-byte bounds."""
    size = weight.element_size()
    return (
        (weight.stride(1) == 1 or weight.shape[1] == 1)
        and weight.shape[1] * size % PIECE == 0
        and weight.stride(0) * size % PIECE == 0
        and weight.data_ptr() % PIECE == 0
    )
