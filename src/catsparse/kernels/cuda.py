"""``catsparse::gated_mlp`` on NVIDIA GPUs: which kernel takes a call, plans by shape, the launch.

cuda.cu serves Hopper and later, for rows that are whole 16-byte pieces; what it does not take goes
to the Triton kernels, and what those do not take to the torch reference. With many tokens, which
together keep nearly every row, torch's matmuls are faster, with the mask in one pass between them
(triton/mask.py). Nothing depends on the data but what is read, so calls can be captured in a CUDA
graph, and sums have a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Call, belong_together
from .formats import dequantize_weight
from .nvrtc import Kernel, compile_source, find_kernel, load_module, why_not_nvrtc
from .preview import PreviewKind, dequantize, preview_kind
from .reference import ACTIVATIONS, MAX_OP_TOKENS, gated_mlp_reference, keep_mask
from .stream import (
    DTYPES,
    MOST_PIECES,
    NUMBERS,
    PIECE,
    STREAM,
    WEIGHTS,
    MatrixArgument,
    Norm,
    NormArgument,
    Plan,
    Storage,
    arch,
    defines,
    find_plan,
    group_size,
    shared_bytes,
    template,
    whole_pieces,
)
from .sums import LEFT, SUM, find_sum, launch_sum
from .tiles import (
    OWN,
    PREVIEW,
    TILE,
    PreviewArgument,
    Tiles,
    digit_bytes,
    find_ring,
    tile_defines,
)
from .triton import MAX_TOKENS as TRITON_TOKENS
from .triton import fits_triton, gated_mlp_triton, mask_triton, why_not_triton

SOURCE = Path(__file__).with_name("cuda.cu")
# The most tokens for which cuda.cu beats torch's dense matmuls even if nothing is dropped, measured
# by `catsparse bench op` on an H200 (docs/kernels.md): one launch, in fp32 two.
AUTO_TOKENS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 8}
MOST_NEURONS = 2**24  # a list entry holds the neuron and four bits
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


class _Problem(ctypes.Structure):
    """``Problem`` of cuda.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, MatrixArgument) for name in ("w_gate", "w_up", "w_down_t")),
        *((name, ctypes.c_void_p) for name in ("threshold", "product_threshold", "mean")),
        ("partial", ctypes.c_void_p),
        ("norm", NormArgument),
        *((name, ctypes.c_int) for name in ("tokens", "hidden", "neurons", "columns")),
        *((name, ctypes.c_int) for name in ("threshold_stride", "product_stride")),
        *((name, ctypes.c_int) for name in ("capacity", "pitch", "stage", "stages", "early")),
    ]


class _PreviewProblem(ctypes.Structure):
    """``Problem`` of cuda.cu with a preview."""

    _fields_ = [("plain", _Problem), ("preview", PreviewArgument)]


@dataclass(frozen=True)
class _Built:
    """Both kernels for one kind of call, and what follows from its sizes."""

    main: Kernel
    sum: Kernel
    blocks: int
    capacity: int
    pitch: int
    stage: int
    stages: int


def why_not_cuda(device: torch.device) -> str | None:
    """Why ``device`` cannot run cuda.cu; None if it can."""
    if device.type != "cuda":
        return f"no kernel for {device.type}"
    reason = why_not_nvrtc()
    if reason is None and torch.cuda.get_device_capability(device) < (9, 0):
        reason = f"{torch.cuda.get_device_name(device)} is older than compute capability 9.0"
    return reason or _why_not_compiled(arch(device))


@functools.cache
def _why_not_compiled(target: str) -> str | None:
    """Whether this NVRTC knows the GPU at all: found out here, not in the middle of a call."""
    try:
        plan, storage = Plan(32, 1, 1), Storage(torch.bfloat16)
        _compile(_defines(storage, "silu", 1, plan, 1, True, False), target)
    except RuntimeError as error:
        return f"cuda.cu does not compile for {target}: {str(error).splitlines()[0]}"
    return None


def _compile(constants: tuple[tuple[str, str], ...], target: str) -> bytes:
    return compile_source((NUMBERS, WEIGHTS, STREAM, SUM, PREVIEW, SOURCE), constants, target)


def _defines(
    storage: Storage,
    act: str,
    tokens: int,
    plan: Plan,
    columns: int,
    even: bool,
    second: bool,
    tiles: Tiles | None = None,
) -> tuple[tuple[str, str], ...]:
    """The constants of cuda.cu and preview.cuh."""
    own = {"ACT": _ACTIVATION_NUMBERS[act], "CHUNKS": plan.chunks, "SECOND": int(second)}
    own |= {"PRODUCTS": int(tiles is not None and tiles.kind.products)}
    own |= {"OWN": int(storage.weights == "int4"), **tile_defines(tiles)}
    return defines(storage, tokens, plan, columns, even, **own)


def auto_tokens(dtype: torch.dtype, row_bytes: int, weights: str | None = None) -> int:
    """Calls of up to so many tokens run cuda.cu by themselves, longer ones dense matmuls.

    Those need packed weights in ``dtype``: five bytes written and read for each of int8.
    """
    group = group_size(row_bytes)
    if weights is not None:
        return MAX_OP_TOKENS
    return AUTO_TOKENS[dtype] if group == 4 else group


def gated_mlp_cuda(call: Call, backend: str = "auto") -> Tensor:
    """:func:`catsparse.kernels.gated_mlp` for CUDA tensors, skipping what is dropped.

    Backend ``auto`` runs dense matmuls above :func:`auto_tokens`; ``cuda`` and ``triton`` run
    their kernel for any number, in groups of four or fewer, each with its own union of masks.
    """
    x = call.x
    run: Callable[[Call], Tensor]
    if backend != "triton" and why_not_cuda(x.device) is None and _fits(call):
        few = auto_tokens(x.dtype, _row_bytes(call), call.weights)
        many = x.numel() > few * x.shape[-1]
        if backend == "auto" and many and why_not_triton(x.device) is None:
            return _masked_matmuls(call)
        group, run = group_size(_row_bytes(call)), launch
    elif why_not_triton(x.device) is None and fits_triton(call):
        group, run = TRITON_TOKENS, gated_mlp_triton
    else:
        return gated_mlp_reference(*call)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] <= group:
        y = run(call._replace(x=rows))
    else:
        y = torch.cat([run(call._replace(x=part)) for part in rows.split(group)])
    return y.view(*x.shape[:-1], call.columns)


def launch(
    call: Call,
    plan: Plan | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """cuda.cu on x ``[T, H]``, T at most :func:`group_size`.

    Args:
        plan: another than the rule's. norm: of x, on its way in.
        residual: ``[T, H_out]`` in x's dtype, added to the rounded result. out: where that goes.
        early: read weights before the kernel ahead has ended, which must not be writing them.
    """
    call = call.made_contiguous()
    x, w_gate, w_up, w_down_t, threshold, act, mean, bias, product, preview, scale = call[:11]
    tokens, hidden = x.shape
    neurons, columns = w_down_t.shape[0], call.columns
    x = _aligned(x)
    most = template(tokens)
    storage = Storage(x.dtype, call.weights)
    plan = plan or find_plan(_row_bytes(call), most, call.weights)
    if storage.weights == "int4":
        preview, scale = w_gate, call.gate_scale
    kind = None if preview is None else preview_kind(preview, neurons, hidden)
    second = product is not None
    built = _build(x.device, storage, act, most, hidden, neurons, columns, plan, second, kind)
    partial = torch.empty(built.blocks, tokens * columns, dtype=torch.float32, device=x.device)
    y = x.new_empty(tokens, columns) if out is None else out
    problem: ctypes.Structure = _Problem(
        x.data_ptr(),
        MatrixArgument.of(w_gate, call.gate_scale),
        MatrixArgument.of(w_up, call.up_scale),
        MatrixArgument.of(w_down_t, call.down_scale),
        threshold.data_ptr(),
        None if product is None else product.data_ptr(),
        None if mean is None else mean.data_ptr(),
        partial.data_ptr(),
        NormArgument.of(norm),
        tokens,
        hidden,
        neurons,
        columns,
        threshold.dim(),
        0 if product is None else product.dim(),
        built.capacity,
        built.pitch,
        built.stage,
        built.stages,
        int(early),
    )
    if preview is not None and scale is not None:
        argument = PreviewArgument(preview.data_ptr(), scale.data_ptr())
        problem = _PreviewProblem(problem, argument)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        built.main.launch(built.blocks, problem, stream, early=True)
        launch_sum(built.sum, partial, bias, residual, y)
    return y


def _masked_matmuls(call: Call) -> Tensor:
    """Dense matmuls, with the mask between them, in one pass where it is plain; reads everything.

    The gate stays in fp32, as rounded to bf16 it would be decided otherwise than by the kernel.
    Packed weights are made floats one matrix at a time.
    """
    x, w_gate, w_up, w_down_t, threshold, act, mean, bias, product, preview, scale = call[:11]
    rows = x.reshape(-1, x.shape[-1])
    gate_floats = dequantize_weight(w_gate, call.gate_scale, x.dtype)
    gate = torch.mm(rows, gate_floats.t(), out_dtype=torch.float32)
    del gate_floats
    u = F.linear(rows, dequantize_weight(w_up, call.up_scale, x.dtype))
    if product is None and preview is None:
        h = mask_triton(gate, u, threshold, act, mean)
    else:
        g = decided = ACTIVATIONS[act](gate)
        if preview is not None and scale is not None:
            copy = dequantize(preview, scale, x.shape[-1], x.dtype)
            decided = torch.mm(rows, copy.t(), out_dtype=torch.float32)
            foretold = decided.split(w_gate.shape[0], dim=-1)
            decided = ACTIVATIONS[act](foretold[0])
            if call.previews_products:
                decided = decided * foretold[1]
        h = g * u.float()
        keep = keep_mask(decided, h, threshold, product)
        h = torch.where(keep, h if mean is None else h - mean, 0.0).to(x.dtype)
    w_down_t = dequantize_weight(w_down_t, call.down_scale, x.dtype)
    y = F.linear(h, w_down_t.t(), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])


def _row_bytes(call: Call) -> int:
    """Of x's rows or the output's."""
    return max(call.x.shape[-1], call.columns) * call.x.element_size()


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % PIECE == 0 else x.clone()


@functools.cache
def _build(
    device: torch.device,
    storage: Storage,
    act: str,
    tokens: int,
    hidden: int,
    neurons: int,
    columns: int,
    plan: Plan,
    second: bool,
    kind: PreviewKind | None,
) -> _Built:
    """Compile (once for equal constants), load, and lay out the shared memory."""
    limit = shared_bytes(device)
    blocks = min(torch.cuda.get_device_properties(device).multi_processor_count, neurons)
    capacity = -(-neurons // blocks)
    widest = max(hidden, columns)
    row, x_row = storage.staged_bytes(widest), widest * storage.dtype.itemsize
    lists = _list_bytes(capacity, tokens, plan, kind, storage)
    lists += 0 if kind is None else digit_bytes(storage.dtype, hidden, tokens)
    rows = plan.rows
    while rows > 1 and not find_ring(limit - lists - LEFT, rows, row, hidden, kind).holds(4):
        rows //= 2
    ring = find_ring(limit - lists - LEFT, rows, row, hidden, kind)
    tiles, stage, stages = ring.tiles, ring.stage, ring.stages
    chunks = _chunks(capacity, plan, rows if tiles is None else TILE)
    each = -(-x_row // (PIECE * plan.threads))
    even = hidden == columns and x_row == plan.threads * each * PIECE
    cut = Plan(plan.threads, rows, chunks)
    code = _compile(_defines(storage, act, tokens, cut, each, even, second, tiles), arch(device))
    module = load_module(code, device)
    return _Built(
        find_kernel(module, "gated_mlp", plan.threads + 32, stages * stage + lists),
        find_sum(module),
        blocks,
        capacity,
        storage.row_bytes(widest),
        stage,
        stages,
    )


def _list_bytes(
    capacity: int, tokens: int, plan: Plan, kind: PreviewKind | None, storage: Storage
) -> int:
    """Partial dots, hidden activations, the list of kept neurons and their scales: see cuda.cu."""
    dots = capacity
    if kind is not None and kind.products:
        chunk = -(-capacity // _chunks(capacity, plan, TILE))
        chunk = -(-chunk // TILE) * TILE
        dots = max(capacity, 2 * chunk)
    scales = 3 if storage.weights in ("int8", "fp8") else 0
    return 4 * (dots * tokens * (plan.threads // 32 | 1) + capacity * (tokens + 1 + scales))


def _chunks(capacity: int, plan: Plan, step: int) -> int:
    """A chunk is decided by a thread a neuron, so it must not be larger than a block."""
    return max(plan.chunks, -(-(capacity + step) // (plan.threads - step)))


def _fits(call: Call) -> bool:
    """Whether cuda.cu takes the call, and every pointer it gets covers what it reads."""
    x, w_gate, w_up, w_down_t = call[:4]
    neurons, hidden, preview = w_gate.shape[0], x.shape[-1], call.preview
    previews = [t for t in (preview, call.preview_scale) if t is not None]
    if call.weights == "int4":  # their scales are copied in pieces, too
        previews += [t for t in (call.gate_scale, call.up_scale, call.down_scale) if t is not None]
    return (
        belong_together(call)
        and (call.weights != "int4" or preview is None)
        and x.dtype in DTYPES
        and neurons < MOST_NEURONS
        and all(whole_pieces(w) for w in (w_gate, w_up, w_down_t, *previews))
        and why_not_sizes(
            x.device,
            x.dtype,
            hidden,
            neurons,
            call.columns,
            None if preview is None else preview_kind(preview, neurons, hidden),
            call.weights,
        )
        is None
    )


@functools.cache
def why_not_sizes(
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    neurons: int,
    columns: int,
    kind: PreviewKind | None = None,
    weights: str | None = None,
) -> str | None:
    """Why cuda.cu does not take weights of these sizes, in ``dtype`` or the format ``weights``, and
    a preview of that kind, on ``device``; None if it does."""
    storage, widest = Storage(dtype, weights), max(hidden, columns)
    row, x_row = storage.staged_bytes(widest), widest * dtype.itemsize
    if any(storage.row_bytes(size) % PIECE for size in (hidden, columns)):
        return f"rows of {hidden} and {columns} elements are not whole 16-byte pieces"
    if weights == "int4":
        kind = OWN
    blocks = min(torch.cuda.get_device_properties(device).multi_processor_count, neurons)
    capacity = -(-neurons // blocks)
    tokens = group_size(x_row)
    lists = _list_bytes(capacity, tokens, find_plan(x_row, tokens, weights), kind, storage)
    lists += 0 if kind is None else digit_bytes(dtype, hidden, tokens)
    ring = find_ring(shared_bytes(device) - lists - LEFT, 1, row, hidden, kind)
    if x_row > MOST_PIECES * PIECE or not ring.holds(2):
        of = "" if kind is None else f"{kind.bits}-bit previews of "
        return f"{of}{neurons} neurons of {max(hidden, columns)} do not fit in shared memory"
    return None
