"""Cases of ``catsparse::gated_mlp`` with their truth: loops in fp64 written from the formula.

Needs nothing of catsparse, so that a subprocess can use it without waiting for transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


BY_HAND: dict[str, Callable[[float], float]] = {
    "silu": lambda z: z * _sigmoid(z),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        z * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "relu": lambda z: max(z, 0.0),
}


class Case:
    """Random weights and tokens; thresholds lie in gaps of |g|, so no rounding flips a decision.

    With ``quantize`` (make_preview), |g| is that of the preview, of so many bits; with ``products``
    |g u| is, of a preview of both weights.
    """

    def __init__(
        self,
        hidden: int,
        neurons: int,
        tokens: int,
        act: str = "silu",
        dtype: torch.dtype = torch.float32,
        per_neuron: bool = False,
        compensated: bool = False,
        seed: int = 0,
        columns: int = 0,
        quantize: Callable[..., tuple[Tensor, Tensor]] | None = None,
        bits: int = 4,
        second: bool = False,
        products: bool = False,
        pack: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.act, self.dtype = act, dtype
        self.x = normal(tokens, hidden)
        self.w_gate = normal(neurons, hidden) / hidden**0.5
        self.w_up = normal(neurons, hidden) / hidden**0.5
        self.w_down_t = normal(neurons, columns or hidden) / neurons**0.5
        self.packed: tuple[Tensor, ...] = ()
        self.scales: tuple[Tensor, ...] = ()
        if pack is not None:
            weights = (self.w_gate, self.w_up, self.w_down_t)
            self.packed, self.scales = zip(*map(pack, weights), strict=True)
            pairs = zip(self.packed, self.scales, strict=True)
            self.w_gate, self.w_up, self.w_down_t = (unpacked(*pair) for pair in pairs)
        self.mean = 0.1 * normal(neurons).float() if compensated else None
        self.bias = None if self.mean is None else self.mean @ self.w_down_t.float()
        self.bits = bits
        self.products, up = products, self.w_up if products else None
        self.preview = quantize(self.w_gate, bits, up) if quantize else None
        self.threshold = _thresholds(abs(self.deciding_by_hand()), per_neuron, 2)
        self.product_threshold: Tensor | None = None
        if second:
            h = self.gate_by_hand() * (self.x.double() @ self.w_up.double().T).numpy()
            self.product_threshold = _thresholds(abs(h), per_neuron, 3)

    def gate_by_hand(self, weight: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        w_gate = self.w_gate.double().numpy() if weight is None else weight
        z = self.x.double().numpy() @ w_gate.T
        g: NDArray[np.float64] = np.vectorize(BY_HAND[self.act], otypes=[float])(z)
        return g

    def deciding_by_hand(self) -> NDArray[np.float64]:
        """The activated gate or, if there is one, its preview, or the product's."""
        if self.preview is None:
            return self.gate_by_hand()
        weights = _unpacked_groups(*self.preview, self.x.shape[1], self.bits)
        neurons = len(self.w_gate)
        g = self.gate_by_hand(weights[:neurons])
        return g * (self.x.double().numpy() @ weights[neurons:].T) if self.products else g

    def by_hand(self) -> NDArray[np.float64]:
        """y = sum over kept i of (g_i u_i - mean_i) w_i + bias, one term at a time."""
        x, w_up, w_down = (t.double().numpy() for t in (self.x, self.w_up, self.w_down_t))
        g, deciding = self.gate_by_hand(), self.deciding_by_hand()
        threshold = self.threshold.double().expand(len(w_up)).numpy()
        limit = torch.tensor(-1.0) if self.product_threshold is None else self.product_threshold
        product_threshold = limit.double().expand(len(w_up)).numpy()
        y = np.zeros((len(x), w_down.shape[1]))
        for t in range(len(x)):
            if self.bias is not None:
                y[t] += self.bias.double().numpy()
            for i in range(len(w_up)):
                h = g[t, i] * (w_up[i] @ x[t])
                if abs(deciding[t, i]) > threshold[i] and abs(h) > product_threshold[i]:
                    y[t] += (h - (0.0 if self.mean is None else float(self.mean[i]))) * w_down[i]
        return y

    @property
    def arguments(self) -> tuple[Any, ...]:
        weights = self.packed or (self.w_gate, self.w_up, self.w_down_t)
        plain = (self.x, *weights, self.threshold, self.act, self.mean, self.bias)
        if self.packed:
            extra = (self.product_threshold, *(self.preview or (None, None)))
            return (*plain, *extra, *self.scales)
        if self.preview is None and self.product_threshold is None:
            return plain
        return (*plain, self.product_threshold, *(self.preview or (None, None)))

    def check(self, y: Tensor, tolerance: float | None = None) -> None:
        expected = torch.from_numpy(self.by_hand())
        assert y.shape == expected.shape
        assert y.dtype == self.dtype
        scale = float(expected.abs().max()) + 1e-6
        error = float((y.double() - expected).abs().max()) / scale
        assert error < (tolerance or TOLERANCE[self.dtype])


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """A matrix of weights in a format, ``[R, C]`` in fp64."""
    if packed.dtype == torch.uint8:
        return torch.from_numpy(_unpacked_groups(packed, scale, 2 * packed.shape[1], 4))
    if packed.dtype == torch.int8:
        return packed.double() * scale.double()[:, None]
    bits = packed.view(torch.uint8).numpy().astype(int)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = (8 + mantissa) / 8 * 2.0 ** (exponent - 7)
    size = np.where(exponent > 0, normal, mantissa / 8 * 2.0**-6)
    size = np.where((bits & 127) == 127, np.nan, size)
    return torch.from_numpy(np.where(bits > 127, -size, size)) * scale.double()[:, None]


def _unpacked_groups(
    codes: Tensor, scales: Tensor, columns: int, width: int
) -> NDArray[np.float64]:
    """A preview, or a matrix in int4: ``width`` bits a weight."""
    packed, scale = codes.numpy(), scales.double().numpy()
    rows, inputs = np.arange(len(packed))[:, None], np.arange(columns)
    group, place = inputs // 64, inputs % 64
    at = inputs if width == 8 else 32 * group + place % 32
    whole = at < packed.shape[1] // 256 * 256  # runs of 64 bytes, swapped in whole fours
    n = packed[rows, np.where(whole, at ^ rows % 4 * 64, at)]
    if width == 4:
        n = np.where(place < 32, n % 16, n // 16)
    weights: NDArray[np.float64] = scale[:, group] * (n - 2.0 ** (width - 1))
    return weights


def _thresholds(magnitudes: NDArray[np.float64], per_neuron: bool, period: int) -> Tensor:
    cut: Any = _gap(magnitudes.ravel())
    if per_neuron and len(magnitudes) > 1:
        cut = [_gap(m) for m in magnitudes.T]
    elif per_neuron:  # drops every second, or third, neuron, and what rounding could decide
        cut = [
            m * 0.9 if i % period and m > 0.01 else m * 1.1 + 0.01
            for i, m in enumerate(magnitudes[0])
        ]
    return torch.tensor(cut, dtype=torch.float32)


def _gap(values: NDArray[np.float64]) -> float:
    """The middle of the widest gap, in ratio, among the middle half of the values."""
    ordered = np.sort(values)
    middle = ordered[len(ordered) // 4 : max(len(ordered) * 3 // 4 + 1, len(ordered) // 4 + 2)]
    if len(middle) < 2:
        return float(values[0] * 0.9)
    at = int(np.argmax(middle[1:] / (middle[:-1] + 1e-3)))
    return float((middle[at] + middle[at + 1]) / 2)


# The kernel sums in fp32 whatever the weights are: rounding the result is nearly all of its error.
KERNEL_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}

# Hidden size, neurons, columns of the result, tokens: either side of every vector, block and tile.
ODD_SIZES = [
    (1, 1, 1, 1),
    (1, 300, 1, 1),
    (300, 1, 3, 1),
    (3, 5, 300, 1),
    (16, 32, 64, 1),
    (31, 33, 15, 1),
    (129, 127, 129, 1),
    (257, 255, 65, 1),
    (1, 1, 1, 3),
    (7, 300, 9, 3),
    (17, 63, 31, 3),
    (130, 65, 683, 3),  # one more than a tile of three tokens
    (1, 2, 5, 16),
    (33, 31, 127, 16),
    (15, 97, 129, 16),
]


def odd_cases(dtype: torch.dtype) -> Iterator[Case]:
    """A case of every size, each with another activation, kind of threshold and compensation."""
    for seed, (hidden, neurons, columns, tokens) in enumerate(ODD_SIZES):
        act = list(BY_HAND)[seed % 4]
        per_neuron, compensated = seed % 2 == 0, seed % 3 == 0
        yield Case(hidden, neurons, tokens, act, dtype, per_neuron, compensated, seed, columns)


# Hidden size, neurons, columns, tokens: either side of a group, of a chunk, and of whole scales.
PREVIEW_SIZES = [
    (1, 1, 1, 1),
    (7, 33, 9, 1),
    (63, 31, 65, 2),
    (64, 5, 64, 4),
    (65, 37, 3, 5),
    (130, 65, 130, 16),
    (200, 3, 17, 3),
    (513, 9, 40, 1),
    (1100, 6, 11, 6),
]


def preview_cases(dtype: torch.dtype, quantize: Any) -> Iterator[Case]:
    """A case of every size in 4 and 8 bits, of the gate and of products, two of three with a second
    decision."""
    for seed, (hidden, neurons, columns, tokens) in enumerate(PREVIEW_SIZES):
        act = list(BY_HAND)[seed % 4]
        for bits in (4, 8):
            rest = (bits % 8 == 0, seed % 2 == 0, seed, columns, quantize, bits, seed % 3 > 0)
            for products in (False, True):
                yield Case(hidden, neurons, tokens, act, dtype, *rest, products)


def by_rows(w_down_t: Tensor) -> Tensor:
    """Rows of w_down_t contiguous, in a storage that holds nothing else."""
    return w_down_t.clone(memory_format=torch.contiguous_format)


def by_columns(w_down_t: Tensor) -> Tensor:
    """The same as a view of w_down, as nn.Linear holds it."""
    return by_rows(w_down_t.t()).t()


def check_layouts(case: Case, op: Callable[..., Tensor]) -> None:
    """Run ``op`` on both layouts of w_down_t; both must be right."""
    x, w_gate, w_up, w_down_t, *rest = case.arguments
    for layout in (by_rows, by_columns):
        case.check(op(x, w_gate, w_up, layout(w_down_t), *rest), KERNEL_TOLERANCE[case.dtype])


# Conversions, bit by bit

DROP, KEEP = 3e38, -1.0  # thresholds


def every_pattern(dtype: torch.dtype) -> Tensor:
    """``[65536]``: each value of a dtype of 16 bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN."""
    finite = one.isfinite() | one.isinf()
    alike = torch.equal(one.isnan(), other.isnan()) and torch.equal(one[finite], other[finite])
    return one.dtype == other.dtype and alike


def check_reading(dtype: torch.dtype, op: Callable[..., Tensor]) -> None:
    """Every value as a weight: with one neuron kept, gate and up 1, y is its row of w_down_t."""
    row = every_pattern(dtype)
    one, x = torch.ones(2, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)
    threshold = torch.tensor([KEEP, DROP])
    w_down_t = torch.stack([row, torch.zeros_like(row)])
    assert same(op(x, one, one, by_columns(w_down_t), threshold, "relu")[0], row)
    # By rows, rows that fill up a group are multiplied by 0: of an infinity that makes NaN.
    y = op(x, one, one, by_rows(w_down_t), threshold, "relu")[0]
    assert same(y[row.isfinite()], row[row.isfinite()])
    assert not y[~row.isfinite()].isfinite().any()


def check_rounding(dtype: torch.dtype, op: Callable[..., Tensor]) -> None:
    """All is dropped, so y is the bias, rounded: fp32 values about every tie."""
    low = [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    bias = torch.cat([high + part for part in low]).view(torch.float32)
    zero, drop = torch.zeros(2, 1, dtype=dtype), torch.tensor(DROP)
    for layout in (by_rows, by_columns):
        w_down_t = layout(torch.zeros(2, len(bias), dtype=dtype))
        y = op(zero[:1], zero, zero, w_down_t, drop, "silu", torch.zeros(2), bias)[0]
        assert same(y, bias.to(dtype))
