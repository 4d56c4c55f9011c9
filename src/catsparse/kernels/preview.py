"""A preview: W_gate, or W_gate and W_up, in 4 or 8 bits, enough to decide which neurons live.

Of W_gate alone it foretells a neuron's gate g, of both its product h = g u. Round to nearest in
groups of 64 along the input, all by one scale, whose sign lets the group's extreme be the lowest
number, as there is one more of those below zero than above. A scale has so few significant bits
that every value of the preview is exact in bf16: dense matmuls on it decide as the kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 64
BITS = (4, 8)
SCALE_GROUPS = 8  # a row of scales is whole 16-byte pieces, for the bulk copy engine
# Runs of a row that stand in another order in each of four neighbouring rows, so that they lie on
# different banks of a GPU's shared memory; a rest of less than a whole block keeps its place.
RUN = 64  # bytes
BLOCK = 4  # runs
# Scales to choose from, in parts of the one that clips nothing: finer steps are worth a little
# clipping. 8 bits are fine enough.
_CLIPS = {4: (1.0, 0.94, 0.88), 8: (1.0,)}
# Weights made at once: no fp32 copy of a whole matrix is needed, and on a CPU caches hold them.
_NUMBERS, _CPU_NUMBERS = 2**22, 2**18


@dataclass(frozen=True)
class PreviewKind:
    """What a kernel must know of a preview: bits a weight, and whether W_up is in it."""

    bits: int
    products: bool


def groups_of(hidden: int) -> int:
    return -(-hidden // GROUP)


def preview_shapes(rows: int, hidden: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a packed preview of so many rows (uint8) and of its scales (bf16)."""
    groups = groups_of(hidden)
    padded = -(-groups // SCALE_GROUPS) * SCALE_GROUPS
    return (rows, groups * GROUP * bits // 8), (rows, padded)


def preview_bits(preview: Tensor, hidden: int) -> int:
    """Bits a weight, from the packed preview's shape; 0 if it is none of a gate with H inputs."""
    width = preview.shape[1] * 8
    return next((bits for bits in BITS if width == groups_of(hidden) * GROUP * bits), 0)


def preview_kind(preview: Tensor, neurons: int, hidden: int) -> PreviewKind:
    return PreviewKind(preview_bits(preview, hidden), preview.shape[0] != neurons)


@torch.no_grad()
def make_preview(w_gate: Tensor, bits: int, w_up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize W_gate or, for a preview of products, W_gate and W_up.

    Args:
        w_gate: ``[I, H]`` of any float dtype.
        bits: 4 or 8.
        w_up: ``[I, H]``; None for a preview of the gate.

    Returns:
        The packed preview, uint8, and its scales, bf16, I rows each, or of products 2 I, those of
        W_gate first; see :func:`preview_shapes`. A weight is
        ``scale * (n - 2^(bits - 1))``. 8 bits: byte j of a row is n of input j. 4 bits: byte j of
        a group of 32 bytes holds n of its input j in the low half, of j + 32 in the high one.
        Then runs of 64 bytes change places within whole blocks of four: run i of row r is that of
        place i XOR r mod 4.
    """
    weights = (w_gate,) if w_up is None else (w_gate, w_up)
    step = max(1, (_NUMBERS if w_gate.is_cuda else _CPU_NUMBERS) // w_gate.shape[1])
    parts = [_quantize(rows, bits) for w in weights for rows in w.detach().split(step)]
    packed, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return _swap_runs(packed), scale


def _swap_runs(packed: Tensor) -> Tensor:
    """Into their places, or back from them."""
    rows, width = packed.shape
    whole = width // (BLOCK * RUN) * BLOCK * RUN
    blocks = packed[:, :whole].reshape(rows, -1, BLOCK, RUN)
    runs = torch.arange(BLOCK, device=packed.device)
    place = runs ^ torch.arange(rows, device=packed.device)[:, None] % BLOCK  # [rows, BLOCK]
    index = place[:, None, :, None].expand_as(blocks)
    return torch.cat([blocks.gather(2, index).view(rows, whole), packed[:, whole:]], dim=1)


def _quantize(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    neurons, hidden = rows.shape
    groups = groups_of(hidden)
    padded = torch.nn.functional.pad(rows.float(), (0, groups * GROUP - hidden))
    q, scale = _nearest(padded.view(neurons, groups, GROUP), bits)
    n = (q + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        n = _halves(n)
    return n.view(neurons, -1), _padded(scale[..., 0].to(torch.bfloat16), hidden)


def _nearest(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of groups ``[R, groups, GROUP]``, and the scale of each that misses least."""
    least = 2 ** (bits - 1)
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)) / -least
    scale, q = extreme, w
    error: Tensor | None = None
    for clip in _CLIPS[bits]:
        tried = _round_up(extreme * clip, 9 - bits).float()
        rounded = (w / tried).round_().clamp_(-least, least - 1).nan_to_num_(0.0)
        missed = torch.addcmul(w, rounded, tried, value=-1).square_().sum(-1, keepdim=True)
        # Numbers that are not finite keep the first: no comparison with them holds.
        better = torch.ones_like(missed, dtype=torch.bool) if error is None else missed < error
        error = missed if error is None else torch.where(better, missed, error)
        scale, q = torch.where(better, tried, scale), torch.where(better, rounded, q)
    return q, scale


@torch.no_grad()
def round_groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of 64 to nearest in 4 bits, as :func:`make_preview` does.

    Args:
        rows: ``[R, C]`` of any float dtype; C is a multiple of 64.

    Returns:
        Codes from -8 to 7, fp32 ``[R, C]``, and their scales, bf16 ``[R, C / 64]``.
    """
    q, scale = _nearest(rows.detach().float().view(len(rows), -1, GROUP), 4)
    return q.view_as(rows), scale[..., 0].to(torch.bfloat16)


def _halves(n: Tensor) -> Tensor:
    """Numbers below 16, ``[rows, groups, GROUP]``, two to a byte."""
    low, high = n.view(*n.shape[:2], 2, GROUP // 2).unbind(2)
    return low | high << 4


def _padded(scale: Tensor, hidden: int) -> Tensor:
    """Scales of so many inputs in whole pieces."""
    rows, groups = scale.shape
    return torch.nn.functional.pad(scale, (0, preview_shapes(rows, hidden, 4)[1][1] - groups))


@torch.no_grad()
def pack_int4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Pack numbers that are rounded already as :func:`make_preview` lays 4 bits out.

    Args:
        codes: int8 ``[R, C]``, from -8 to 7; C is a multiple of 64.
        scale: bf16 ``[R, C / 64]``.

    Returns:
        The packed codes, uint8 ``[R, C / 2]``, and their scales, bf16; see :func:`preview_shapes`.
    """
    rows, hidden = codes.shape
    n = (codes + 8).to(torch.uint8).view(rows, -1, GROUP)
    return _swap_runs(_halves(n).view(rows, -1)), _padded(scale, hidden)


def _round_up(values: Tensor, significant: int) -> Tensor:
    """bf16, away from zero to so many significant bits; what is not finite stays so."""
    mantissa, exponent = torch.frexp(values)
    whole = mantissa * 2**significant
    rounded = torch.ldexp(whole.abs().ceil().copysign(whole) / 2**significant, exponent)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def dequantize(preview: Tensor, scale: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """The preview as ``[rows, H]`` of ``dtype``; exact in bf16 and fp32."""
    count, groups = preview.shape[0], groups_of(hidden)
    bits = preview_bits(preview, hidden)
    n = _swap_runs(preview).view(count, groups, -1)
    if bits == 4:
        n = torch.cat([n & 15, n >> 4], dim=-1)
    q = n.to(dtype) - 2 ** (bits - 1)
    w = q * scale[:, :groups, None].to(dtype)
    rows: Tensor = w.view(count, -1)
    return rows[:, :hidden]
