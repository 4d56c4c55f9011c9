"""The launches of a call: the stream, or a decision and then the kept rows; and the sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import Call
from ..preview import GROUP, groups_of, preview_bits
from . import plans
from .plans import Launch


def raw_weights(call: Call) -> list[Tensor]:
    """W_gate, W_up and W_down^T as the kernels read them: packed ones by words, or, of int8 and
    fp8, by bytes where rows are not whole words or lie across them."""
    weights = [call.w_gate, call.w_up, call.w_down_t]
    if call.weights is None:
        return weights
    raw = [w.view(torch.uint8) for w in weights]
    whole = all(
        part % 4 == 0
        for w in raw
        for part in (w.data_ptr(), w.storage_offset(), w.shape[1], w.stride(0))
    )
    return [w.view(torch.int32) for w in raw] if whole else raw


def scale_strides(call: Call) -> tuple[int, int]:
    """Scales of an int4 row of W_gate or W_up, and of W_down^T; else unused."""
    if call.weights != "int4" or call.gate_scale is None or call.down_scale is None:
        return 0, 0
    return call.gate_scale.stride(0), call.down_scale.stride(0)


def run_stream(call: Call, launch: Launch, partial: Tensor) -> None:
    """Gate, decision, up and down in one launch."""
    from .stream import stream_kernel

    x, threshold, mean = call.x, call.threshold, call.mean
    neurons, hidden, columns = call.w_gate.shape[0], x.shape[-1], call.columns
    weights = raw_weights(call)
    stream_kernel[(launch.programs,)](
        x,
        *weights,
        threshold,
        mean,
        *(call.gate_scale, call.up_scale, call.down_scale),
        torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device),
        torch.empty(neurons, dtype=torch.int32, device=x.device),
        partial,
        x.numel() // hidden,
        hidden,
        neurons,
        columns,
        launch.words(columns),
        *(w.stride(0) for w in weights),
        *scale_strides(call),
        ACT=call.act,
        PER_NEURON=threshold.dim() == 1,
        HAS_MEAN=mean is not None,
        TOKENS=launch.padded,
        **launch.shape,
        EVEN=launch.block == hidden == columns,
        ROWS=launch.plan.rows,
        PDL=bool(launch.early),
        PREFETCH_KB=plans.PREFETCH_KB,
        THREADS=launch.plan.warps * 32,
        **launch.options,
    )


def decide(call: Call, launch: Launch) -> tuple[Tensor, Tensor | None]:
    """The tokens that keep each neuron, a bit each, int32 ``[I]``; and the gate, fp32
    ``[padded tokens, I]``, unless a preview decided.

    W_gate in int4 is read as a preview is, for it is one.
    """
    import triton

    from .decide import gate_kernel, preview_kernel

    x, threshold = call.x, call.threshold
    neurons, hidden = call.w_gate.shape[0], x.shape[-1]
    kept = torch.empty(neurons, dtype=torch.int32, device=x.device)
    shared = {
        "ACT": call.act,
        "PER_NEURON": threshold.dim() == 1,
        "TOKENS": launch.padded,
        "PDL": bool(launch.early),
        "num_warps": plans.DECIDE_WARPS,
        **launch.early,
    }
    gate: Tensor | None = None
    if call.preview is None:
        gate = torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device)
    preview, scale = call.preview, call.preview_scale
    if preview is None and call.weights == "int4":
        preview, scale = call.w_gate, call.gate_scale
    if preview is not None and scale is not None:
        bits = preview_bits(preview, hidden)
        groups = groups_of(hidden)
        rows = plans.preview_rows(launch.padded)
        preview_kernel[(triton.cdiv(neurons, rows),)](
            lay_out(x, bits, launch.padded),
            preview.view(torch.int32),
            scale,
            threshold,
            gate,
            kept,
            x.numel() // hidden,
            neurons,
            scale.shape[1],
            GROUPS=groups,
            PRODUCTS=call.previews_products,
            BITS=bits,
            BLOCK_N=rows,
            BLOCK_W=min(plans.WORDS, max(16, triton.next_power_of_2(groups * 2 * bits))),
            **shared,
        )
        return kept, gate
    w_gate = raw_weights(call)[0]
    gate_kernel[(triton.cdiv(neurons, plans.GATE_ROWS),)](
        x,
        w_gate,
        call.gate_scale,
        threshold,
        gate,
        kept,
        x.numel() // hidden,
        neurons,
        w_gate.stride(0),
        H=hidden,
        FORMAT=launch.weights,
        BLOCK_N=plans.GATE_ROWS,
        BLOCK_K=min(plans.GATE_COLUMNS, max(16, triton.next_power_of_2(hidden)))
        // plans.fields(launch.weights),
        **shared,
    )
    return kept, gate


def read_kept(
    call: Call, launch: Launch, kept: Tensor, gate: Tensor | None, partial: Tensor
) -> None:
    """The exact rows of what :func:`decide` kept, and the second decision."""
    import triton

    from .kept import kept_kernel

    x, mean, product = call.x, call.mean, call.product_threshold
    neurons, hidden, columns = call.w_gate.shape[0], x.shape[-1], call.columns
    weights = raw_weights(call)
    share = triton.cdiv(neurons, launch.programs)
    kept_kernel[(launch.programs,)](
        x,
        *weights,
        product,
        mean,
        *(call.gate_scale, call.up_scale, call.down_scale),
        gate,
        kept,
        torch.empty(2, neurons, dtype=torch.int32, device=x.device),
        torch.empty(launch.padded, neurons, dtype=torch.float32, device=x.device),
        partial,
        x.numel() // hidden,
        hidden,
        neurons,
        columns,
        launch.words(columns),
        *(w.stride(0) for w in weights),
        *scale_strides(call),
        ACT=call.act,
        PREVIEW=gate is None,
        SECOND=product is not None,
        PER_NEURON=product is not None and product.dim() == 1,
        HAS_MEAN=mean is not None,
        TOKENS=launch.padded,
        **launch.shape,
        BLOCK_L=min(plans.LIST_BLOCK, triton.next_power_of_2(share)),
        EVEN=launch.block == hidden == columns,
        ROWS=plans.kept_rows(launch.plan, x.dtype, call.weights),
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

    total = partial.shape[1]
    sum_kernel[(triton.cdiv(total, plans.SUM_COLUMNS),)](
        partial,
        call.bias,
        y,
        launch.programs,
        total,
        call.columns,
        launch.words(call.columns),
        HAS_BIAS=call.bias is not None,
        FORMAT=launch.weights,
        BLOCK_P=triton.next_power_of_2(launch.programs),
        BLOCK_N=plans.SUM_COLUMNS,
        PDL=bool(launch.early),
        num_warps=plans.SUM_WARPS,
        **launch.early,
    )
