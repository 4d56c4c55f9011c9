"""The launches of a call: the stream, or a decision and then the kept rows; and the sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import Call
from ..preview import GROUP, groups_of, preview_bits
from . import plans
from .plans import Launch


def run_stream(call: Call, launch: Launch, partial: Tensor) -> None:
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
        PREFETCH_KB=plans.PREFETCH_KB,
        THREADS=launch.plan.warps * 32,
        **launch.options,
    )


def decide(call: Call, launch: Launch) -> tuple[Tensor, Tensor | None]:
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
        "num_warps": plans.DECIDE_WARPS,
        **launch.early,
    }
    if call.preview is not None and call.preview_scale is not None:
        bits = preview_bits(call.preview, hidden)
        groups = groups_of(hidden)
        rows = plans.preview_rows(launch.padded)
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
            BLOCK_W=min(plans.WORDS, max(16, triton.next_power_of_2(groups * 2 * bits))),
            **shared,
        )
        return kept, None
    gate = torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device)
    gate_kernel[(triton.cdiv(neurons, plans.GATE_ROWS),)](
        x,
        w_gate,
        threshold,
        gate,
        kept,
        x.numel() // hidden,
        neurons,
        w_gate.stride(0),
        H=hidden,
        BLOCK_N=plans.GATE_ROWS,
        BLOCK_K=min(plans.GATE_COLUMNS, max(16, triton.next_power_of_2(hidden))),
        **shared,
    )
    return kept, gate


def read_kept(
    call: Call, launch: Launch, kept: Tensor, gate: Tensor | None, partial: Tensor
) -> None:
    """The exact rows of what :func:`decide` kept, and the second decision."""
    import triton

    from .kept import kept_kernel

    x, w_gate, w_up, w_down_t, _, act, mean, _, product, preview, _ = call[:11]
    neurons, hidden = w_gate.shape
    columns = w_down_t.shape[1]
    share = triton.cdiv(neurons, launch.programs)
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
        BLOCK_L=min(plans.LIST_BLOCK, triton.next_power_of_2(share)),
        EVEN=launch.block == hidden == columns,
        ROWS=plans.kept_rows(launch.plan, x.dtype),
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


def add_up(call: Call, launch: Launch, partial: Tensor, y: Tensor) -> None:
    """y = bias + the programs' partial outputs, in order."""
    import triton

    from .stream import sum_kernel

    total = y.numel()
    sum_kernel[(triton.cdiv(total, plans.SUM_COLUMNS),)](
        partial,
        call.bias,
        y,
        launch.programs,
        total,
        y.shape[-1],
        HAS_BIAS=call.bias is not None,
        BLOCK_P=triton.next_power_of_2(launch.programs),
        BLOCK_N=plans.SUM_COLUMNS,
        PDL=bool(launch.early),
        num_warps=plans.SUM_WARPS,
        **launch.early,
    )
