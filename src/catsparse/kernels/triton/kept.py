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

from .stream import _NEURON, _TOKEN_BIT, _activation, _dots, _row, _tokens


@triton.jit
def _listed(index, at, end, N: tl.constexpr):
    """Entries at .. at + N - 1 of a list that ends before ``end``."""
    entries = ()
    for j in tl.static_range(N):
        entries = entries + (tl.load(index + at + j, mask=at + j < end, other=0),)
    return entries


@triton.jit
def _rows(weight, stride, entries, at, end, cols, H, EVEN: tl.constexpr, N: tl.constexpr):
    rows = ()
    for j in tl.static_range(N):
        rows = rows + (_row(weight, entries[j] & _NEURON, stride, at + j < end, cols, H, EVEN),)
    return rows


@triton.jit
def kept_kernel(
    x,
    w_gate,
    w_up,
    w_down_t,
    product_threshold,
    mean,
    gate,
    kept,
    index,
    hidden,
    partial,
    T,
    H,
    I,
    H_OUT,
    gate_stride,
    up_stride,
    down_stride,
    ACT: tl.constexpr,
    PREVIEW: tl.constexpr,
    SECOND: tl.constexpr,
    PER_NEURON: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
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
    cols = tl.arange(0, BLOCK_H)
    xs = _tokens(x, T, cols, H, TOKENS)
    # The list of kept neurons, in order.
    end, start = first, first + pid * 0
    while start < last:
        neuron = start + tl.arange(0, BLOCK_L)
        bits = tl.load(kept + neuron, mask=neuron < last, other=0)
        listed = (bits != 0).to(tl.int32)
        place = end + tl.cumsum(listed, axis=0) - listed
        tl.store(index + place, neuron | (bits << _TOKEN_BIT), mask=bits != 0)
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
    tile = _rows(w_up, up_stride, using, at, end, cols, H, EVEN, EACH)
    if PREVIEW:
        tile = tile + _rows(w_gate, gate_stride, using, at, end, cols, H, EVEN, EACH)
    while at < end:
        following = _rows(w_up, up_stride, asked, at + EACH, end, cols, H, EVEN, EACH)
        if PREVIEW:
            following = following + _rows(
                w_gate, gate_stride, asked, at + EACH, end, cols, H, EVEN, EACH
            )
        later = _listed(index, at + 2 * EACH, end, EACH)
        dots = _dots(tile, xs, 2 * ROWS, TOKENS)
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
                    g = _activation(dots[(ROWS + j) * TOKENS + token], ACT)
                else:
                    g = tl.load(gate + token * I + neuron, mask=live, other=0.0)
                h = g * dots[j * TOKENS + token]
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
    tile = _rows(w_down_t, down_stride, using, at, left_end, cols, H_OUT, EVEN, BOTH)
    out = ()
    for _token in tl.static_range(TOKENS):
        out = out + (tl.zeros([BLOCK_H], tl.float32),)
    while at < left_end:
        following = _rows(
            w_down_t, down_stride, asked, at + BOTH, left_end, cols, H_OUT, EVEN, BOTH
        )
        later = _listed(left, at + 2 * BOTH, left_end, BOTH)
        for j in tl.static_range(BOTH):
            down = tile[j].to(tl.float32)
            new = ()
            for token in tl.static_range(TOKENS):
                h = tl.load(hidden + token * I + at + j, mask=at + j < left_end, other=0.0)
                new = new + (out[token] + down * h,)
            out = new
        tile, asked = following, later
        at += BOTH
    for token in tl.static_range(TOKENS):
        to = partial + (pid.to(tl.int64) * T + token) * H_OUT + cols
        tl.store(to, out[token], mask=(cols < H_OUT) & (token < T))
