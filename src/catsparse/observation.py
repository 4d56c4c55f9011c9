"""Observation: forward passes with hooks -> a :class:`~catsparse.calibration.Calibration`.

The model is never edited: hooks come off and training flags return, whatever happens.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .calibration import Calibration
from .config import Provenance, write_atomic
from .data import pack_texts
from .errors import CatsparseError
from .kernels import ACTIVATIONS
from .sites import NearMiss, Site, describe, find_sites
from .statistics import SiteStatistics

Batch = dict[str, Tensor]
Data = Tensor | Iterable[Batch] | Sequence[str]

_SAVE_SECONDS = 20.0


def calibrate(
    model: nn.Module,
    data: Data,
    tokenizer: Any = None,
    *,
    tokens: int = 100_000,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    data_name: str = "in-memory data",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Calibration:
    """Run ``model`` over calibration tokens and count its gated MLPs' activations.

    Args:
        model: a causal language model with gated MLPs; left bit-for-bit unchanged.
        data: token ids ``[N, L]``, or batches with ``input_ids`` and perhaps ``attention_mask``
            (padding is not counted), or texts, which need ``tokenizer``.
        tokenizer: turns texts into tokens; texts are packed into windows of ``seq_len``.
        tokens: how many tokens of the texts to use, drawn with ``seed``.
        seq_len: window length for texts.
        batch_size: windows a forward pass, for token ids and texts.
        data_name: recorded in the artifact.
        checkpoint: file that keeps partial statistics; an interrupted run with the same data
            goes on from there, and the file is removed at the end.
        progress: show a progress bar on stderr.

    Raises:
        CatsparseError: no gated MLP, no data, or activations that are not finite.
    """
    sites = require_sites(model)
    batches, total, provenance = _as_batches(
        data, tokenizer, tokens, seq_len, batch_size, seed, data_name, _dtype_name(model)
    )
    run = _Run(model, sites, Path(checkpoint) if checkpoint else None, provenance)
    shown = track(
        batches,
        "calibrating",
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not progress,
    )
    with _hooks(model, sites, run), evaluating(model), torch.no_grad():
        for batch in shown:
            run.step(batch)
    return run.finish()


def require_sites(model: nn.Module) -> list[Site]:
    """The model's sites.

    Raises:
        CatsparseError: there is none, with what was looked for and why near misses were refused.
    """
    if any(hasattr(module, "catsparse_threshold") for module in model.modules()):
        raise CatsparseError("the model is already sparse; call catsparse.densify(model) first")
    sites, misses = find_sites(model)
    if not sites:
        raise CatsparseError(_nothing_found(model, misses))
    return sites


def _nothing_found(model: nn.Module, misses: list[NearMiss]) -> str:
    looked_for = "down(act(gate(x)) * up(x)), separate or fused gate and up"
    near = describe(misses) if misses else "no module comes near"
    return f"{type(model).__name__} has no gated MLP: looked for {looked_for}; {near}"


class _Run:
    """One calibration under way: statistics, the tokens hashed so far, and its checkpoint."""

    def __init__(
        self, model: nn.Module, sites: list[Site], checkpoint: Path | None, provenance: Provenance
    ) -> None:
        self.model, self.checkpoint, self.provenance = model, checkpoint, provenance
        self.sites = {site.name: site for site in sites}
        self.statistics = {
            s.name: SiteStatistics.empty(s.intermediate_size, _site_device(model, s)) for s in sites
        }
        self.rows: Tensor | None = None  # which of the batch's tokens count; None for all
        self.batch_tokens = 0
        self.seen = 0
        self.hash = _model_hash(model, sites, provenance.dtype)
        self._options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1  # the head is not needed
        self._resume = self._saved_state()
        self._skipping = self._resume is not None
        self._saved_at = time.monotonic()

    def step(self, batch: Batch) -> None:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        for part in (ids, mask):
            self.hash.update(b"all" if part is None else _bytes(part))
        counted = ids.numel() if mask is None else int(mask.sum())
        if self._skipping:
            self._skip(counted)
            return
        device = _input_device(self.model)
        rows = None if mask is None or bool(mask.bool().all()) else mask.bool().flatten()
        self.rows = rows if rows is None else rows.to(device)
        self.batch_tokens = ids.numel()
        # Labels would only make the model compute a loss.
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        self.model(**inputs, **self._options)
        self.seen += counted
        if self.checkpoint and time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def count(self, site: Site, gate: Tensor, up: Tensor, hidden: Tensor) -> None:
        neurons = site.intermediate_size
        g = ACTIVATIONS[site.act](gate).reshape(-1, neurons)
        u, h = up.reshape(-1, neurons), hidden.reshape(-1, neurons)
        if self.rows is not None:
            if len(g) != self.batch_tokens:
                raise CatsparseError(
                    f"{site.name} is given {len(g)} of the batch's {self.batch_tokens} tokens, so "
                    "padding cannot be told apart; calibrate on windows without padding"
                )
            rows = self.rows.to(g.device)
            g, u, h = g[rows], u[rows], h[rows]
        self.statistics[site.name].update(g, u, h)

    def result(self) -> Calibration:
        """What was counted so far; a site that saw no token (a vision tower's, say) is left out."""
        counted = {name: s.to("cpu") for name, s in self.statistics.items() if s.tokens}
        sites = {name: self.sites[name] for name in counted}
        return Calibration(sites, counted, replace(self.provenance, tokens=self.seen))

    def finish(self) -> Calibration:
        if self._skipping:
            raise CatsparseError(
                f"{self.checkpoint} holds a run over more or other data; delete it to start again"
            )
        result = self.result()
        if not result.provenance.tokens:
            raise CatsparseError("there is no calibration token; give more text")
        for name, statistics in result.statistics.items():
            if not statistics.is_finite:
                raise CatsparseError(
                    f"the activations of {name} are not finite; load the model in bf16 or fp32"
                )
        if not result.sites:
            raise CatsparseError("no token reached any gated MLP; check the model's inputs")
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        return result

    def save(self) -> None:
        assert self.checkpoint is not None
        result = self.result()
        metadata = result.metadata() | {"catsparse.hash": self.hash.hexdigest()}
        tensors = result.tensors()
        write_atomic(self.checkpoint, lambda path: save_file(tensors, path, metadata))
        self._saved_at = time.monotonic()

    def _saved_state(self) -> tuple[Calibration, str] | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        saved = Calibration.load(self.checkpoint)
        with safe_open(self.checkpoint, framework="pt") as file:
            return saved, (file.metadata() or {}).get("catsparse.hash", "")

    def _skip(self, counted: int) -> None:
        """Pass over a batch that the checkpoint already holds."""
        assert self._resume is not None
        saved, digest = self._resume
        self.seen += counted
        if self.seen > saved.provenance.tokens:
            raise CatsparseError(
                f"{self.checkpoint} holds a run over other data; delete it to start again"
            )
        if self.hash.hexdigest() == digest:
            for name, statistics in saved.statistics.items():
                device = self.statistics[name].histogram.device
                self.statistics[name] = statistics.to(device)
            self._skipping = False


@contextmanager
def _hooks(model: nn.Module, sites: list[Site], run: _Run) -> Iterator[None]:
    """Watch gate and up outputs and the down projection's input while the model runs."""
    handles: list[Any] = []
    try:
        for site in sites:
            module = model.get_submodule(site.name)
            seen: dict[str, Tensor] = {}
            handles += _watch(module, site, seen, run)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, site: Site, seen: dict[str, Tensor], run: _Run) -> list[Any]:
    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(child: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    def consume(child: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = seen.pop("gate")
        gate, up = gate.chunk(2, dim=-1) if site.up is None else (gate, seen.pop("up"))
        run.count(site, gate, up, args[0])

    handles = [
        module.get_submodule(site.gate).register_forward_hook(keep("gate")),
        module.get_submodule(site.down).register_forward_pre_hook(consume),
    ]
    if site.up is not None:
        handles.append(module.get_submodule(site.up).register_forward_hook(keep("up")))
    return handles


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) that gives every module its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _as_batches(
    data: Data,
    tokenizer: Any,
    tokens: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    data_name: str,
    dtype: str,
) -> tuple[Iterable[Batch], int | None, Provenance]:
    """(batches, their number if known, provenance)."""
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise CatsparseError("calibration data must be token ids, batches or a list of texts")
    if isinstance(data, Sequence) and data and all(isinstance(text, str) for text in data):
        if tokenizer is None:
            raise CatsparseError("texts need a tokenizer: calibrate(model, texts, tokenizer)")
        data = pack_texts(data, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed)
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.numel() == 0 or data.is_floating_point():
            raise CatsparseError("token ids must be an integer tensor [windows, length]")
        batches = [{"input_ids": ids} for ids in data.split(batch_size)]
        provenance = Provenance(data_name, data.numel(), data.shape[1], seed, dtype)
        return batches, len(batches), provenance
    count = len(data) if isinstance(data, Sequence) else None
    given = cast("Iterable[Batch]", data)
    return given, count, Provenance(data_name, 0, 0, seed, dtype)


def _model_hash(model: nn.Module, sites: list[Site], dtype: str) -> Any:
    """Tells models apart: their sites, dtype and a little of each site's weights."""
    digest = hashlib.sha256(repr((sites, dtype)).encode())
    for site in sites:
        weight: Any = getattr(
            model.get_submodule(site.name).get_submodule(site.gate), "weight", None
        )
        readable = weight is not None and type(weight) in (Tensor, nn.Parameter)
        if readable and weight.device.type != "meta":
            digest.update(_bytes(weight.detach().flatten()[:64].float()))
    return digest


def _bytes(values: Tensor) -> bytes:
    array = values.cpu().contiguous().numpy()
    return repr(array.shape).encode() + array.tobytes()


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _input_device(model: nn.Module) -> torch.device:
    device = getattr(model, "device", None) or next(model.parameters()).device
    # Offloaded weights are on meta; accelerate's hook moves inputs to where it computes.
    return torch.device("cpu") if device.type == "meta" else device


def _site_device(model: nn.Module, site: Site) -> torch.device:
    device = next(model.get_submodule(site.name).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
