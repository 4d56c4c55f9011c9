"""Weight formats of the ops beside the floats: int8, fp8 and int4, each with its scales.

A matrix ``[R, C]`` is quantized along its rows, the axis that the kernels read whole: W_gate and
W_up by neuron over the inputs, the transposed W_down by neuron over the outputs. Its dtype tells
the format:

* ``int8``: ``torch.int8 [R, C]``, from -127 to 127, fp32 scales ``[R]``;
* ``fp8``: ``torch.float8_e4m3fn [R, C]``, fp32 scales ``[R]``;
* ``int4``: ``torch.uint8 [R, C / 2]`` packed as a 4-bit preview is (:mod:`.preview`), bf16 scales
  in groups of 64: with such a W_gate the gate is its own preview. C is a multiple of 64.

All are rounded to nearest. int8 and fp8 are symmetric, by the row's largest magnitude; fp8 is what
torchao's ``Float8WeightOnlyConfig`` makes, int8 what its primitives do for -127 to 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .preview import GROUP, SCALE_GROUPS, dequantize, make_preview

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
_NAMES = {dtype: name for name, dtype in FORMATS.items()}
_MOST = {"int8": 127.0, "fp8": 448.0}


def format_of(weight: Tensor) -> str | None:
    """The name of a packed matrix's format; None for floats."""
    return _NAMES.get(weight.dtype)


def columns_of(weight: Tensor) -> int:
    """C of a matrix ``[R, C]``, packed or not."""
    return weight.shape[1] * 2 if weight.dtype == torch.uint8 else weight.shape[1]


@torch.no_grad()
def quantize(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """Round ``weight`` ``[R, C]``, of any float dtype, to a format of :data:`FORMATS`.

    Returns:
        The packed matrix and its scales. A row of zeros has the scale 0 or, in int8 and fp8, the
        smallest normal number.

    Raises:
        ValueError: the format is unknown, or int4 does not fit C.
    """
    if weights not in FORMATS:
        raise ValueError(f"the format {weights} is none of {', '.join(FORMATS)}")
    if weights == "int4":
        if weight.shape[1] % GROUP:
            raise ValueError(f"rows of {weight.shape[1]} are not whole groups of {GROUP}")
        return make_preview(weight, 4)
    wide, most = weight.detach().float(), _MOST[weights]
    scale = row_scale(wide, weights)
    rounded = wide / scale[:, None]
    if weights == "int8":
        rounded = rounded.round()
    return rounded.clamp(-most, most).to(FORMATS[weights]), scale


def row_scale(rows: Tensor, weights: str) -> Tensor:
    """The scales of int8 or fp8, fp32 ``[R]``, for fp32 rows ``[R, C]``: by the largest magnitude,
    at least the smallest normal number."""
    largest = rows.abs().amax(dim=1) / _MOST[weights]
    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def dequantize_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A packed matrix as ``[R, C]`` of ``dtype``; one of floats as it is."""
    if scale is None:
        return weight
    if format_of(weight) == "int4":
        return dequantize(weight, scale, columns_of(weight), dtype)
    return (weight.float() * scale[:, None]).to(dtype)


def is_packed(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a matrix is of a format and its scales belong to it; of floats, that it has none."""
    name = format_of(weight)
    if name is None or scale is None:
        return name is None and scale is None
    if weight.dim() != 2 or weight.device != scale.device:
        return False
    rows, columns = weight.shape[0], columns_of(weight)
    if name != "int4":
        return scale.dtype == torch.float32 and scale.shape == (rows,)
    padded = -(-columns // GROUP // SCALE_GROUPS) * SCALE_GROUPS
    return (
        columns % GROUP == 0
        and weight.is_contiguous()
        and (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (rows, padded))
    )
