"""Perplexity with its standard error, dense beside sparse on the same windows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .errors import CatsparseError
from .judge import scored_sparse, standard_error
from .meter import PositionSparsity
from .observation import evaluating
from .surgery import run_dense


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token.

    Attributes:
        value: the perplexity.
        standard_error: of ``value``, from the spread of the windows' means.
        losses: ``[N]`` fp64, each window's mean negative log-likelihood in nats.
    """

    value: float
    standard_error: float
    losses: Tensor


@dataclass(frozen=True)
class Evaluation:
    """A sparse model's quality beside its dense self.

    Attributes:
        tokens: tokens scored.
        perplexity, dense_perplexity: of the sparse and the dense forward.
        rise: perplexity over dense perplexity, less 1.
        rise_standard_error: of ``rise``, from paired windows.
        sparsity: fraction of neurons dropped by the gate over all sites; of inputs where no gated
            MLP is sparse.
        down_sparsity: fraction of W_down's rows not read; more only with a second decision.
        bytes_skipped: fraction of the scope's weight bytes decode need not read.
        sites: fraction of neurons dropped by the gate, by site.
        down_sites: fraction of W_down's rows not read, by site.
        input_sparsity: fraction of inputs dropped, over linear layers by weight; None without any.
        inputs: fraction of inputs dropped, by sparse linear layer.
        positions: fraction of neurons dropped by the gate, by position in the window and by site;
            None where no site sees whole windows.
    """

    tokens: int
    perplexity: Perplexity
    dense_perplexity: Perplexity
    rise: float
    rise_standard_error: float
    sparsity: float
    down_sparsity: float
    bytes_skipped: float
    sites: dict[str, float]
    down_sites: dict[str, float]
    input_sparsity: float | None
    inputs: dict[str, float]
    positions: PositionSparsity | None


def perplexity(
    model: Any, windows: Tensor, batch_size: int = 4, progress: bool = True, label: str = "scoring"
) -> Perplexity:
    """Score each window of ``windows`` ``[N, L]`` on its own (its first token is only context).

    Raises:
        CatsparseError: no window, or a loss that is not finite.
    """
    if windows.dim() != 2 or windows.numel() == 0 or windows.shape[1] < 2:
        raise CatsparseError("windows must be token ids [N, L] with N >= 1 and L >= 2")
    batches = windows.split(batch_size)
    shown = track(
        batches, label, console=Console(stderr=True), transient=True, disable=not progress
    )
    losses = []
    with evaluating(model), torch.no_grad():
        for ids in shown:
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, targets in zip(logits, ids, strict=True):
                losses.append(F.cross_entropy(row[:-1].float(), targets[1:]).double().cpu())
    values = torch.stack(losses)
    mean = float(values.mean())
    if not math.isfinite(mean):
        raise CatsparseError("the loss is not finite; load the model in bf16 or fp32")
    return Perplexity(math.exp(mean), math.exp(mean) * standard_error(values), values)


def rise_of(found: Perplexity, dense: Perplexity) -> tuple[float, float]:
    """``found`` over ``dense``, less 1, and its standard error, from paired windows."""
    ratio = found.value / dense.value
    return ratio - 1, ratio * standard_error(found.losses - dense.losses)


def evaluate(
    model: Any,
    windows: Tensor,
    batch_size: int = 4,
    progress: bool = True,
    dense: Perplexity | None = None,
) -> Evaluation:
    """Perplexity of a sparse model and of its dense forward.

    Every token is thresholded, whatever the prefill policy: the policy ``dense`` would hide the
    loss that decode meets.

    Args:
        model: a sparse model.
        windows: token ids ``[N, L]``.
        dense: the dense perplexity on the same windows, if it is known already.

    Raises:
        CatsparseError: what :func:`perplexity` refuses, or a layer that is meant to be sparse ran
            dense.
    """
    if dense is None:
        with run_dense(model):
            dense = perplexity(model, windows, batch_size, progress, "scoring dense")
    with scored_sparse(model, positions=True) as meter:
        sparse = perplexity(model, windows, batch_size, progress, "scoring sparse")
    rise, rise_error = rise_of(sparse, dense)
    return Evaluation(
        tokens=windows.shape[0] * (windows.shape[1] - 1),
        perplexity=sparse,
        dense_perplexity=dense,
        rise=rise,
        rise_standard_error=rise_error,
        sparsity=meter.sparsity,
        down_sparsity=meter.down_sparsity,
        bytes_skipped=meter.bytes_skipped,
        sites=meter.sites,
        down_sites=meter.down_sites,
        input_sparsity=meter.input_sparsity,
        inputs=meter.inputs,
        positions=meter.positions,
    )
