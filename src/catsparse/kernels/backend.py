"""Which implementation of ``catsparse::gated_mlp`` serves a call, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from .cpu import DTYPES, cpu_library
from .cuda import AUTO_TOKENS as AUTO_TOKENS_CUDA
from .cuda import auto_tokens, why_not_cuda, why_not_sizes
from .preview import PreviewKind
from .reference import MAX_OP_TOKENS
from .sparse_linear_cuda import why_not_sparse_linear
from .stream import group_size
from .triton import MAX_TOKENS as TRITON_TOKENS
from .triton import why_not_triton, why_not_triton_sizes


class Backend(str, Enum):
    """Implementations of the op; ``AUTO`` takes the fastest one by a measured rule."""

    AUTO = "auto"
    TORCH = "torch"
    C = "c"
    CUDA = "cuda"
    TRITON = "triton"


# The most tokens for which the C kernel beats torch's dense matmuls even if little is dropped:
# several tokens together keep most neurons. Measured by `catsparse bench op` (docs/speed.md, which
# names the one exception, small fp16 layers that drop nothing).
AUTO_TOKENS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 16}


@dataclass(frozen=True)
class Choice:
    """Calls of up to ``kernel_tokens`` tokens run the kernel, longer ones torch; and why.

    ``without_preview`` says why the layer's preview must be left out, so that the exact weights
    decide, in every path alike: the kernel that serves all else does not take it.
    """

    backend: Backend
    kernel_tokens: int
    reason: str
    without_preview: str | None = None

    @property
    def op_tokens(self) -> int:
        """Calls of up to so many tokens go to the op; on a GPU it has matmuls of its own, too."""
        return MAX_OP_TOKENS if self.backend is Backend.CUDA else self.kernel_tokens


@dataclass(frozen=True)
class Decisions:
    """What a layer decides by beside its exact gate: a preview, and a second time on the product.

    With either torch still reads all of the weights, and unpacks the whole preview at each call.
    """

    preview: PreviewKind | None = None
    second: bool = False


def choose_backend(
    asked: Backend,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] | None = None,
    decisions: Decisions = Decisions(),
    packed: str | None = None,
) -> Choice:
    """What a layer with weights of ``dtype`` on ``device`` runs; builds a CPU kernel if needed.

    Args:
        sizes: (H, I, H_out) of the layer, where they are known: not every kernel takes all.
        decisions: of the layer.
        packed: the format of its weights, whose activations are of ``dtype``.
    """
    choice = _choose(asked, device, dtype, sizes, decisions, packed)
    if packed == "int4" and decisions.preview is not None:
        return replace(choice, without_preview="int4 weights are their own preview")
    return choice


def _choose(
    asked: Backend,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] | None,
    decisions: Decisions,
    packed: str | None,
) -> Choice:
    if asked is Backend.TORCH:
        return Choice(Backend.TORCH, 0, "asked for")
    if asked is Backend.TRITON:
        return _asked_for(asked, _why_not_triton(device, dtype, sizes))
    if asked is Backend.CUDA or (asked is Backend.AUTO and device.type == "cuda"):
        return _choose_on_gpu(asked, device, dtype, sizes, decisions, packed)
    if device.type != "cpu":
        return Choice(Backend.TORCH, 0, f"no kernel for {device.type}")
    if dtype not in DTYPES:
        return Choice(Backend.TORCH, 0, _no_kernel(dtype))
    library = cpu_library()
    if library.handle is None:
        return Choice(Backend.TORCH, 0, library.reason)
    if asked is Backend.C:
        return _asked_for(Backend.C, None)
    if packed is not None:
        return Choice(Backend.C, MAX_OP_TOKENS, "reads packed weights, which torch makes floats")
    tokens = AUTO_TOKENS[dtype]
    return Choice(Backend.C, tokens, f"faster than torch up to {tokens} tokens")


def _choose_on_gpu(
    asked: Backend,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] | None,
    decisions: Decisions,
    packed: str | None,
) -> Choice:
    reason = why_not_cuda(device)
    if reason is None and dtype not in AUTO_TOKENS_CUDA:
        reason = _no_kernel(dtype)
    if reason is None and sizes is not None:
        reason = why_not_sizes(device, dtype, *sizes, None, packed)
    if reason is not None:
        decides = decisions.preview is not None or decisions.second
        if asked is Backend.AUTO and _why_not_triton(device, dtype, sizes) is None:
            if packed is not None:  # five bytes for each of int8, at any number of tokens
                words = f"{reason}; torch would make floats of packed weights"
                return Choice(Backend.TRITON, MAX_OP_TOKENS, words)
            if decides:
                words = f"{reason}; torch would read all for a preview or a second decision"
                return Choice(Backend.TRITON, TRITON_TOKENS, words)
        return _asked_for(Backend.CUDA, reason)
    left_out = None
    if decisions.preview is not None and sizes is not None and packed != "int4":
        left_out = why_not_sizes(device, dtype, *sizes, decisions.preview, packed)
    if asked is Backend.CUDA:
        return replace(_asked_for(asked, None), without_preview=left_out)
    tokens = AUTO_TOKENS_CUDA[dtype]
    if sizes is not None:
        tokens = auto_tokens(dtype, max(sizes[0], sizes[2]) * dtype.itemsize, packed)
    return Choice(Backend.CUDA, tokens, f"faster than torch up to {tokens} tokens", left_out)


def _why_not_triton(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int] | None
) -> str | None:
    reason = why_not_triton(device)
    if reason is None and sizes is not None:
        reason = why_not_triton_sizes(dtype, *sizes)
    return reason


def choose_linear_backend(
    asked: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, int]
) -> Choice:
    """What a sparse linear layer with weights of ``dtype`` on ``device`` runs.

    Args:
        sizes: (H, H_out) of the layer.
    """
    if asked is Backend.TORCH:
        return Choice(Backend.TORCH, 0, "asked for")
    if asked is Backend.CUDA or (asked is Backend.AUTO and device.type == "cuda"):
        reason = why_not_sparse_linear(device, dtype, sizes[0], [sizes[1]])
        if reason is not None:
            return Choice(Backend.TORCH, 0, reason)
        tokens = min(AUTO_TOKENS_CUDA[dtype], group_size(sizes[1] * dtype.itemsize))
        return Choice(Backend.CUDA, tokens, f"faster than torch up to {tokens} tokens")
    if asked is Backend.TRITON:
        return Choice(Backend.TORCH, 0, "there is no Triton kernel for linear layers")
    if device.type != "cpu":
        return Choice(Backend.TORCH, 0, f"no kernel for {device.type}")
    return choose_backend(asked, device, dtype)


def _asked_for(backend: Backend, reason: str | None) -> Choice:
    if reason is not None:
        return Choice(Backend.TORCH, 0, reason)
    return Choice(backend, MAX_OP_TOKENS, "asked for")


def _no_kernel(dtype: torch.dtype) -> str:
    return f"no kernel for {str(dtype).removeprefix('torch.')}"
