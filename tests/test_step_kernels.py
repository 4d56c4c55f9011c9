"""The decode step's CUDA kernels, linear and attention, against fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from catsparse.kernels import Call, cuda
from catsparse.kernels.attention import Scratch, attention, why_not_attention
from catsparse.kernels.linear import linear, why_not_linear
from catsparse.kernels.stream import Norm
from gpu_op import TOLERANCE, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

DTYPES = list(TOLERANCE)


def rms(x: Tensor, norm: Norm | None) -> Tensor:
    """In fp64, rounded where transformers rounds."""
    if norm is None:
        return x.double()
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.offset:
        return (normed * (norm.offset + norm.weight.double())).to(x.dtype).double()
    return (normed.to(x.dtype) * norm.weight).double()


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "rows"), [(576, (100, 7, 1)), (4096, (300, 200)), (256, (5,)), (1024, (130001,))]
)
def test_linear(dtype: torch.dtype, tokens: int, hidden: int, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weights = [
        (torch.randn(n, hidden + 8, device="cuda") * hidden**-0.5).to(dtype)[:, :hidden]
        for n in rows
    ]
    assert why_not_linear(weights) is None
    x = (3 * torch.randn(tokens, hidden, device="cuda")).to(dtype)
    weight = torch.rand(hidden, device="cuda").to(dtype)
    norms = (None, Norm(weight, 1e-5), Norm(weight, 1e-6, 1.0))
    residual = torch.randn(tokens, sum(rows), device="cuda").to(dtype)
    every = [torch.randn(n, device="cuda").to(dtype) for n in rows]
    some = [None, *every[1:]]
    for norm, biases, added in itertools.product(norms, (every, some), (None, residual)):
        out = torch.full((tokens, sum(rows)), float("nan"), device="cuda", dtype=dtype)
        y = linear(x, weights, biases, norm, added, out)
        assert y is out
        truth = torch.cat([rms(x, norm) @ w.double().T for w in weights], dim=1)
        truth += torch.cat(
            [torch.zeros(n) if b is None else b.cpu() for n, b in zip(rows, biases, strict=True)]
        ).to("cuda", torch.float64)
        truth = truth if added is None else truth + added.double()
        assert error(y, truth) < TOLERANCE[dtype]
        assert torch.equal(y, linear(x, weights, biases, norm, added))


def test_linear_in_place() -> None:
    w = torch.randn(512, 512, device="cuda") * 0.05
    x, residual = torch.randn(2, 512, device="cuda"), torch.randn(2, 512, device="cuda")
    truth = residual.double() + x.double() @ w.double().T
    assert linear(x, [w], [None], residual=residual, out=residual) is residual
    assert error(residual, truth) < TOLERANCE[torch.float32]


def test_what_linear_does_not_take() -> None:
    w = torch.zeros(8, 64, device="cuda")
    assert "16-byte" in str(why_not_linear([w[:, :63]]))
    assert "matrices" in str(why_not_linear([w] * 4))
    assert "matrices" in str(why_not_linear([w, w.half()]))
    assert "float64" in str(why_not_linear([w.double()]))


class Heads:
    """Random q, k, v and a cache that is poisoned wherever nothing may be read."""

    def __init__(
        self, dtype: torch.dtype, size: int, kv_heads: int, group: int, used: int, tokens: int
    ) -> None:
        torch.manual_seed(size + used)
        self.size, self.kv_heads, self.group, self.used = size, kv_heads, group, used
        self.tokens, self.length = tokens, used + 5
        wide = (group + 2) * kv_heads * size
        self.qkv = torch.randn(tokens, wide, device="cuda").to(dtype)
        shape = (tokens, kv_heads, self.length, size)
        self.keys, self.values = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
        for cache in (self.keys, self.values):
            cache[:, :, used:] = float("nan")
        angles = torch.rand(self.length, size // 2, device="cuda") * 6
        self.cosines = torch.cat([angles.cos()] * 2, dim=1).to(dtype)
        self.sines = torch.cat([angles.sin()] * 2, dim=1).to(dtype)
        self.position = torch.tensor([used], device="cuda")
        self.starts = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        self.scratch = Scratch.make(tokens, kv_heads * group, kv_heads, size, self.qkv.device)

    def call(self, q_norm: Norm | None, k_norm: Norm | None, window: int) -> Tensor:
        width = self.kv_heads * self.group * self.size
        out = torch.full((self.tokens, width), float("nan"), device="cuda", dtype=self.qkv.dtype)
        return attention(
            self.qkv,
            self.keys,
            self.values,
            self.cosines,
            self.sines,
            self.position,
            self.starts,
            self.scratch,
            self.size**-0.5,
            q_norm,
            k_norm,
            window,
            out,
        )

    def turned(self, x: Tensor, at: Tensor) -> Tensor:
        half = self.size // 2
        other = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        cosines, sines = self.cosines[at].double(), self.sines[at].double()
        turned = x * cosines[:, None] + other * sines[:, None]
        return turned.to(self.qkv.dtype).double()

    def truth(self, q_norm: Norm | None, k_norm: Norm | None, window: int) -> Tensor:
        """Run before :meth:`call`, which writes the cache."""
        many, few = self.kv_heads * self.group, self.kv_heads
        parts = self.qkv.view(self.tokens, -1, self.size).split([many, few, few], dim=1)
        at = self.position - self.starts
        q, self.k = (
            self.turned(rms(part, norm), at)
            for part, norm in zip(parts, (q_norm, k_norm), strict=False)
        )
        keys = torch.cat([self.keys[:, :, : self.used].double(), self.k[:, :, None]], dim=2)
        values = self.values[:, :, : self.used].double()
        values = torch.cat([values, parts[2].double()[:, :, None]], dim=2)
        slots = torch.arange(self.used + 1, device="cuda")
        seen = slots >= self.starts[:, None]
        if window:
            seen = seen & (slots > self.used - window)
        y = F.scaled_dot_product_attention(
            q[:, :, None],
            keys.repeat_interleave(self.group, 1),
            values.repeat_interleave(self.group, 1),
            attn_mask=seen[:, None, None],
        )
        return y.reshape(self.tokens, -1)

    def check(
        self, q_norm: Norm | None = None, k_norm: Norm | None = None, window: int = 0
    ) -> None:
        truth = self.truth(q_norm, k_norm, window)
        y = self.call(q_norm, k_norm, window)
        assert error(y, truth) < TOLERANCE[self.qkv.dtype]
        assert error(self.keys[:, :, self.used], self.k) < TOLERANCE[self.qkv.dtype]
        value = self.qkv.view(self.tokens, -1, self.size)[:, -self.kv_heads :]
        assert torch.equal(self.values[:, :, self.used], value)
        assert torch.isnan(self.keys[:, :, self.used + 1 :]).all()
        assert torch.equal(y, self.call(q_norm, k_norm, window))
        assert not self.scratch.arrived.any()


@pytest.mark.parametrize("used", [0, 1, 31, 33, 300, 5000])
@pytest.mark.parametrize(
    ("size", "kv_heads", "group"),
    [
        (64, 8, 4),
        (128, 8, 4),
        (128, 4, 1),
        (128, 2, 8),
        (256, 3, 1),
        (64, 3, 3),
        (64, 2, 8),
        (256, 1, 4),
        (128, 1, 6),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, size: int, kv_heads: int, group: int, used: int) -> None:
    if why_not_attention(dtype, kv_heads * group, kv_heads, size) is None:
        Heads(dtype, size, kv_heads, group, used, 1).check()


@pytest.mark.parametrize("window", [0, 1, 40, 100000])
@pytest.mark.parametrize("tokens", [2, 3])
def test_attention_of_padded_sequences_with_norms(tokens: int, window: int) -> None:
    heads = Heads(torch.bfloat16, 128, 4, 2, 333, tokens)
    heads.starts += torch.tensor([0, 17, 333][:tokens], device="cuda")
    heads.keys[1, :, :17] = float("nan")
    weight = torch.rand(2, 128, device="cuda").bfloat16()
    truth_slots = heads.keys[1, :, :17].clone()
    heads.keys[1, :, :17] = 0  # the truth masks after multiplying
    norms = Norm(weight[0], 1e-6), Norm(weight[1], 1e-6)
    truth = heads.truth(*norms, window)
    heads.keys[1, :, :17] = truth_slots
    assert error(heads.call(*norms, window), truth) < TOLERANCE[torch.bfloat16]


def test_what_attention_does_not_take() -> None:
    assert why_not_attention(torch.bfloat16, 32, 8, 128) is None
    assert "96" in str(why_not_attention(torch.bfloat16, 32, 8, 96))
    assert "for 3" in str(why_not_attention(torch.bfloat16, 32, 3, 128))
    assert "for 1" in str(why_not_attention(torch.bfloat16, 32, 1, 128))
    assert "float64" in str(why_not_attention(torch.float64, 8, 8, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_gated_mlp_with_norm_and_residual(dtype: torch.dtype, tokens: int) -> None:
    case = Case(dtype, 512, 700, 512, "silu", tokens)
    norm = Norm(torch.rand(512, device="cuda").to(dtype), 1e-5)
    raw = (3 * case.x).contiguous()
    case.x = rms(raw, norm).to(dtype)
    threshold, residual = case.cut(0.5), torch.randn(tokens, 512, device="cuda").to(dtype)
    expected = case.call(threshold, True, backend="cuda").double() + residual.double()
    for early in (False, True):
        call = Call(raw, *case.weights, threshold, "silu", case.mean, case.bias)
        y = cuda.launch(call, norm=norm, residual=residual, early=early)
        assert error(y, expected) < TOLERANCE[dtype]
