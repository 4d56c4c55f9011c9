"""``catsparse::gated_mlp`` in Triton: plans by shape, argument checks and the launches.

For what cuda.cu does not take: GPUs of AMD or older than Hopper, rows that are not whole 16-byte
pieces. One to four tokens. Nothing depends on the data but what is read, so calls can be captured
in a CUDA graph, and sums have a fixed order, so results repeat bit for bit.

The plain call is stream.py's one kernel. With a preview or a second decision a launch decides first
(decide.py), and the next reads the rows of what is left (kept.py).
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import Call, belong_together
from ..preview import GROUP, groups_of, preview_bits

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
# Of a program that decides: words of a preview's row at a time; neurons, and elements of W_gate's.
DECIDE_WARPS, WORDS = 4, 128
GATE_ROWS, GATE_COLUMNS = 4, 512
LIST_BLOCK = 128
PREVIEW_BYTES = 16  # the bound on which a preview begins


def find_plan(block: int, tokens: int, dtype: torch.dtype) -> Plan:
    """The plan for rows padded to ``block`` elements."""
    if tokens > 2 or (dtype == torch.float32 and block > 2048):
        return Plan(per_sm=1, warps=8, rows=1)
    if tokens == 2:
        return Plan(per_sm=1 if block > 4096 else 2, warps=8, rows=1)
    if block <= 2048:
        return Plan(per_sm=2, warps=4, rows=4)
    return Plan(per_sm=2 if block <= 4096 else 1, warps=8, rows=2)


def preview_rows(tokens: int) -> int:
    """Neurons of a program that decides by a preview: as many as leave its sums in registers."""
    return 16 if tokens == 1 else 8


def kept_rows(plan: Plan, dtype: torch.dtype) -> int:
    """Rows in half a tile of exact rows of what was decided ahead."""
    return max(1, plan.rows * 2 // dtype.itemsize)


def why_not_triton(device: torch.device) -> str | None:
    """Why ``device`` cannot run the kernels; None if it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def why_not_triton_sizes(dtype: torch.dtype, hidden: int, neurons: int, columns: int) -> str | None:
    """Why the kernels do not take weights of these sizes; None if they do."""
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if max(hidden, columns) > MAX_HIDDEN:
        return f"rows of {max(hidden, columns)} elements do not fit in the registers"
    if neurons >= MAX_NEURONS:
        return f"{neurons} neurons are too many"
    return None


@dataclass(frozen=True)
class _Launch:
    """What all launches of a call share.

    Attributes:
        padded: tokens, a power of two. block: elements of a row, likewise.
        early: keywords, where a kernel may start before the one ahead has ended.
    """

    padded: int
    block: int
    plan: Plan
    programs: int
    early: dict[str, bool]

    @classmethod
    def of(cls, call: Call) -> _Launch:
        import triton

        neurons, hidden = call.w_gate.shape
        padded = triton.next_power_of_2(call.x.numel() // hidden)
        block = triton.next_power_of_2(max(hidden, call.w_down_t.shape[1]))
        plan = find_plan(block, padded, call.x.dtype)
        programs = min(plan.per_sm * _multiprocessors(call.x.device), neurons)
        early = {"launch_pdl": True} if _launches_early(call.x.device) else {}
        return cls(padded, block, plan, programs, early)

    @property
    def options(self) -> dict[str, Any]:
        """Of the kernels that hold whole rows in registers."""
        nvidia = {} if torch.version.hip else {"maxnreg": self.plan.registers}
        return {"num_warps": self.plan.warps, **nvidia, **self.early}


def gated_mlp_triton(call: Call) -> Tensor:
    """:func:`catsparse.kernels.gated_mlp` for ``[T, H]``, T at most 4; see :func:`fits_triton`."""
    import triton

    from .stream import sum_kernel

    call = call._replace(x=call.x.contiguous()).made_contiguous()
    x, bias = call.x, call.bias
    launch, columns = _Launch.of(call), call.w_down_t.shape[1]
    total = x.numel() // x.shape[-1] * columns
    y = x.new_empty((*x.shape[:-1], columns))
    partial = torch.empty(launch.programs, total, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if call.preview is None and call.product_threshold is None:
            _stream(call, launch, partial)
        else:
            kept, gate = _decide(call, launch)
            _read_kept(call, launch, kept, gate, partial)
        sum_kernel[(triton.cdiv(total, SUM_COLUMNS),)](
            partial,
            bias,
            y,
            launch.programs,
            total,
            columns,
            HAS_BIAS=bias is not None,
            BLOCK_P=triton.next_power_of_2(launch.programs),
            BLOCK_N=SUM_COLUMNS,
            PDL=bool(launch.early),
            num_warps=SUM_WARPS,
            **launch.early,
        )
    return y


def _stream(call: Call, launch: _Launch, partial: Tensor) -> None:
    """Gate, decision, up and down in one launch."""
    from .stream import stream_kernel

    x, w_gate, w_up, w_down_t, threshold, act, mean, *_ = call
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    stream_kernel[(launch.programs,)](
        x,
        w_gate,
        w_up,
        w_down_t,
        threshold,
        mean,
        torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device),
        torch.empty(neurons, dtype=torch.int32, device=x.device),
        partial,
        x.numel() // hidden,
        hidden,
        neurons,
        columns,
        *(w.stride(0) for w in (w_gate, w_up, w_down_t)),
        ACT=act,
        PER_NEURON=threshold.dim() == 1,
        HAS_MEAN=mean is not None,
        TOKENS=launch.padded,
        BLOCK_H=launch.block,
        EVEN=launch.block == hidden == columns,
        ROWS=launch.plan.rows,
        PDL=bool(launch.early),
        PREFETCH_KB=PREFETCH_KB,
        THREADS=launch.plan.warps * 32,
        **launch.options,
    )


def _decide(call: Call, launch: _Launch) -> tuple[Tensor, Tensor | None]:
    """The tokens that keep each neuron, a bit each, int32 ``[I]``; and the gate, fp32
    ``[padded tokens, I]``, unless a preview decided."""
    import triton

    from .decide import gate_kernel, preview_kernel

    x, w_gate, threshold = call.x, call.w_gate, call.threshold
    neurons, hidden = w_gate.shape
    kept = torch.empty(neurons, dtype=torch.int32, device=x.device)
    shared = {
        "ACT": call.act,
        "PER_NEURON": threshold.dim() == 1,
        "TOKENS": launch.padded,
        "PDL": bool(launch.early),
        "num_warps": DECIDE_WARPS,
        **launch.early,
    }
    if call.preview is not None and call.preview_scale is not None:
        bits = preview_bits(call.preview, hidden)
        groups = groups_of(hidden)
        rows = preview_rows(launch.padded)
        preview_kernel[(triton.cdiv(neurons, rows),)](
            lay_out(x, bits, launch.padded),
            call.preview.view(torch.int32),
            call.preview_scale,
            threshold,
            kept,
            x.numel() // hidden,
            neurons,
            call.preview_scale.shape[1],
            GROUPS=groups,
            PRODUCTS=call.previews_products,
            BITS=bits,
            BLOCK_N=rows,
            BLOCK_W=min(WORDS, max(16, triton.next_power_of_2(groups * 2 * bits))),
            **shared,
        )
        return kept, None
    gate = torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device)
    gate_kernel[(triton.cdiv(neurons, GATE_ROWS),)](
        x,
        w_gate,
        threshold,
        gate,
        kept,
        x.numel() // hidden,
        neurons,
        w_gate.stride(0),
        H=hidden,
        BLOCK_N=GATE_ROWS,
        BLOCK_K=min(GATE_COLUMNS, max(16, triton.next_power_of_2(hidden))),
        **shared,
    )
    return kept, gate


def _read_kept(
    call: Call, launch: _Launch, kept: Tensor, gate: Tensor | None, partial: Tensor
) -> None:
    """The exact rows of what :func:`_decide` kept, and the second decision."""
    import triton

    from .kept import kept_kernel

    x, w_gate, w_up, w_down_t, _, act, mean, _, product, preview, _ = call[:11]
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    kept_kernel[(launch.programs,)](
        x,
        w_gate,
        w_up,
        w_down_t,
        product,
        mean,
        gate,
        kept,
        torch.empty(2, neurons, dtype=torch.int32, device=x.device),
        torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device),
        partial,
        x.numel() // hidden,
        hidden,
        neurons,
        columns,
        *(w.stride(0) for w in (w_gate, w_up, w_down_t)),
        ACT=act,
        PREVIEW=preview is not None,
        SECOND=product is not None,
        PER_NEURON=product is not None and product.dim() == 1,
        HAS_MEAN=mean is not None,
        TOKENS=launch.padded,
        BLOCK_H=launch.block,
        BLOCK_L=min(LIST_BLOCK, triton.next_power_of_2(triton.cdiv(neurons, launch.programs))),
        EVEN=launch.block == hidden == columns,
        ROWS=kept_rows(launch.plan, x.dtype),
        PDL=bool(launch.early),
        **launch.options,
    )


def lay_out(x: Tensor, bits: int, tokens: int) -> Tensor:
    """``[T, H]`` as fp32 ``[tokens, fields of a word, words of a row]`` of a preview: field k of a
    word w meets ``[:, k, w]`` (see :func:`catsparse.kernels.preview.make_preview`). Zeros where a
    last group has no inputs, and for tokens from T on."""
    rows, hidden = x.shape
    groups = groups_of(hidden)
    x = F.pad(x, (0, groups * GROUP - hidden, 0, tokens - rows))
    if bits == 4:  # the low half of byte b of a group is its input b, the high half b + 32
        parts = x.view(tokens, groups, 2, 8, 4).permute(0, 4, 2, 1, 3)
    else:
        parts = x.view(tokens, groups, 16, 4).permute(0, 3, 1, 2)
    laid = torch.empty(parts.shape, dtype=torch.float32, device=x.device)
    return laid.copy_(parts).view(tokens, 32 // bits, -1)


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
    get covers what they read."""
    x, w_gate, w_up, w_down_t = call[:4]
    return (
        belong_together(call)
        and call.weights is None
        and why_not_triton_sizes(x.dtype, w_gate.shape[1], w_gate.shape[0], w_down_t.shape[1])
        is None
        and all(w.stride(1) == 1 or w.shape[1] == 1 for w in (w_gate, w_up, w_down_t))
        and (call.preview is None or _in_words(call.preview))
    )


def _in_words(preview: Tensor) -> bool:
    """Whether rows can be read as 32-bit words where they are; a copy a call would cost more than
    it saves."""
    return (
        preview.is_contiguous()
        and preview.data_ptr() % PREVIEW_BYTES == 0
        and preview.storage_offset() % 4 == 0
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

    if torch.version.hip is not None:
        return False
    has_waits = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return has_waits and torch.cuda.get_device_capability(device) >= (9, 0)
