"""The gate preview: packing byte by byte, rounding, and what is not ordinary."""

from __future__ import annotations

import pytest
import torch

from catsparse.kernels.preview import (
    GROUP,
    RUN,
    SCALE_GROUPS,
    PreviewKind,
    dequantize,
    groups_of,
    make_preview,
    preview_bits,
    preview_kind,
    preview_shapes,
)


def steps(hidden: int, least: int) -> torch.Tensor:
    """``[2, H]`` of whole numbers of magnitude below ``least``, and in each group one of it:
    scales are 1, or -1 where that one is positive."""
    row = torch.arange(hidden) * 5 % (2 * least - 1) - least + 1
    row[::GROUP] = -least
    return torch.stack([row, -row]).float()


def test_four_bits_byte_by_byte() -> None:
    """Byte j of a group's 32 holds input j low and input j + 32 high, each plus 8."""
    w = steps(100, 8)
    packed, scale = make_preview(w, 4)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
    assert packed.shape == (2, 64)
    for i in range(2):
        padded = w[0].int().tolist() + [0] * 28  # of row 1 the scale's sign, not the numbers
        for group in range(2):
            for j in range(32):
                low, high = padded[64 * group + j], padded[64 * group + j + 32]
                assert int(packed[i, 32 * group + j]) == (low + 8) + 16 * (high + 8)
    assert scale.tolist() == [[1, 1] + [0] * 6, [-1, -1] + [0] * 6]


def test_eight_bits_byte_by_byte() -> None:
    w = steps(100, 128)
    packed, scale = make_preview(w, 8)
    padded = w[0].int().tolist() + [0] * 28
    assert packed.tolist() == [[n + 128 for n in padded]] * 2
    assert scale.tolist() == [[1, 1] + [0] * 6, [-1, -1] + [0] * 6]


@pytest.mark.parametrize("bits", [4, 8])
def test_runs_change_places_by_row(bits: int) -> None:
    """Run i of 64 bytes of row r lies at i XOR r mod 4; a rest of a whole four where it was."""
    torch.manual_seed(0)
    w = torch.randn(1, 7 * RUN * 8 // bits).expand(6, -1)
    packed, _ = make_preview(w, bits)
    runs = packed.view(6, 7, RUN)
    for row in range(6):
        for run in range(7):
            assert torch.equal(runs[row, run ^ row % 4 if run < 4 else run], runs[0, run])


def test_of_products_it_is_both_weights() -> None:
    torch.manual_seed(0)
    w_gate, w_up = torch.randn(5, 70), torch.randn(5, 70)
    packed, scale = make_preview(w_gate, 8, w_up)
    assert preview_kind(packed, 5, 70) == PreviewKind(8, products=True)
    assert preview_kind(packed[:5], 5, 70) == PreviewKind(8, products=False)
    copy = dequantize(packed, scale, 70, torch.float32)
    assert (copy - torch.cat([w_gate, w_up])).abs().max() < 0.04
    assert torch.equal(
        copy, dequantize(*make_preview(torch.cat([w_gate, w_up]), 8), 70, copy.dtype)
    )


def test_by_hand() -> None:
    """One group: the extreme over -8, away from zero to 5 significant bits."""
    packed, scale = make_preview(torch.tensor([[0.81, -0.25, 0.08, -0.06, 2.1]]), 4)
    assert float(scale[0, 0]) == -0.265625  # -0.2625 is -16.8 / 64; clipping would miss by more
    assert [int(n) & 15 for n in packed[0, :6]] == [8 - 3, 8 + 1, 8, 8, 8 - 8, 8]
    assert all(int(n) >> 4 == 8 for n in packed[0])


def test_clips_where_that_misses_by_less() -> None:
    """Steps of 1 reach the extreme, 8, but the rest lies half-way between two of them."""
    w = torch.full((1, 64), 3.5)
    w[0, 0] = 8.0
    packed, scale = make_preview(w, 4)
    best = min(
        (1.0, 0.94, 0.88),
        key=lambda c: missed(w, -torch.tensor(c).mul(32).ceil().div(32).item()),
    )
    assert best < 1
    assert float(scale[0, 0]) == -torch.tensor(best).mul(32).ceil().div(32).item()
    copy = dequantize(packed, scale, 64, torch.float32)
    assert float((copy - w).square().sum()) == pytest.approx(missed(w, float(scale[0, 0])))
    assert float((copy - w).square().sum()) < missed(w, -1.0)


def missed(w: torch.Tensor, scale: float) -> float:
    """The sum of squared errors of one group in 4 bits, by loops."""
    return sum((v - scale * min(7, max(-8, round(v / scale)))) ** 2 for v in w[0].tolist())


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1)])
def test_least_error_of_a_gaussian(signs: tuple[int, int]) -> None:
    """4 bits miss less than symmetric steps up to the extreme would, whatever the signs."""
    torch.manual_seed(0)
    w = torch.randn(64, 256).abs() * torch.tensor(signs).repeat(64, 128)
    copy = dequantize(*make_preview(w, 4), 256, torch.float32)
    groups = w.view(64, 4, 64)
    step = groups.abs().amax(-1, keepdim=True) / 7
    symmetric = (groups / step).round() * step
    assert (copy - w).norm() < 0.87 * (symmetric.view_as(w) - w).norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hidden", [1, 7, 63, 64, 65, 128, 511, 513, 520])
def test_shapes(bits: int, hidden: int) -> None:
    packed, scale = make_preview(torch.randn(3, hidden), bits)
    assert preview_shapes(3, hidden, bits) == (packed.shape, scale.shape)
    groups = -(-hidden // 64)
    assert groups_of(hidden) == groups
    assert packed.shape == (3, groups * 64 * bits // 8)
    assert scale.shape[1] % SCALE_GROUPS == 0
    assert 0 <= scale.shape[1] - groups < SCALE_GROUPS
    assert not scale[:, groups:].any()
    assert dequantize(packed, scale, hidden, torch.float32).shape == (3, hidden)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_that_fill_up_a_group_are_zero(bits: int) -> None:
    hidden = 70
    packed, scale = make_preview(torch.randn(5, hidden), bits)
    whole = dequantize(packed, scale, 128, torch.float32)
    assert not whole[:, hidden:].any()
    assert torch.equal(whole[:, :hidden], dequantize(packed, scale, hidden, torch.float32))


@pytest.mark.parametrize("hidden", [1, 64, 65, 4096])
def test_bits_from_the_shape(hidden: int) -> None:
    for bits in (4, 8):
        shape, _ = preview_shapes(2, hidden, bits)
        assert preview_bits(torch.empty(shape, dtype=torch.uint8), hidden) == bits
    for width in (0, 1, shape[1] - 1, shape[1] + 1, 2 * shape[1]):
        assert preview_bits(torch.empty(2, width, dtype=torch.uint8), hidden) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_half_a_step(bits: int, dtype: torch.dtype) -> None:
    """Of the scale, unless clipped; which is at most one part in 2^(8 - bits) above what reaches
    the extreme, or above 0.88 of it in 4 bits (8 bits leave a scale one significant bit)."""
    w = (torch.randn(50, 200) * torch.logspace(-3, 3, 50)[:, None]).to(dtype).float()
    packed, scale = make_preview(w.to(dtype), bits)
    copy = dequantize(packed, scale, 200, torch.float32)
    step = scale[:, :4].float().repeat_interleave(64, 1)[:, :200]
    least = 2 ** (bits - 1)
    reached = (-least - 0.5 <= w / step) & (w / step <= least - 0.5)
    assert reached.float().mean() > 0.98
    assert ((copy - w).abs() <= step.abs() / 2 * (1 + 1e-6))[reached].all()
    assert torch.equal(copy[~reached], (step * (w / step).clamp(-least, least - 1))[~reached])
    groups = torch.nn.functional.pad(w, (0, 56)).view(50, 4, 64)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    ratio = scale[:, :4].float() * -least / extreme
    assert (ratio >= (0.88 if bits == 4 else 1) - 1e-6).all()
    assert (ratio <= 1 + 2.0 ** -(8 - bits)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_is_exact_in_bf16(bits: int) -> None:
    w = torch.randn(100, 130) * torch.logspace(-30, 30, 100)[:, None]
    packed, scale = make_preview(w, bits)
    exact = dequantize(packed, scale, 130, torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantize(packed, scale, 130, dtype).double(), exact)
    assert len(packed.unique()) > 2**bits / 2


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros(bits: int) -> None:
    w = torch.randn(3, 192)
    w[0], w[1, 64:128] = 0, -0.0
    packed, scale = make_preview(w, bits)
    copy = dequantize(packed, scale, 192, torch.float32)
    assert torch.equal(copy == 0, (w == 0) | (copy == 0))
    assert not copy[0].any()
    assert not copy[1, 64:128].any()
    assert copy[2].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_what_is_not_finite_spoils_its_group_only(bits: int, bad: float) -> None:
    w = torch.randn(2, 130)
    clean = dequantize(*make_preview(w, bits), 130, torch.float32)
    w[1, 70] = bad
    copy = dequantize(*make_preview(w, bits), 130, torch.float32)
    assert copy[1, 64:128].isnan().all()
    copy[1, 64:128] = clean[1, 64:128]
    assert torch.equal(copy, clean)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_made_apart_and_the_weight_is_left_alone(bits: int) -> None:
    """More rows than are made at once."""
    w = torch.randn(1030, 65, requires_grad=True)
    packed, scale = make_preview(w, bits)
    assert not scale.requires_grad
    for row in (0, 1023, 1024, 1029):  # narrower than a block of runs: in the same order
        one = make_preview(w[row : row + 1], bits)
        assert torch.equal(packed[row : row + 1], one[0])
        assert torch.equal(scale[row : row + 1], one[1])
