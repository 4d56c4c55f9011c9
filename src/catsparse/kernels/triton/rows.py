"""Rows of weights of every format, in registers: asked for, times the tokens, added to the output.

``FORMAT`` is ``float`` or one of formats.py. A row of floats is a tensor of its elements, a packed
one of words of 32 bits with 4 or, of ``int4``, 8 fields. Behind a packed row comes what its numbers
are worth: of int8 and fp8 a scalar, of int4 one number a run of words. Both are asked for together,
ahead of their use. Numbers become fp32 in registers, exactly, and scales stay outside: one product
for a row's dot, for the factor of a row that is added, for the words of an int4 group.

Tokens and outputs are tuples of tensors shaped as a row is, fields first: field k of a row meets
tensor ``k * TOKENS + token``. So no number of a row ever leaves its thread.
"""

# Triton's language has no types that a checker could use.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from . import plans

_RUN_WORDS = tl.constexpr(16)  # of preview.py's RUN, and its BLOCK
_RUNS = tl.constexpr(4)
_BLOCK_COLUMNS = tl.constexpr(512)  # of int4, in a block
_SIGNS = tl.constexpr(0x80808080 - 2**32)  # as an int32
_PLACES = tl.constexpr(0x87F00000 - 2**32)


fields = triton.constexpr_function(plans.fields)


@triton.jit
def field(words, K: tl.constexpr, BITS: tl.constexpr):
    """n - 2^(BITS - 1) of field K of words of 32 bits, exactly."""
    FIT: tl.constexpr = 23 // BITS
    PLACE: tl.constexpr = K % FIT * BITS
    SHIFT: tl.constexpr = K // FIT * FIT * BITS
    MASK: tl.constexpr = (2**BITS - 1) << PLACE
    BASE: tl.constexpr = (127 + 23 - PLACE) << 23
    ZERO: tl.constexpr = 2.0 ** (23 - PLACE) + 2.0 ** (BITS - 1)
    return (((words >> SHIFT) & MASK) | BASE).to(tl.float32, bitcast=True) - ZERO


@triton.jit
def swapped(word, row, whole, RUN: tl.constexpr):
    """Where words of rows lie: among the first ``whole`` of a row runs have changed places.

    RUN words, no more than are in such a run, stay in order: what Triton cannot see, and must be
    told here, as it forgets what is said of a function's result.
    """
    place = tl.where(word < whole, word ^ (row % _RUNS * _RUN_WORDS), word)
    return tl.max_contiguous(tl.multiple_of(place, (1, RUN)), (1, RUN))


@triton.jit
def column_of(word, k, FORMAT: tl.constexpr):
    """The column that field k of a word belongs to."""
    if FORMAT == "int4":
        column = word // 8 * 64 + k % 2 * 32 + word % 8 * 4 + k // 2
    elif FORMAT == "float":
        column = word
    else:
        column = word * 4 + k
    return column


@triton.jit
def decode(row, K: tl.constexpr, FORMAT: tl.constexpr):
    """Field K as fp32, of fp8 (e4m3fn) by its bits: not every GPU converts it."""
    if FORMAT == "int8":
        number = field(row ^ _SIGNS, K, 8)
    elif FORMAT == "fp8":
        # Sign, exponent and mantissa, put where fp32 has them; 2^120 is the distance of the biases.
        bits = ((row << (24 - 8 * K)) >> 4) & _PLACES
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        number = tl.where(tl.abs(value) > 448.0, float("nan"), value)
    elif FORMAT == "int4":
        number = field(row, K, 4)
    else:
        number = row.to(tl.float32)
    return number


@triton.jit
def places(BLOCK: tl.constexpr, RUN: tl.constexpr, FORMAT: tl.constexpr):
    """The indices of a row's elements or, ``[, RUN]``, of its words, a run in one thread."""
    if FORMAT != "float":
        at = tl.arange(0, BLOCK // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    else:
        at = tl.arange(0, BLOCK)
    return at


@triton.jit
def load_words(line, at, width, mask):
    """Words of int8 or fp8; by bytes where rows are not whole words, or lie across them."""
    if line.dtype.element_ty == tl.int32:
        words = tl.load(line + at, mask=mask, other=0, eviction_policy="evict_first")
    else:
        words = at * 0
        for k in tl.static_range(4):
            byte = tl.load(line + at * 4 + k, mask=mask & (at * 4 + k < width), other=0)
            words = words | (byte.to(tl.int32) << (8 * k))
    return words


@triton.jit
def load_row(matrix, row, live, at, width, EVEN: tl.constexpr, FORMAT: tl.constexpr):
    """One row and what it is worth; if it is not live, zeros, and nothing is read.

    A matrix is (data, stride of its rows, scales, stride of those of int4), and at is of
    :func:`places`.
    """
    weight, stride, scale, scale_stride = matrix
    FIELDS: tl.constexpr = fields(FORMAT)
    line = weight + row.to(tl.int64) * stride
    mask = live
    if not EVEN:
        mask = live & (at < (width + FIELDS - 1) // FIELDS)
    if FORMAT == "float":
        loaded = (tl.load(line + at, mask=mask, other=0.0, eviction_policy="evict_first"),)
    elif FORMAT == "int4":
        RUNS: tl.constexpr = at.shape[0]
        RUN: tl.constexpr = at.shape[1]
        place = swapped(at, row, width // _BLOCK_COLUMNS * (_RUN_WORDS * _RUNS), RUN)
        words = tl.load(line + place, mask=mask, other=0, eviction_policy="evict_first")
        group = (tl.arange(0, RUNS) * RUN // 8)[:, None]
        worth = scale + row.to(tl.int64) * scale_stride + group
        loaded = (words, tl.load(worth, mask=live & (group < width // 64), other=0.0))
    else:
        words = load_words(line, at, width, mask)
        loaded = (words, tl.load(scale + row, mask=live, other=0.0))
    return loaded


@triton.jit
def load_tokens(x, T, at, H, TOKENS: tl.constexpr, FORMAT: tl.constexpr):
    xs = ()
    for k in tl.static_range(fields(FORMAT)):
        col = column_of(at, k, FORMAT)
        for token in tl.static_range(TOKENS):
            row = tl.load(x + token * H + col, mask=(col < H) & (token < T), other=0.0)
            xs = xs + (row.to(tl.float32),)
    return xs


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def dots(rows, xs, N: tl.constexpr, TOKENS: tl.constexpr, FORMAT: tl.constexpr):
    """Dot products of N rows with each token, token fastest; one pair of barriers for them all."""
    PARTS: tl.constexpr = 1 if FORMAT == "float" else 2
    products = ()
    for j in tl.static_range(N):
        sums = ()
        for k in tl.static_range(fields(FORMAT)):
            number = decode(rows[PARTS * j], k, FORMAT)
            added = ()
            for token in tl.static_range(TOKENS):
                product = number * xs[k * TOKENS + token]
                if k > 0:
                    product += sums[token]
                added = added + (product,)
            sums = added
        for token in tl.static_range(TOKENS):
            product = sums[token]
            if FORMAT == "int4":
                product = product * rows[PARTS * j + 1].to(tl.float32)
            if FORMAT != "float":
                product = tl.sum(product, axis=1)  # within a thread
            products = products + (product,)
    if N * TOKENS == 1:
        sums = (tl.sum(products[0], axis=0),)
    elif N * TOKENS == 2:
        sums = tl.reduce(products, 0, _add2)
    elif N * TOKENS == 4:
        sums = tl.reduce(products, 0, _add4)
    else:
        tl.static_assert(N * TOKENS == 8)
        sums = tl.reduce(products, 0, _add8)
    if FORMAT == "int8" or FORMAT == "fp8":
        scaled = ()
        for i in tl.static_range(N * TOKENS):
            scaled = scaled + (sums[i] * rows[PARTS * (i // TOKENS) + 1],)
        sums = scaled
    return sums


@triton.jit
def no_rows(at, TOKENS: tl.constexpr, FORMAT: tl.constexpr):
    out = ()
    for _i in tl.static_range(fields(FORMAT) * TOKENS):
        out = out + (tl.zeros(at.shape, tl.float32),)
    return out


@triton.jit
def add_row(out, rows, J: tl.constexpr, h, TOKENS: tl.constexpr, FORMAT: tl.constexpr):
    """out + h times row J of ``rows``, of each token."""
    PARTS: tl.constexpr = 1 if FORMAT == "float" else 2
    factors = ()
    for token in tl.static_range(TOKENS):
        factor = h[token]
        if FORMAT != "float":
            factor = factor * rows[PARTS * J + 1].to(tl.float32)
        factors = factors + (factor,)
    new = ()
    for k in tl.static_range(fields(FORMAT)):
        number = decode(rows[PARTS * J], k, FORMAT)
        for token in tl.static_range(TOKENS):
            new = new + (out[k * TOKENS + token] + number * factors[token],)
    return new


@triton.jit
def store_partial(partial, out, T, at, width, TOKENS: tl.constexpr, FORMAT: tl.constexpr):
    """This program's share of the output, by fields of ``width`` words: see sum_kernel."""
    FIELDS: tl.constexpr = fields(FORMAT)
    for k in tl.static_range(FIELDS):
        for token in tl.static_range(TOKENS):
            line = (tl.program_id(0).to(tl.int64) * T + token) * FIELDS + k
            to = partial + line * width + at
            tl.store(to, out[k * TOKENS + token], mask=(at < width) & (token < T))
