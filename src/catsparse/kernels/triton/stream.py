"""The Triton kernels of ``catsparse::gated_mlp``: one stream of rows, then one small sum.

Each program owns an equal slice of the neurons. It reads its gate rows, decides in fp32, and reads
the up and down rows of the neurons it kept, with its share of the output in registers all along.
So nothing passes between programs but the partial outputs, which a second launch adds in a fixed
order: no atomics, no barrier over the grid, no global list, the same bits in every run.

A *tile* is two pieces of ROWS rows: gate rows and the gate rows after them, or the up and the down
rows of ROWS kept neurons. The rows of tile t + 1 are asked for before tile t is used, and the list
of kept neurons is read one tile earlier still, so the change from gate rows to kept rows leaves no
gap. What a row is depends on the format (rows.py); all else is scalar: no layout is ever converted
in the loop.
"""

# Triton's language has no types that a checker could use.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .rows import (
    add_row,
    column_of,
    dots,
    fields,
    load_row,
    load_tokens,
    no_rows,
    places,
    store_partial,
)

_TOKEN_BIT = tl.constexpr(24)  # of kept_index: the neuron below, above it one bit a token
_NEURON = tl.constexpr(2**24 - 1)


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == "silu":
        g = z / (1.0 + tl.exp(-z))
    elif ACT == "gelu_tanh":
        g = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACT == "gelu":
        g = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "relu")
        g = tl.where(z < 0.0, 0.0, z)  # not maximum, which hides NaN
    return g


@triton.jit
def _prefetch(weight, first, last, stride, THREADS: tl.constexpr, KB: tl.constexpr):
    """Ask L2 for the first KB kilobytes of rows first .. last. L2 is where all SMs agree, so this
    is safe before the previous kernel has ended, which a load would not be."""
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    begin = first.to(tl.int64) * stride
    size = (last - first).to(tl.int64) * stride
    for k in tl.static_range((KB * 8 + THREADS - 1) // THREADS):
        line = (k * THREADS + tl.arange(0, THREADS)).to(tl.int64) * (128 // SIZE)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [weight + begin + tl.minimum(line, size - 1)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def stream_kernel(
    x,
    w_gate,
    w_up,
    w_down_t,
    threshold,
    mean,
    gate_scale,
    up_scale,
    down_scale,
    kept_gate,
    kept_index,
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
    PER_NEURON: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH_KB: tl.constexpr,
    THREADS: tl.constexpr,
):
    """BLOCK and RUN are those of :func:`.rows.places`; strides count a row's elements or words, and
    ``gate_scales`` and ``down_scales`` are an int4 row's scales."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    first = (pid.to(tl.int64) * I // programs).to(tl.int32)
    last = ((pid + 1).to(tl.int64) * I // programs).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if PREFETCH_KB:
            _prefetch(w_gate, first, last, gate_stride, THREADS, PREFETCH_KB)
        tl.extra.cuda.gdc_wait()
    at = places(BLOCK, RUN, FORMAT)
    TILE: tl.constexpr = 2 * ROWS
    gate_tiles = (last - first + TILE - 1) // TILE
    gates = (w_gate, gate_stride, gate_scale, gate_scales)
    tile = ()
    for j in tl.static_range(TILE):
        tile = tile + load_row(gates, first + j, first + j < last, at, H, EVEN, FORMAT)
    # The next tile's list entries. Whatever moves from one name to another in the loop must not
    # begin as the same SSA value in both: Triton would take the later name for a constant.
    asked, asked_gate, asked_number = (), (), pid * 0
    using, using_gate, using_number = (), (), pid * 0
    for j in tl.static_range(ROWS):
        asked, using = asked + (pid * 0,), using + (pid * 0,)
    for j in tl.static_range(ROWS * TOKENS):
        asked_gate = asked_gate + ((pid * 0).to(tl.float32),)
        using_gate = using_gate + ((pid * 0).to(tl.float32),)
    xs = load_tokens(x, T, at, H, TOKENS, FORMAT)
    limit = 0.0
    if not PER_NEURON:
        limit = tl.load(threshold)
    out = no_rows(at, TOKENS, FORMAT)
    count, read, used, t = pid * 0, pid * 0, pid * 0, pid * 0
    while (t < gate_tiles) | (used < count):
        # Tile t + 1: ask for its rows.
        gating = t + 1 < gate_tiles
        after = first + (t + 1) * TILE
        following = ()
        for j in tl.static_range(TILE):
            index = tl.where(gating, after + j, asked[j % ROWS] & _NEURON)
            live = tl.where(gating, after + j < last, j % ROWS < asked_number)
            if j < ROWS:
                weight = tl.where(gating, w_gate, w_up)
                stride = tl.where(gating, gate_stride, up_stride)
                scale, scales, width = gate_scale, gate_scales, H
                if FORMAT != "float":
                    scale = tl.where(gating, gate_scale, up_scale)
            else:
                weight = tl.where(gating, w_gate, w_down_t)
                stride = tl.where(gating, gate_stride, down_stride)
                width = tl.where(gating, H, H_OUT)
                scale, scales = down_scale, down_scales
                if FORMAT != "float":
                    scale = tl.where(gating, gate_scale, down_scale)
                    scales = tl.where(gating, gate_scales, down_scales)
            matrix = (weight, stride, scale, scales)
            following = following + load_row(matrix, index, live, at, width, EVEN, FORMAT)
        # Tile t + 2: if its neurons are kept ones, read which.
        number = tl.where(t + 2 >= gate_tiles, tl.minimum(ROWS, count - read), 0)
        later = ()
        later_gate = ()
        for j in tl.static_range(ROWS):
            entry_at = first + read + j
            later = later + (tl.load(kept_index + entry_at, mask=j < number, other=0),)
            for token in tl.static_range(TOKENS):
                g = tl.load(kept_gate + token * I + entry_at, mask=j < number, other=0.0)
                later_gate = later_gate + (g,)
        read += number
        # Tile t: use it.
        if t < gate_tiles:
            z = dots(tile, xs, TILE, TOKENS, FORMAT)
            for j in tl.static_range(TILE):
                neuron = first + t * TILE + j
                if PER_NEURON:
                    limit = tl.load(threshold + neuron, mask=neuron < last, other=0.0)
                entry = neuron
                for token in tl.static_range(TOKENS):
                    g = _activation(z[j * TOKENS + token], ACT)
                    keep = (tl.abs(g) > limit) & (neuron < last) & (token < T)
                    entry |= keep.to(tl.int32) << (_TOKEN_BIT + token)
                    tl.store(
                        kept_gate + token * I + first + count,
                        tl.where(keep, g, 0.0),
                        mask=neuron < last,
                    )
                tl.store(kept_index + first + count, entry, mask=neuron < last)
                # A dropped neuron's entry is overwritten by the next one's.
                count += (entry > _NEURON).to(tl.int32)
            tl.debug_barrier()  # the list is read by other threads in later turns
        else:
            u = dots(tile, xs, ROWS, TOKENS, FORMAT)
            for j in tl.static_range(ROWS):
                if HAS_MEAN:
                    neuron = using[j] & _NEURON
                    m = tl.load(mean + neuron, mask=j < using_number, other=0.0)
                hs = ()
                for token in tl.static_range(TOKENS):
                    h = using_gate[j * TOKENS + token] * u[j * TOKENS + token]
                    if HAS_MEAN:
                        h -= m
                    if TOKENS > 1:  # of those that drop it, too, u may be infinite
                        kept = (using[j] >> (_TOKEN_BIT + token)) & 1
                        h = tl.where(kept != 0, h, 0.0)
                    hs = hs + (h,)
                out = add_row(out, tile, ROWS + j, hs, TOKENS, FORMAT)
            used += using_number
        tile = following
        using, using_gate, using_number = asked, asked_gate, asked_number
        asked, asked_gate, asked_number = later, later_gate, number
        t += 1
    store_partial(partial, out, T, at, WORDS_OUT, TOKENS, FORMAT)


@triton.jit
def sum_kernel(
    partial,
    bias,
    y,
    P,
    N,
    H_OUT,
    WORDS_OUT,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_P)
    mask = (rows < P)[:, None] & (at < N)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # One piece: every load is under way before the first is needed.
    total = tl.sum(tl.load(partial + rows[:, None] * N + at[None, :], mask=mask, other=0.0), axis=0)
    FIELDS: tl.constexpr = fields(FORMAT)
    line = at // WORDS_OUT
    column = column_of(at % WORDS_OUT, line % FIELDS, FORMAT)
    mask = (at < N) & (column < H_OUT)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=mask, other=0.0)
    to = y + line // FIELDS * H_OUT + column
    tl.store(to, total.to(y.dtype.element_ty), mask=mask)
