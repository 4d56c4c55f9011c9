"""attention.cu from Python: attention of one new token a sequence, for the decode step.

Not an op of its own: the step (decoding/fused.py) calls it while its graph is captured.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .nvrtc import Kernel, compile_source, find_kernel, load_module
from .stream import DTYPES, NUMBERS, Norm, arch

SOURCE = Path(__file__).with_name("attention.cu")
HEAD_SIZES = (64, 128, 256)
MOST_GROUP = 8  # query heads a key-value head; the sums of more do not fit in the registers
_MOST_SPLITS = 64  # attention.cu's


class _Attention(ctypes.Structure):
    """``Attention`` of attention.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "keys", "values", "cosines", "sines")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "position", "starts")),
        *((name, ctypes.c_void_p) for name in ("out", "partial", "arrived")),
        *((name, ctypes.c_longlong) for name in ("batch_stride", "head_stride")),
        *((name, ctypes.c_float) for name in ("scale", "q_eps", "k_eps", "offset")),
        *((name, ctypes.c_int) for name in ("kv_heads", "splits", "window")),
    ]


@dataclass(frozen=True)
class Scratch:
    """What blocks of one launch hand over; serves any number of launches one after the other."""

    partial: Tensor
    arrived: Tensor
    splits: int

    @classmethod
    def make(
        cls, tokens: int, heads: int, kv_heads: int, head_size: int, device: torch.device
    ) -> Scratch:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        # One wave of blocks, so that the product after it can begin to ask for its weights.
        splits = max(1, min(_MOST_SPLITS, 2 * multiprocessors // (tokens * kv_heads)))
        splits = splits // cluster_of(splits) * cluster_of(splits)
        partial = torch.empty(tokens * heads * splits * (head_size + 4), device=device)
        arrived = torch.zeros(tokens * kv_heads, dtype=torch.int32, device=device)
        return cls(partial, arrived, splits)


def cluster_of(splits: int) -> int:
    """Blocks of a cluster, where a head's slots are shared by so many blocks at most."""
    return next(size for size in (8, 4, 2, 1) if size <= splits)


def why_not_attention(dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> str | None:
    """Why attention.cu does not take heads of this kind; None if it does."""
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if head_size not in HEAD_SIZES:
        return f"heads of {head_size} elements"
    group = heads // kv_heads
    if heads % kv_heads or group > MOST_GROUP:
        return f"{heads} query heads for {kv_heads} key-value heads"
    if group * head_size * dtype.itemsize > 2048:
        return f"{group} query heads of {head_size} elements a key-value head"
    return None


def attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    cosines: Tensor,
    sines: Tensor,
    position: Tensor,
    starts: Tensor,
    scratch: Scratch,
    scale: float,
    q_norm: Norm | None,
    k_norm: Norm | None,
    window: int,
    out: Tensor,
) -> Tensor:
    """softmax(scale q k) v over the slots ``starts`` to ``position``; the new key and value are
    written into the cache.

    Args:
        qkv: ``[T, (heads + 2 kv_heads) D]``, one new token of each of T sequences.
        keys: ``[T, kv_heads, L, D]``, with contiguous heads' slots. values: likewise.
        cosines: ``[positions, D]`` in qkv's dtype, by position - start. sines: likewise.
        position: int64 ``[1]``: the new token's slot. starts: int64 ``[T]``.
        scale: of the scores. q_norm: of each query head, or None. k_norm: likewise.
        window: how many slots the token sees, itself included; 0 for all.
        out: ``[T, heads D]``.
    """
    tokens, kv_heads, _, head_size = keys.shape
    group = out.shape[1] // (kv_heads * head_size)
    argument = _Attention(
        qkv.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        None if q_norm is None else q_norm.weight.data_ptr(),
        None if k_norm is None else k_norm.weight.data_ptr(),
        position.data_ptr(),
        starts.data_ptr(),
        out.data_ptr(),
        scratch.partial.data_ptr(),
        scratch.arrived.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        scale,
        0.0 if q_norm is None else q_norm.eps,
        0.0 if k_norm is None else k_norm.eps,
        0.0 if q_norm is None else q_norm.offset,
        kv_heads,
        scratch.splits,
        window,
    )
    with torch.cuda.device(qkv.device):
        stream = torch.cuda.current_stream().cuda_stream
        kernel = _build(qkv.device, qkv.dtype, head_size, group, cluster_of(scratch.splits))
        kernel.launch(tokens * kv_heads * scratch.splits, argument, stream, early=True)
    return out


def _threads(group: int) -> int:
    """Of a block: many, for bytes under way, but the block's sums must fit in shared memory."""
    return 256 if group <= 4 else 128


@functools.cache
def _build(
    device: torch.device, dtype: torch.dtype, head_size: int, group: int, cluster: int
) -> Kernel:
    code = compile_attention(dtype, head_size, group, cluster, arch(device))
    return find_kernel(load_module(code, device), "attention", _threads(group))


def compile_attention(
    dtype: torch.dtype, head_size: int, group: int, cluster: int, target: str
) -> bytes:
    """For ``group`` query heads a key-value head."""
    constants = {"DTYPE": DTYPES.index(dtype), "HEAD": head_size, "GROUP": group}
    constants |= {"THREADS": _threads(group), "CLUSTER": cluster}
    defines = tuple((name, str(value)) for name, value in constants.items())
    return compile_source((NUMBERS, SOURCE), defines, target)
