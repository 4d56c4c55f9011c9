"""Which implementation of ``catsparse::gated_mlp`` serves a call, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from .cpu import DTYPES, cpu_library
from .reference import MAX_OP_TOKENS
from .triton import MAX_TOKENS, why_not_triton


class Backend(str, Enum):
    """Implementations of the op; ``AUTO`` takes the fastest one by a measured rule."""

    AUTO = "auto"
    TORCH = "torch"
    C = "c"
    TRITON = "triton"


# The most tokens for which the C kernel beats torch's dense matmuls even if little is dropped:
# several tokens together keep most neurons. Measured by `catsparse bench op` (docs/speed.md, which
# names the one exception, small fp16 layers that drop nothing).
AUTO_TOKENS = {torch.float32: 16, torch.bfloat16: 4, torch.float16: 16}


@dataclass(frozen=True)
class Choice:
    """Calls of up to ``kernel_tokens`` tokens run the kernel, longer ones torch; and why."""

    backend: Backend
    kernel_tokens: int
    reason: str


def choose_backend(asked: Backend, device: torch.device, dtype: torch.dtype) -> Choice:
    """What a layer with weights of ``dtype`` on ``device`` runs; builds the kernel if needed."""
    if asked is Backend.TORCH:
        return Choice(Backend.TORCH, 0, "asked for")
    if asked is Backend.TRITON or device.type == "cuda":
        reason = why_not_triton(device)
        if reason is None and asked is Backend.TRITON:
            return Choice(Backend.TRITON, MAX_TOKENS, "asked for")
        return Choice(Backend.TORCH, 0, reason or "the triton kernel is experimental: ask for it")
    if device.type != "cpu":
        return Choice(Backend.TORCH, 0, f"no kernel for {device.type}")
    if dtype not in DTYPES:
        return Choice(Backend.TORCH, 0, f"no kernel for {str(dtype).removeprefix('torch.')}")
    library = cpu_library()
    if library.handle is None:
        return Choice(Backend.TORCH, 0, library.reason)
    if asked is Backend.C:
        return Choice(Backend.C, MAX_OP_TOKENS, "asked for")
    tokens = AUTO_TOKENS[dtype]
    return Choice(Backend.C, tokens, f"faster than torch up to {tokens} tokens")
