"""The Triton kernels of a decision ahead of the exact rows: by a preview, or by W_gate itself.

A program owns a few neurons, reads their rows in pieces, and keeps its sums in registers until the
end; so there is nothing between programs, and the order of every sum is fixed. What comes out is an
``int32`` a neuron: bit t is whether token t keeps it.

A preview (preview.py) is read as words of 32 bits. Field k of a word, 4 or 8 bits, meets the word's
place in row k of the inputs, which are laid out in that order beforehand: no bit moves from its
lane. A field becomes a float without a conversion: put into the mantissa of a float in which its
place is worth 1.
"""

# Triton's language has no types that a checker could use.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .rows import _RUN_WORDS, _RUNS, column_of, decode, field, fields, load_words, swapped
from .stream import _activation


@triton.jit
def _foretold(
    x,
    preview,
    scale,
    row,
    live,
    SCALES,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Dot products of rows ``[BLOCK_N]`` of a preview with each token."""
    FIELDS: tl.constexpr = 32 // BITS
    GROUP_WORDS: tl.constexpr = 2 * BITS
    WORDS: tl.constexpr = GROUPS * GROUP_WORDS
    WHOLE: tl.constexpr = WORDS // (_RUN_WORDS * _RUNS) * (_RUN_WORDS * _RUNS)
    line = preview + row.to(tl.int64)[:, None] * WORDS
    sums = ()
    for _token in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_W], tl.float32),)
    for start in range(0, WORDS, BLOCK_W):
        word = start + tl.arange(0, BLOCK_W)
        inside = word < WORDS
        mask = live[:, None] & inside[None, :]
        at = swapped(word[None, :], row[:, None], WHOLE, GROUP_WORDS)
        packed = tl.load(line + at, mask=mask, other=0, eviction_policy="evict_first")
        group = row.to(tl.int64)[:, None] * SCALES + (word // GROUP_WORDS)[None, :]
        worth = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
        parts = ()
        for _token in tl.static_range(TOKENS):
            parts = parts + (tl.zeros([BLOCK_N, BLOCK_W], tl.float32),)
        for k in tl.static_range(FIELDS):
            weight = field(packed, k, BITS)
            added = ()
            for token in tl.static_range(TOKENS):
                from_ = x + (token * FIELDS + k) * WORDS + word
                value = tl.load(from_, mask=inside, other=0.0)
                added = added + (parts[token] + weight * value[None, :],)
            parts = added
        scaled = ()
        for token in tl.static_range(TOKENS):
            scaled = scaled + (sums[token] + parts[token] * worth,)
        sums = scaled
    dots = ()
    for token in tl.static_range(TOKENS):
        dots = dots + (tl.sum(sums[token], axis=1),)
    return dots


@triton.jit
def _keep(kept, values, threshold, neuron, live, T, PER_NEURON: tl.constexpr, TOKENS: tl.constexpr):
    if PER_NEURON:
        limit = tl.load(threshold + neuron, mask=live, other=0.0)
    else:
        limit = tl.load(threshold)
    bits = neuron * 0
    for token in tl.static_range(TOKENS):
        keep = (tl.abs(values[token]) > limit) & (token < T)
        bits |= keep.to(tl.int32) << token
    tl.store(kept + neuron, bits, mask=live)


@triton.jit
def preview_kernel(
    x,
    preview,
    scale,
    threshold,
    gate,
    kept,
    T,
    I,
    SCALES,
    ACT: tl.constexpr,
    PER_NEURON: tl.constexpr,
    PRODUCTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):
    """x is fp32 ``[TOKENS, FIELDS, words of a row]``, zeros for what a last group has too many. Of
    int4 weights, whose W_gate is read here, gate gets the activation, fp32 ``[TOKENS, I]``."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    neuron = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = neuron < I
    z = _foretold(x, preview, scale, neuron, live, SCALES, GROUPS, BITS, TOKENS, BLOCK_N, BLOCK_W)
    values = ()
    for token in tl.static_range(TOKENS):
        values = values + (_activation(z[token], ACT),)
        if gate is not None:
            tl.store(gate + token * I + neuron, values[token], mask=live)
    if PRODUCTS:
        u = _foretold(
            x, preview, scale, neuron + I, live, SCALES, GROUPS, BITS, TOKENS, BLOCK_N, BLOCK_W
        )
        products = ()
        for token in tl.static_range(TOKENS):
            products = products + (values[token] * u[token],)
        values = products
    _keep(kept, values, threshold, neuron, live, T, PER_NEURON, TOKENS)


@triton.jit
def gate_kernel(
    x,
    w_gate,
    scale,
    threshold,
    gate,
    kept,
    T,
    I,
    stride,
    ACT: tl.constexpr,
    PER_NEURON: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Where W_gate itself decides and a second decision follows; gate is fp32 ``[TOKENS, I]``."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    neuron = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = neuron < I
    line = w_gate + neuron.to(tl.int64)[:, None] * stride
    if FORMAT != "float":
        worth = tl.load(scale + neuron, mask=live, other=0.0)
    sums = ()
    for _token in tl.static_range(TOKENS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
    FIELDS: tl.constexpr = fields(FORMAT)
    WIDTH: tl.constexpr = (H + FIELDS - 1) // FIELDS
    for start in range(0, WIDTH, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        mask = live[:, None] & (at < WIDTH)[None, :]
        if FORMAT == "float":
            row = tl.load(line + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        else:
            row = load_words(line, at[None, :], H, mask)
        for k in tl.static_range(FIELDS):
            number = decode(row, k, FORMAT)
            col = column_of(at, k, FORMAT)
            added = ()
            for token in tl.static_range(TOKENS):
                value = tl.load(x + token * H + col, mask=(col < H) & (token < T), other=0.0)
                added = added + (sums[token] + number * value.to(tl.float32)[None, :],)
            sums = added
    values = ()
    for token in tl.static_range(TOKENS):
        z = tl.sum(sums[token], axis=1)
        if FORMAT != "float":
            z = z * worth
        values = values + (_activation(z, ACT),)
        tl.store(gate + token * I + neuron, values[token], mask=live)
    _keep(kept, values, threshold, neuron, live, T, PER_NEURON, TOKENS)
