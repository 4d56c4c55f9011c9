"""The Triton kernel of what was decided ahead: the exact rows of kept neurons (see decide.py).

Each program owns an equal slice of the neurons and lists those that any token keeps. It reads their
rows of W_up (and of W_gate, where a preview decided), computes h = g u, decides again if there is a
second decision, and only then reads rows of W_down^T, of what is left. Partial outputs are added in
a fixed order by ``sum_kernel``.

A tile is 2 ROWS rows. As in stream.py, the rows of the next tile are asked for before this one is
used, and the list is read one tile earlier still.
"""

# Triton's language has no types that a checker could use.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .rows import add_row, dots, load_row, load_tokens, no_rows, places, store_partial
from .stream import _NEURON, _TOKEN_BIT, _activation


@triton.jit
def _listed(index, at, end, N: tl.constexpr):
    """Entries at .. at + N - 1 of a list that ends before ``end``."""
    entries = ()
    for j in tl.static_range(N):
        entries = entries + (tl.load(index + at + j, mask=at + j < end, other=0),)
    return entries


@triton.jit
def _rows(
    matrix, entries, some, at, width, EVEN: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr
):
    """The rows of N entries, of which the first ``some`` are of the list."""
    rows = ()
    for j in tl.static_range(N):
        rows = rows + load_row(matrix, entries[j] & _NEURON, j < some, at, width, EVEN, FORMAT)
    return rows


@triton.jit
def kept_kernel(
    x,
    w_gate,
    w_up,
    w_down_t,
    product_threshold,
    mean,
    gate_scale,
    up_scale,
    down_scale,
    gate,
    kept,
    index,
    hidden,
    partial,
    T,
    H,
    I,
    H_OUT,
    WORDS_OUT,
    gate_stride,
    up_stride,
    down_stride,
    gate_scales,
    down_scales,
    ACT: tl.constexpr,
    PREVIEW: tl.constexpr,
    SECOND: tl.constexpr,
    PER_NEURON: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_L: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate (fp32 ``[TOKENS, I]``, unless a preview decided) and kept are of decide.py; index (int32
    ``[2, I]``) and hidden (fp32 ``[TOKENS, I]``) are work space."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    first = (pid.to(tl.int64) * I // programs).to(tl.int32)
    last = ((pid + 1).to(tl.int64) * I // programs).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = places(BLOCK, RUN, FORMAT)
    gates = (w_gate, gate_stride, gate_scale, gate_scales)
    up = (w_up, up_stride, up_scale, gate_scales)
    down = (w_down_t, down_stride, down_scale, down_scales)
    xs = load_tokens(x, T, place, H, TOKENS, FORMAT)
    # The list of kept neurons, in order.
    end, start = first, first + pid * 0
    while start < last:
        neuron = start + tl.arange(0, BLOCK_L)
        bits = tl.load(kept + neuron, mask=neuron < last, other=0)
        listed = (bits != 0).to(tl.int32)
        to = end + tl.cumsum(listed, axis=0) - listed
        tl.store(index + to, neuron | (bits << _TOKEN_BIT), mask=bits != 0)
        end += tl.sum(listed, axis=0)
        start += BLOCK_L
    tl.debug_barrier()  # it is read by other threads

    # Rows of W_up and, where they have not decided, of W_gate. `at` counts through the list.
    EACH: tl.constexpr = ROWS if PREVIEW else 2 * ROWS  # neurons of a tile
    left = index + I  # the list of what the second decision leaves
    limit = 0.0
    if SECOND and not PER_NEURON:
        limit = tl.load(product_threshold)
    at, left_end = first + pid * 0, first + pid * 0
    using = _listed(index, at, end, EACH)
    asked = _listed(index, at + EACH, end, EACH)
    tile = _rows(up, using, end - at, place, H, EVEN, EACH, FORMAT)
    if PREVIEW:
        tile = tile + _rows(gates, using, end - at, place, H, EVEN, EACH, FORMAT)
    while at < end:
        to_come = end - at - EACH
        following = _rows(up, asked, to_come, place, H, EVEN, EACH, FORMAT)
        if PREVIEW:
            following = following + _rows(gates, asked, to_come, place, H, EVEN, EACH, FORMAT)
        later = _listed(index, at + 2 * EACH, end, EACH)
        sums = dots(tile, xs, 2 * ROWS, TOKENS, FORMAT)
        for j in tl.static_range(EACH):
            neuron = using[j] & _NEURON
            live = at + j < end
            entry = neuron
            if SECOND and PER_NEURON:
                limit = tl.load(product_threshold + neuron, mask=live, other=0.0)
            if HAS_MEAN:
                m = tl.load(mean + neuron, mask=live, other=0.0)
            for token in tl.static_range(TOKENS):
                if PREVIEW:
                    g = _activation(sums[(ROWS + j) * TOKENS + token], ACT)
                else:
                    g = tl.load(gate + token * I + neuron, mask=live, other=0.0)
                h = g * sums[j * TOKENS + token]
                keep = live & (((using[j] >> (_TOKEN_BIT + token)) & 1) != 0)
                if SECOND:
                    keep = keep & (tl.abs(h) > limit)
                if HAS_MEAN:
                    h -= m
                entry |= keep.to(tl.int32) << (_TOKEN_BIT + token)
                tl.store(hidden + token * I + left_end, tl.where(keep, h, 0.0), mask=live)
            tl.store(left + left_end, neuron, mask=live)
            # What is dropped is overwritten by the next one.
            left_end += (entry > _NEURON).to(tl.int32)
        tile, using, asked = following, asked, later
        at += EACH
    tl.debug_barrier()

    # Rows of W_down^T.
    BOTH: tl.constexpr = 2 * ROWS
    at = first + pid * 0
    using = _listed(left, at, left_end, BOTH)
    asked = _listed(left, at + BOTH, left_end, BOTH)
    tile = _rows(down, using, left_end - at, place, H_OUT, EVEN, BOTH, FORMAT)
    out = no_rows(place, TOKENS, FORMAT)
    while at < left_end:
        to_come = left_end - at - BOTH
        following = _rows(down, asked, to_come, place, H_OUT, EVEN, BOTH, FORMAT)
        later = _listed(left, at + 2 * BOTH, left_end, BOTH)
        for j in tl.static_range(BOTH):
            hs = ()
            for token in tl.static_range(TOKENS):
                where = hidden + token * I + at + j
                hs = hs + (tl.load(where, mask=at + j < left_end, other=0.0),)
            out = add_row(out, tile, j, hs, TOKENS, FORMAT)
        tile, asked = following, later
        at += BOTH
    store_partial(partial, out, T, place, WORDS_OUT, TOKENS, FORMAT)
