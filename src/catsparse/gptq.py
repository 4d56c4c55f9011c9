"""Rounding weights with data: GPTQ (Frantar et al., arXiv 2210.17323, Algorithm 1).

Inputs are rounded one after the other, and what each rounding misses is taken up by those that are
still to come, so that the layer's outputs on calibration tokens change least. No library rounds
W_down as the kernels read it, by input with a scale for every 64 outputs, so the solver is here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .batches import Batch
from .errors import CatsparseError
from .inputs import block_of
from .kernels import FORMATS
from .kernels.formats import row_scale
from .kernels.preview import GROUP, pack_int4, round_groups
from .observation import evaluating
from .quantized_linear import QuantizedLinear
from .strict_json import shorten

_DAMPING = (0.01, 0.1, 1.0)  # of the mean diagonal; more where the one before was too little
_COLUMNS = GROUP  # inputs whose errors are spread at once


class _Seen(Exception):
    """The layers of interest have seen their inputs."""


@torch.no_grad()
def round_with(
    weight: Tensor, hessian: Tensor, weights: str, by_input: bool = False
) -> tuple[Tensor, Tensor]:
    """Round a weight so that ``tr((W - Q) H (W - Q)^T)`` is small.

    Scales of int8 and fp8 are those of round to nearest by output, by input of what a column has
    become; int4's are chosen for a group when its first input's turn has come.

    Args:
        weight: W ``[out, in]``, any float dtype.
        hessian: H ``[in, in]`` fp32, the sum of x x^T over calibration tokens. An input that is 0
            on all of them takes no part.
        weights: ``int8``, ``fp8`` or ``int4``.
        by_input: whether the rows that the packed matrix has are inputs.

    Returns:
        The packed matrix and its scales, as :func:`catsparse.kernels.quantize` gives them.

    Raises:
        CatsparseError: W or H is not finite.
    """
    w = weight.detach().float().clone()
    spread = _spread(hessian, w)
    codes = torch.empty_like(w)
    scales: list[Tensor] = []
    of_rows = None
    if weights != "int4" and not by_input:
        of_rows = row_scale(w, weights)
    for first in range(0, w.shape[1], _COLUMNS):
        columns = slice(first, min(first + _COLUMNS, w.shape[1]))
        part, own = w[:, columns], spread[columns, columns]
        if weights == "int4" and not by_input:
            scales.append(round_groups(part)[1])
        missed = torch.empty_like(part)
        for j in range(part.shape[1]):
            column = part[:, j]
            if by_input:
                rounded, scale = _round_row(column[None], weights)
                scales.append(scale)
                code, value = (t[0] for t in rounded)
            else:
                scale = of_rows if of_rows is not None else scales[-1][:, 0].float()
                code, value = _round(column, scale, weights)
            codes[:, first + j] = code
            missed[:, j] = (column - value) / own[j, j]
            part[:, j:] -= missed[:, j, None] * own[j, j:]
        w[:, columns.stop :] -= missed @ spread[columns, columns.stop :]
    return _pack(codes, scales if of_rows is None else [of_rows], weights, by_input)


def _spread(hessian: Tensor, w: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H, damped: row i tells how the inputs after i
    take up what i's rounding misses."""
    h = hessian.float().clone()
    if not (bool(h.isfinite().all()) and bool(w.isfinite().all())):
        raise CatsparseError(
            "a weight or an activation is not finite; load the model in bf16 or fp32"
        )
    mean = float(h.diagonal().mean()) or 1.0
    for damping in _DAMPING:
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(upper.isfinite().all()):
            return upper
    return torch.eye(len(h), device=h.device)  # round to nearest


def _round(values: Tensor, scale: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """(codes, what they stand for), both fp32."""
    codes = values / scale
    if weights == "int4":
        codes = codes.round().clamp_(-8, 7).nan_to_num_(0.0)
    elif weights == "int8":
        codes = codes.round().clamp_(-127, 127)
    else:
        codes = codes.clamp_(-448, 448).to(FORMATS["fp8"]).float()
    return codes, codes * scale


def _round_row(row: Tensor, weights: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(codes, values), and scales, of one row ``[1, C]`` of a packed matrix by itself."""
    if weights == "int4":
        codes, scale = round_groups(row)
        return (codes, codes * scale.float().repeat_interleave(GROUP, dim=1)), scale
    scale = row_scale(row, weights)
    return _round(row, scale[:, None], weights), scale


def _pack(
    codes: Tensor, scales: list[Tensor], weights: str, by_input: bool
) -> tuple[Tensor, Tensor]:
    rows = codes.t().contiguous() if by_input else codes
    if weights == "int4":
        return pack_int4(rows.to(torch.int8), torch.cat(scales, dim=0 if by_input else 1))
    return rows.to(FORMATS[weights]), torch.cat(scales)


def round_model(
    model: Any,
    found: dict[str, bool],
    weights: str,
    batches: Iterable[Batch],
    progress: bool = True,
) -> None:
    """Put :class:`QuantizedLinear` layers in place of those of ``found`` (name: by input), rounded
    with the inputs that ``batches`` give them, block by block: each sees what the packed ones
    before it make. A block costs a forward pass up to its end.

    Raises:
        CatsparseError: a layer saw no token, or numbers that are not finite; the model then has its
            own layers again, which are kept until the end.
    """
    batches = list(batches)
    if not batches:
        raise CatsparseError("there is no text to round the weights with; give some windows")
    blocks: dict[str, list[str]] = {}
    head = model.get_output_embeddings()
    for name in found:
        last = model.get_submodule(name) is head
        blocks.setdefault(name if last else block_of(model, name), []).append(name)
    before = {name: model.get_submodule(name) for name in found}
    console = Console(stderr=True)
    shown = track(
        blocks.items(),
        "rounding",
        len(blocks),
        console=console,
        transient=True,
        disable=not progress,
    )
    try:
        for block, names in shown:
            seen = _hessians(model, block, names, batches)
            for name in names:
                if name not in seen:
                    raise CatsparseError(
                        f"no token went through {shorten(name)}, so its weights cannot be rounded "
                        "with data; quantize without"
                    )
                packed, scale = round_with(before[name].weight, seen[name], weights, found[name])
                layer = QuantizedLinear.of_rounded(
                    before[name], weights, packed, scale, found[name]
                )
                model.set_submodule(name, layer)
    except BaseException:
        for name, layer in before.items():
            model.set_submodule(name, layer)
        raise


@torch.no_grad()
def _hessians(model: Any, block: str, names: list[str], batches: list[Batch]) -> dict[str, Tensor]:
    """H ``[in, in]`` fp32 of each layer of a block; those with the very same input share it."""
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None
    shared: dict[int, tuple[Tensor, str]] = {}  # by input, within a batch

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if id(x) in shared:
                sums[name] = sums[shared[id(x)][1]]
                return
            shared[id(x)] = x, name  # held, so that the number is no other's
            rows = x.reshape(-1, x.shape[-1]).float()
            if mask is not None and len(rows) == mask.numel():
                rows = rows[mask.flatten().to(rows.device)]
            old = sums.get(name)
            sums[name] = rows.T @ rows if old is None else old.addmm_(rows.T, rows)

        return hook

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Seen

    with ExitStack() as hooks:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(note(name))
            hooks.callback(handle.remove)
        hooks.callback(model.get_submodule(block).register_forward_hook(stop).remove)
        hooks.enter_context(evaluating(model))
        for batch in batches:
            shared.clear()
            found = batch.get("attention_mask")
            mask = None if found is None or bool(found.bool().all()) else found.bool()
            device = model.get_input_embeddings().weight.device
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            options = {"use_cache": False}
            if "use_cache" not in inspect.signature(model.forward).parameters:
                options = {}
            with suppress(_Seen):
                model(**inputs, **options)
    return sums
