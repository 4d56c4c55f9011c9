"""``catsparse::gated_mlp`` in Triton: plans by shape, argument checks and the launches.

For what cuda.cu does not take: GPUs older than Hopper, rows that are not whole 16-byte pieces.
One to four tokens. Nothing depends on the data but what is read, so calls can be captured in a
CUDA graph, and sums have a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Call, belong_together

MAX_TOKENS = 4  # sums of more do not fit in the registers
MAX_HIDDEN = 8192
MAX_NEURONS = 2**24  # a list entry holds the neuron and a bit for each token
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Plan:
    """How the work is cut up; chosen by measurement on an H200 (docs/kernels.md).

    Attributes:
        per_sm: programs a multiprocessor. warps: warps a program.
        rows: rows in half a tile.
    """

    per_sm: int
    warps: int
    rows: int

    @property
    def registers(self) -> int:
        """What a thread may use for ``per_sm`` programs to fit."""
        return min(255, 65536 // (self.per_sm * self.warps * 32) // 8 * 8)


# First gate rows asked for before the previous kernel ends, in kilobytes a program.
PREFETCH_KB = 32
SUM_COLUMNS, SUM_WARPS = 32, 4
MASK_BLOCK = 512


def find_plan(block: int, tokens: int, dtype: torch.dtype) -> Plan:
    """The plan for rows padded to ``block`` elements."""
    if tokens > 2 or (dtype == torch.float32 and block > 2048):
        return Plan(per_sm=1, warps=8, rows=1)
    if tokens == 2:
        return Plan(per_sm=1 if block > 4096 else 2, warps=8, rows=1)
    if block <= 2048:
        return Plan(per_sm=2, warps=4, rows=4)
    return Plan(per_sm=2 if block <= 4096 else 1, warps=8, rows=2)


def why_not_triton(device: torch.device) -> str | None:
    """Why ``device`` cannot run the kernels; None if it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def gated_mlp_triton(call: Call) -> Tensor:
    """:func:`catsparse.kernels.gated_mlp` for ``[T, H]``, T at most 4; see :func:`fits_triton`."""
    import triton

    from .stream import stream_kernel, sum_kernel

    x, w_gate, w_up, w_down_t, threshold, act, mean, bias, *_ = call
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    x = x.contiguous()
    tokens = x.numel() // hidden
    padded = triton.next_power_of_2(tokens)
    block = triton.next_power_of_2(max(hidden, columns))
    plan = find_plan(block, padded, x.dtype)
    programs = min(plan.per_sm * _multiprocessors(x.device), neurons)
    early = {"launch_pdl": True} if _launches_early(x.device) else {}
    y = x.new_empty((*x.shape[:-1], columns))
    kept_gate = torch.empty(padded, neurons, dtype=torch.float32, device=x.device)
    kept_index = torch.empty(neurons, dtype=torch.int32, device=x.device)
    partial = torch.empty(programs, tokens * columns, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        stream_kernel[(programs,)](
            x,
            w_gate,
            w_up,
            w_down_t,
            threshold.contiguous(),
            None if mean is None else mean.contiguous(),
            kept_gate,
            kept_index,
            partial,
            tokens,
            hidden,
            neurons,
            columns,
            w_gate.stride(0),
            w_up.stride(0),
            w_down_t.stride(0),
            ACT=act,
            PER_NEURON=threshold.dim() == 1,
            HAS_MEAN=mean is not None,
            TOKENS=padded,
            BLOCK_H=block,
            EVEN=block == hidden == columns,
            ROWS=plan.rows,
            PDL=bool(early),
            PREFETCH_KB=PREFETCH_KB,
            THREADS=plan.warps * 32,
            num_warps=plan.warps,
            maxnreg=plan.registers,
            **early,
        )
        total = tokens * columns
        sum_kernel[(triton.cdiv(total, SUM_COLUMNS),)](
            partial,
            None if bias is None else bias.contiguous(),
            y,
            programs,
            total,
            columns,
            HAS_BIAS=bias is not None,
            BLOCK_P=triton.next_power_of_2(programs),
            BLOCK_N=SUM_COLUMNS,
            PDL=bool(early),
            num_warps=SUM_WARPS,
            **early,
        )
    return y


def mask_triton(z: Tensor, u: Tensor, threshold: Tensor, act: str, mean: Tensor | None) -> Tensor:
    """|act(z)| > threshold ? act(z) u - mean : 0, in one pass; what a masked MLP's down gets.

    Args:
        z: ``[..., I]`` gate before its activation, contiguous, of any dtype.
        u: ``[..., I]`` up projection, contiguous; the result is written over it.
        threshold: fp32, 0-d or ``[I]``.
        mean: fp32 ``[I]`` or None.
    """
    import triton

    from .mask import mask_kernel

    total = z.numel()
    with torch.cuda.device_of(z):
        mask_kernel[(triton.cdiv(total, MASK_BLOCK),)](
            z,
            u,
            threshold.contiguous(),
            None if mean is None else mean.contiguous(),
            u,
            total,
            z.shape[-1],
            ACT=act,
            PER_NEURON=threshold.dim() == 1,
            HAS_MEAN=mean is not None,
            BLOCK=MASK_BLOCK,
        )
    return u


def fits_triton(call: Call) -> bool:
    """Whether the kernels take the call, in groups of ``MAX_TOKENS`` tokens, and every pointer they
    get covers what they read. A preview and a second decision they do not know."""
    w_gate, w_up, w_down_t = call[1:4]
    return (
        belong_together(call)
        and call.product_threshold is None
        and call.preview is None
        and call.x.dtype in DTYPES
        and w_gate.shape[0] < MAX_NEURONS
        and max(w_gate.shape[1], w_down_t.shape[1]) <= MAX_HIDDEN
        and all(w.stride(1) == 1 for w in (w_gate, w_up, w_down_t))
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter; odd, so that sum_kernel has rows to mask
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _launches_early(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel starts while the one before it ends."""
    if device.type == "cpu":  # Triton's interpreter
        return False
    import triton.language as tl

    has_waits = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return has_waits and torch.cuda.get_device_capability(device) >= (9, 0)
