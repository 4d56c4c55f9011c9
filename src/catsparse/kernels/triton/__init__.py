"""``catsparse::gated_mlp`` in Triton: argument checks and the call.

For what cuda.cu does not take: GPUs of AMD or older than Hopper, rows that are not whole 16-byte
pieces. One to four tokens; weights in floats or a format of formats.py. Nothing depends on the data
but what is read, so calls can be captured in a CUDA graph, and sums have a fixed order, so results
repeat bit for bit.

The plain call is stream.py's one kernel. With a preview or a second decision a launch decides first
(decide.py), and the next reads the rows of what is left (kept.py). Plans are in plans.py, what is
launched in launches.py.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..arguments import Call, belong_together
from . import launches
from .plans import MASK_BLOCK, Launch, fields

MAX_TOKENS = 4  # sums of more do not fit in the registers
MAX_HIDDEN = 8192
MAX_NEURONS = 2**24  # a list entry holds the neuron and a bit for each token
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PREVIEW_BYTES = 16  # the bound on which a preview begins


def why_not_triton(device: torch.device) -> str | None:
    """Why ``device`` cannot run the kernels; None if it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def why_not_triton_sizes(dtype: torch.dtype, hidden: int, neurons: int, columns: int) -> str | None:
    """Why the kernels do not take weights of these sizes; None if they do."""
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if max(hidden, columns) > MAX_HIDDEN:
        return f"rows of {max(hidden, columns)} elements do not fit in the registers"
    if neurons >= MAX_NEURONS:
        return f"{neurons} neurons are too many"
    return None


def gated_mlp_triton(call: Call) -> Tensor:
    """:func:`catsparse.kernels.gated_mlp` for ``[T, H]``, T at most 4; see :func:`fits_triton`."""
    call = call._replace(x=call.x.contiguous()).made_contiguous()
    x = call.x
    launch = Launch.of(call)
    y = x.new_empty((*x.shape[:-1], call.columns))
    total = x.numel() // x.shape[-1] * launch.words(call.columns) * fields(launch.weights)
    partial = torch.empty(launch.programs, total, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if call.preview is None and call.product_threshold is None:
            launches.run_stream(call, launch, partial)
        else:
            kept, gate = launches.decide(call, launch)
            launches.read_kept(call, launch, kept, gate, partial)
        launches.add_up(call, launch, partial, y)
    return y


def mask_triton(z: Tensor, u: Tensor, threshold: Tensor, act: str, mean: Tensor | None) -> Tensor:
    """|act(z)| > threshold ? act(z) u - mean : 0, in one pass; what a masked MLP's down gets.

    Args:
        z: ``[..., I]`` gate before its activation, contiguous, of any dtype.
        u: ``[..., I]`` up projection, contiguous; the result is written over it.
        threshold: fp32, 0-d or ``[I]``.
        mean: fp32 ``[I]`` or None.
    """
    import triton

    from .mask import mask_kernel

    total = z.numel()
    with torch.cuda.device_of(z):
        mask_kernel[(triton.cdiv(total, MASK_BLOCK),)](
            z,
            u,
            threshold.contiguous(),
            None if mean is None else mean.contiguous(),
            u,
            total,
            z.shape[-1],
            ACT=act,
            PER_NEURON=threshold.dim() == 1,
            HAS_MEAN=mean is not None,
            BLOCK=MASK_BLOCK,
        )
    return u


def fits_triton(call: Call) -> bool:
    """Whether the kernels take the call, in groups of ``MAX_TOKENS`` tokens, and every pointer they
    get covers what they read."""
    x, w_gate, w_up, w_down_t = call[:4]
    return (
        belong_together(call)
        and why_not_triton_sizes(x.dtype, x.shape[-1], w_gate.shape[0], call.columns) is None
        and all(w.stride(1) == 1 or w.shape[1] == 1 for w in (w_gate, w_up, w_down_t))
        and all(w.dtype != torch.uint8 or _in_words(w) for w in (w_gate, w_up, w_down_t))
        and (call.preview is None or _in_words(call.preview))
    )


def _in_words(preview: Tensor) -> bool:
    """Whether rows can be read as 32-bit words where they are; a copy a call would cost more than
    it saves."""
    return (
        preview.is_contiguous()
        and preview.data_ptr() % PREVIEW_BYTES == 0
        and preview.storage_offset() % 4 == 0
    )
