"""Linear layers of checkpoints that other libraries quantized: whose they are, their own codes and
scales where ours can hold them, and their weights in floats.

A library is told by the names of its classes and imported only where a layer is its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import CatsparseError
from .kernels.preview import GROUP, pack_int4

# Rows of the identity that a layer is given at once, to see what it multiplies by.
_ROWS = 256
_LIBRARIES = ("bitsandbytes", "gptqmodel", "awq", "auto_gptq", "optimum", "compressed_tensors")


class Codes(NamedTuple):
    """A weight ``[out, in]`` in the layout of :mod:`catsparse.kernels.formats`, bit for bit the
    checkpoint's: packed rows, and their scales."""

    weights: str
    packed: Tensor
    scale: Tensor


def quantized_by(layer: Any) -> str | None:
    """Which library quantized ``layer``, and how, in words; None if none is known to have."""
    if hasattr(layer, "base_layer"):
        return None  # an adapter's, around a layer that may be
    scheme = getattr(layer, "quantization_scheme", None)
    if scheme is not None and getattr(scheme, "weights", None) is not None:
        return f"compressed-tensors {_format_of(scheme)}"
    kind, weight = type(layer), getattr(layer, "weight", None)
    library = kind.__module__.split(".")[0]
    if library in _LIBRARIES:
        return f"{library} {kind.__name__}"
    if library == "transformers" and kind.__name__ == "FP8Linear":
        return "transformers FP8Linear"
    # Asked in this order, compiled forwards can ask, too.
    if type(weight) is not nn.Parameter and type(weight).__module__.startswith("torchao."):
        return f"torchao {type(weight).__name__}"
    if hasattr(layer, "qweight"):
        return f"{library} {kind.__name__}"
    return None


def is_linear(layer: Any) -> bool:
    """Whether ``layer`` is a linear layer, of floats or of a library that :func:`quantized_by`
    knows."""
    sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
    sized = all(isinstance(size, int) for size in sizes)
    return isinstance(layer, nn.Linear) or (sized and quantized_by(layer) is not None)


@torch.no_grad()
def own_codes(layer: Any) -> Codes | str:
    """The checkpoint's codes of a layer that :func:`quantized_by` knows, or why they cannot be
    read by rows, in words."""
    by = quantized_by(layer)
    assert by is not None
    if by.startswith("torchao"):
        found = _of_torchao(layer.weight)
    elif by.startswith("compressed-tensors"):
        found = _of_compressed_tensors(layer)
    else:
        return f"the layout of {by} is not read by rows"
    if isinstance(found, str):
        return f"{by}: {found}"
    if not bool(found.scale.isfinite().all()):
        return f"{by}: its scales are not finite"
    return found


@torch.no_grad()
def settle(model: Any) -> None:
    """After layers of ``model`` were packed: take off the hook by which compressed-tensors unpacks
    a whole model at its first forward, which wraps the forward of every layer, ours as well.
    Those of its layers that are left are unpacked here, as the hook would."""
    if getattr(model, "ct_decompress_hook", None) is None:
        return
    for layer in model.modules():
        if (quantized_by(layer) or "").startswith("compressed-tensors"):
            from compressed_tensors.compressors.base import decompress_module

            if not _is_unpacked(layer):
                decompress_module(layer)
    model.ct_decompress_hook.remove()
    del model.ct_decompress_hook


def _is_unpacked(layer: Any) -> bool:
    """Whether a layer of compressed-tensors holds floats: a forward of the model has been here."""
    weight = getattr(layer, "weight", None)
    return weight is not None and weight.is_floating_point() and weight.itemsize > 1


@torch.no_grad()
def floats_of(layer: Any) -> Tensor:
    """The weight ``[out, in]`` of a layer that :func:`quantized_by` knows, as its own library makes
    it floats; ``layer`` stays as it is.

    Raises:
        CatsparseError: the library cannot.
    """
    by = quantized_by(layer) or ""
    try:
        if by.startswith("torchao"):
            weight: Tensor = layer.weight.dequantize()
        elif by.startswith("compressed-tensors"):
            weight = _decompressed(layer)
        elif by == "bitsandbytes Linear8bitLt":
            from bitsandbytes.functional import int8_vectorwise_dequant

            scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
            weight = int8_vectorwise_dequant(layer.weight.data, scale)
        else:
            weight = _by_identity(layer)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"{by} does not give its weight in floats: {reason}") from error
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise CatsparseError(f"{by} gives a weight of shape {tuple(weight.shape)}")
    return weight.detach()


def _of_torchao(weight: Any) -> Codes | str:
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if not isinstance(codes, Tensor) or not isinstance(scale, Tensor):
        return "its codes are in another layout"
    # One of activations is made for each token; a static one would be lost.
    if getattr(weight, "act_quant_scale", None) is not None:
        return "it has a static scale of activations"
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        return "it has zero points"
    if getattr(weight, "act_pre_scale", None) is not None:
        return "it scales its input"
    return _by_row(codes, scale)


def _by_row(codes: Tensor, scale: Tensor) -> Codes | str:
    """Of 8-bit codes ``[out, in]`` with one scale a row."""
    names = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    if codes.dtype not in names or codes.dim() != 2:
        return f"codes of {codes.dtype} are none of ours"
    rows = codes.shape[0]
    if scale.numel() == 1:
        scale = scale.reshape(1).expand(rows)  # one of the whole is one of every row
    elif scale.numel() != rows or scale.shape[0] != rows:
        return "its scales are not one a row"
    scale = scale.detach().reshape(rows).float().contiguous()
    return Codes(names[codes.dtype], codes.detach().contiguous(), scale)


def _format_of(scheme: Any) -> str:
    name = getattr(scheme, "format", None)
    return str(getattr(name, "value", name) or "layer")


def _of_compressed_tensors(layer: Any) -> Codes | str:
    args, inputs = layer.quantization_scheme.weights, layer.quantization_scheme.input_activations
    if _format_of(layer.quantization_scheme) not in (
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
    ):
        return "its codes are in another layout"
    if layer.quantization_scheme.output_activations is not None:
        return "it rounds its output"
    if inputs is not None and inputs.dynamic is not True:
        return "it has a static scale of activations"
    if not args.symmetric or getattr(layer, "weight_zero_point", None) is not None:
        return "it has zero points"
    if getattr(layer, "weight_g_idx", None) is not None:
        return "its groups are in another order (act-order)"
    packed, scale = getattr(layer, "weight_packed", None), getattr(layer, "weight_scale", None)
    if scale is None or _is_unpacked(layer):
        return "a forward has unpacked it; load the model again and pack it first"
    rows, columns = layer.out_features, layer.in_features
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy not in ("channel", "tensor", "group"):
        return f"its scales are by {strategy}"
    if packed is not None:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape = torch.Size((rows, columns))
        codes = unpack_from_int32(packed.detach(), args.num_bits, shape).to(torch.int8)
    else:
        codes = layer.weight.detach()
    if args.num_bits == 4 and strategy == "group":
        return _by_group(codes, scale.detach(), args.group_size)
    if args.num_bits != 8 or strategy == "group":
        return f"{args.num_bits} bits with scales by {strategy} are none of ours"
    return _by_row(codes, scale)


def _by_group(codes: Tensor, scale: Tensor, group: int) -> Codes | str:
    """Of 4-bit codes ``[out, in]`` from -8 to 7 with a scale for ``group`` inputs."""
    if group <= 0 or group % GROUP:
        return f"groups of {group} are no multiple of {GROUP}"
    if codes.shape[1] % group or codes.shape[0] % 8:
        return "its rows are not whole groups, or no multiple of 8"
    if not torch.equal(scale.to(torch.bfloat16).to(scale.dtype), scale):
        return "its scales are not exact in bf16"
    fine = scale.to(torch.bfloat16).repeat_interleave(group // GROUP, dim=1)
    return Codes("int4", *pack_int4(codes, fine))


def _decompressed(layer: Any) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.utils import get_direct_state_dict

    if _is_unpacked(layer):
        unpacked: Tensor = layer.weight.detach().clone()
        return unpacked
    compressor = BaseCompressor.get_value_from_registry(_format_of(layer.quantization_scheme))
    state = dict(get_direct_state_dict(layer))
    found: Tensor = compressor.decompress(state, layer.quantization_scheme)["weight"]
    return found


def _by_identity(layer: Any) -> Tensor:
    """What a layer makes of the identity matrix, its bias aside: each output is one product."""
    held = [*layer.parameters(), *layer.buffers()]
    device, floats = held[0].device, [t.dtype for t in held if t.is_floating_point()]
    bias = getattr(layer, "bias", None)
    dtype = getattr(layer, "compute_dtype", None) or next(iter(floats), torch.float32)
    parts = []
    for first in range(0, layer.in_features, _ROWS):
        count = min(_ROWS, layer.in_features - first)
        x = torch.zeros(count, layer.in_features, dtype=dtype, device=device)
        x[:, first:].fill_diagonal_(1)
        y = layer(x)
        parts.append(y if bias is None else y - bias.to(y.dtype))
    return torch.cat(parts).t().contiguous()
