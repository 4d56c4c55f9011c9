"""Probing: forward passes with one site sparse at a time -> the table of sensitivities."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .calibration import Calibration
from .errors import CatsparseError
from .files import write_atomic
from .methods import SiteThreshold
from .observation import evaluating
from .sensitivities import Sensitivities, check_grid
from .strict_json import shorten
from .surgery import densify, layers_of, sparsify

# Closer where losses rise fast; the first tells what any change costs, however small. 32 MLPs at 7
# sparsities on 2,560 tokens, and the dense passes, are 576 thousand tokens: what 30 evaluations on
# 20 thousand tokens cost.
GRID = (0.05, 0.25, 0.5, 0.65, 0.8, 0.9, 0.97)
TOKENS = 2560

_SAVE_SECONDS = 5.0
# Logits turned into probabilities at once; fp32, so 64 MB for each of a few copies.
_LOGITS = 2**24


def measure_sensitivities(
    model: Any,
    calibration: Calibration,
    windows: Tensor,
    method: str | None = None,
    compensate: bool = True,
    scope: str = "mlp",
    *,
    sparsities: tuple[float, ...] = GRID,
    batch_size: int = 1,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Sensitivities:
    """Measure what the sparsity of each gated MLP, or input, alone costs the whole model.

    The loss is KL(dense || sparse) of the predictions, a mean over all tokens of ``windows``. It is
    far less noisy than the rise of perplexity, as nothing depends on which token really follows.
    Every token is thresholded.

    Costs N (1 + L G) forward passes of a window, L being the number of sites and G that of
    sparsities: for 32 MLPs, the default grid and 2,560 tokens as many tokens as 30 evaluations of
    20,000. Memory for the logits of one batch twice.

    Example::

        calibration.sensitivities = catsparse.measure_sensitivities(model, calibration, windows)
        catsparse.sparsify(model, calibration, bytes_skipped=0.4, allocation="optimal")

    Args:
        model: the dense model that was calibrated; dense again afterwards, whatever happens.
        calibration: its calibration.
        windows: token ids ``[N, L]``, best text that the calibration has not seen.
        method, compensate: how MLPs are made sparse; method None for
            :meth:`Calibration.default_method`.
        scope: ``mlp``, or ``all``: the inputs of the other layers of the MLPs' blocks, too.
        sparsities: where to measure, rising; the last is the highest that an allocation may give.
        batch_size: windows a forward pass.
        checkpoint: file that keeps a partial table; an interrupted run of the same goes on from
            there, and the file is removed at the end.
        progress: show a progress bar on stderr.

    Raises:
        CatsparseError: the model is not the calibrated one, the windows are no windows, a
            prediction is not finite, or the checkpoint is of another run.
    """
    if windows.dim() != 2 or windows.numel() == 0 or windows.is_floating_point():
        raise CatsparseError("windows must be token ids [N, L] with N and L at least 1")
    method = calibration.default_method() if method is None else method
    sparsities = tuple(sparsities)
    check_grid(sparsities)
    thresholds = [calibration.thresholds(s, method, compensate, scope=scope) for s in sparsities]
    names, grid = list(calibration.parts(method, scope)), range(len(sparsities))
    batches = windows.split(batch_size)
    run = _Run(Path(checkpoint) if checkpoint else None, len(batches), len(names), len(grid))
    run.resume(_run_hash(calibration, thresholds, windows, batch_size))
    left = [
        cell
        for cell in itertools.product(range(len(batches)), range(len(names)), grid)
        if cell in run
    ]
    shown = track(
        left,
        "measuring sensitivities",
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    )
    with evaluating(model), torch.no_grad():
        sparsify(model, calibration, sparsities[0], method, compensate, scope=scope)
        try:
            modules = layers_of(model)
            for layer in itertools.chain.from_iterable(modules.values()):
                layer.catsparse_enabled = False
            dense, batch = torch.empty(0), -1
            for cell in shown:
                if cell[0] != batch:
                    batch = cell[0]
                    ids = batches[batch].to(model.device)
                    dense = model(input_ids=ids, use_cache=False).logits
                name = names[cell[1]]
                t = thresholds[cell[2]][name]
                for layer in modules[name]:
                    layer.set_threshold(t.threshold, t.mean, t.product)
                    layer.catsparse_enabled = True
                loss = divergence(dense, model(input_ids=ids, use_cache=False).logits)
                for layer in modules[name]:
                    layer.catsparse_enabled = False
                if not loss >= 0:
                    raise CatsparseError(
                        f"the predictions with {name} sparse are not finite; load the model in "
                        "bf16 or fp32"
                    )
                run.record(cell, loss)
        finally:
            densify(model)
    sizes = torch.tensor([b.numel() for b in batches], dtype=torch.float64)
    table = (run.losses * sizes[:, None, None]).sum(0) / windows.numel()
    run.remove()
    losses = {name: table[i].contiguous() for i, name in enumerate(names)}
    return Sensitivities(
        *(method, compensate, calibration.preview_of(method), windows.numel(), sparsities, losses),
        scope=scope,
    )


def split_windows(windows: Tensor, held_out: int) -> tuple[Tensor, Tensor]:
    """The windows to calibrate on, and the last ``held_out`` (half of them at most) to measure on.

    Raises:
        CatsparseError: there is only one window.
    """
    if held_out and len(windows) < 2:
        raise CatsparseError("one window of text is too little to hold some out; give more text")
    left = len(windows) - min(held_out, len(windows) // 2)
    return windows[:left], windows[left:]


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """KL(dense || sparse) of the next token's distribution, in nats, mean over tokens.

    Args:
        dense, sparse: logits ``[..., V]`` of any dtype; computed in fp32, in pieces.

    Returns:
        At least 0 (rounding may bring it just below); NaN if a logit is.
    """
    rows = max(1, _LOGITS // dense.shape[-1])
    total, count = 0.0, 0
    for p, q in zip(
        dense.flatten(0, -2).split(rows), sparse.flatten(0, -2).split(rows), strict=True
    ):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        count += len(p)
    mean = total / count
    return max(mean, 0.0) if mean == mean else mean


class _Run:
    """One measurement under way: losses by (batch, site, sparsity), NaN where not done yet."""

    def __init__(self, checkpoint: Path | None, batches: int, sites: int, grid: int) -> None:
        self.checkpoint = checkpoint
        self.losses = torch.full((batches, sites, grid), torch.nan, dtype=torch.float64)
        self.hash = ""
        self._saved_at = time.monotonic()

    def __contains__(self, cell: tuple[int, int, int]) -> bool:
        """Whether it is still to be measured."""
        return bool(self.losses[cell].isnan())

    def record(self, cell: tuple[int, int, int], loss: float) -> None:
        self.losses[cell] = loss
        if self.checkpoint and time.monotonic() - self._saved_at > _SAVE_SECONDS:
            metadata = {"catsparse.hash": self.hash}
            write_atomic(
                self.checkpoint, lambda path: save_file({"losses": self.losses}, path, metadata)
            )
            self._saved_at = time.monotonic()

    def resume(self, digest: str) -> None:
        """Take what the checkpoint holds of the run that ``digest`` tells from others."""
        self.hash = digest
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                found = (file.metadata() or {}).get("catsparse.hash")
                losses = file.get_tensor("losses")
        except (OSError, SafetensorError) as error:
            raise CatsparseError(
                f"{self.checkpoint} is damaged ({shorten(error)}); delete it to start again"
            ) from error
        like = (losses.dtype, losses.shape) == (self.losses.dtype, self.losses.shape)
        if found != digest or not like or bool((losses < 0).any()) or bool(losses.isinf().any()):
            raise CatsparseError(
                f"{self.checkpoint} holds another run's sensitivities; delete it to start again"
            )
        self.losses = losses

    def remove(self) -> None:
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)


def _run_hash(
    calibration: Calibration,
    thresholds: list[dict[str, SiteThreshold]],
    windows: Tensor,
    batch_size: int,
) -> str:
    """Tells runs apart. Thresholds and means stand for method, grid, data and the model itself."""
    sites = [*calibration.sites.values(), *calibration.inputs.values()]
    described = (sites, calibration.preview, calibration.provenance.dtype, windows.shape)
    digest = hashlib.sha256(repr((*described, batch_size)).encode())
    digest.update(windows.long().cpu().contiguous().numpy().tobytes())
    for values in _tensors(thresholds):
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(thresholds: list[dict[str, SiteThreshold]]) -> Iterator[Tensor]:
    for by_site in thresholds:
        for t in by_site.values():
            yield t.threshold
            if t.mean is not None:
                yield t.mean
