"""Observation: forward passes with hooks -> a :class:`~catsparse.calibration.Calibration`.

The model is never edited: hooks come off and training flags return, whatever happens.
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .batches import Batch, Data, as_batches
from .calibration import Calibration, GateDecision
from .config import (
    DEFAULT_METHOD,
    GATE_METHODS,
    Provenance,
    check_choice,
    check_preview,
    check_sparsity,
)
from .errors import CatsparseError
from .files import write_atomic
from .inputs import InputSite, find_inputs, weight_norm
from .kernels import ACTIVATIONS, keep_mask
from .products import ProductStatistics
from .quantized_linear import weights_of_model
from .shards import shards_of
from .sites import Site, require_sites
from .statistics import InputStatistics, Magnitudes, SiteStatistics
from .watching import (
    down_norm,
    make_previews,
    model_hash,
    raw_bytes,
    watch,
    watch_inputs,
)

_Counts = TypeVar("_Counts", bound=Magnitudes)

INPUTS = ("mlp", "attention", "all")

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
    preview: int | None = None,
    products_at: float | None = None,
    method: str = DEFAULT_METHOD,
    keep_checkpoint: bool = False,
    inputs: str | None = None,
) -> Calibration:
    """Run ``model`` over calibration tokens and count its gated MLPs' activations.

    Of a model spread over processes (tensor parallel) every rank must call it with the same data,
    and gets the statistics of all neurons.

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
        preview: bits of a copy of each W_gate and W_up, 4 or 8, which is then to decide which
            neurons live: the product that both copies foretell (method ``product`` of
            :func:`catsparse.sparsify`), or the gate's copy alone (the other methods).
        products_at: a sparsity. A second pass over the same data gathers, of the neurons that the
            gate keeps at this sparsity, what a second decision needs (``down_sparsity`` in
            :func:`catsparse.sparsify`).
        method: by which the gate decides in that pass: ``cats``, ``chess`` or ``energy``.
        keep_checkpoint: leave the file, complete, for the caller to remove: if what follows is
            interrupted, the same call then only reads it.
        inputs: also count the inputs of linear layers, for the methods ``teal`` and ``wina`` and
            the scope ``all`` of :func:`catsparse.sparsify`: of the ``mlp``, of ``attention`` (all
            other layers of the MLPs' blocks), or of ``all``.

    Raises:
        CatsparseError: no gated MLP, no data, activations that are not finite, weights that cannot
            be read for a preview or products, data that cannot be read twice for products, or a
            checkpoint of a model spread over processes.
    """
    check_preview(preview)
    check_choice("method", method, GATE_METHODS)
    if inputs is not None:
        check_choice("inputs", inputs, INPUTS)
    if products_at is not None:
        check_sparsity(products_at)
        if isinstance(data, Iterator):
            raise CatsparseError(
                "products_at reads the data twice, and an iterator can be read only once; give a "
                "list of batches or token ids"
            )
    sites = require_sites(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    batches, total, provenance = as_batches(
        *(data, tokenizer, tokens, seq_len, batch_size, seed, data_name),
        *(dtype, weights_of_model(model)),
    )
    previews = make_previews(model, sites, preview)
    shared = [site for site in find_inputs(model, sites) if inputs in _of(site)] if inputs else []
    run = Run(model, sites, Path(checkpoint) if checkpoint else None, provenance, preview, shared)

    def read(label: str) -> None:
        console = Console(stderr=True)
        for batch in track(
            batches, label, total, console=console, transient=True, disable=not progress
        ):
            run.step(batch)

    with (
        watch(model, sites, previews, run.count),
        watch_inputs(model, shared, run.count_inputs),
        evaluating(model),
        torch.no_grad(),
    ):
        read("calibrating")
        if products_at is not None:
            run.begin_products(GateDecision(products_at, method))
            read("gathering products")
    return run.finish(keep_checkpoint)


def _of(site: InputSite) -> tuple[str, str]:
    """The values of ``inputs`` that ask for a site."""
    return ("mlp" if site.of_mlp else "attention"), "all"


class Run:
    """One calibration under way: statistics, the tokens hashed so far, and its checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        checkpoint: Path | None,
        provenance: Provenance,
        preview: int | None,
        inputs: list[InputSite],
    ) -> None:
        self.model, self.checkpoint, self.provenance = model, checkpoint, provenance
        self.sites = {site.name: site for site in sites}
        self.shards = shards_of(model, self.sites)  # there, this rank counts its own neurons
        if checkpoint is not None and self.shards:
            raise CatsparseError(
                "the statistics of a model spread over processes are not kept while it runs; leave "
                "checkpoint out"
            )
        self.statistics = {s.name: self._no_statistics(s) for s in sites}
        self.preview = preview
        self.foretold = {s.name: self._no_products(s, "preview") for s in sites if preview}
        self.inputs = {site.name: site for site in inputs}
        self.input_statistics = {
            s.name: InputStatistics.empty(weight_norm(model, s)) for s in inputs
        }
        # Of the second pass, once it has begun.
        self.products_at: GateDecision | None = None
        self.products: dict[str, ProductStatistics] = {}
        self.thresholds: dict[str, Tensor] = {}
        self.first_pass = 0  # tokens
        self.rows: Tensor | None = None  # which of the batch's tokens count; None for all
        self.batch_tokens = 0
        self.seen = 0  # tokens, over both passes
        self.hash = model_hash(model, sites, provenance.dtype, preview, inputs)
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
            self.hash.update(b"all" if part is None else raw_bytes(part))
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

    def count(
        self, site: Site, gate: Tensor, up: Tensor, hidden: Tensor, foretold_up: Tensor | None
    ) -> None:
        neurons = self.statistics[site.name].neurons
        g = ACTIVATIONS[site.act](gate).reshape(-1, neurons)
        u, h = up.reshape(-1, neurons), hidden.reshape(-1, neurons)
        foretold = None if foretold_up is None else g * foretold_up.reshape(-1, neurons)
        g, u, h = (self._counted(site.name, values) for values in (g, u, h))
        foretold = None if foretold is None else self._counted(site.name, foretold)
        if self.products_at is None:
            self.statistics[site.name].update(g, u, h)
            if foretold is not None:
                self.foretold[site.name].update(foretold, h)
        else:
            keep = keep_mask(g, h, self.thresholds[site.name])
            self.products[site.name].update(h, h, keep)

    def count_inputs(self, site: InputSite, x: Tensor) -> None:
        if self.products_at is None:
            x = x.reshape(-1, site.in_features)
            self.input_statistics[site.name].update(self._counted(site.name, x))

    def _counted(self, name: str, values: Tensor) -> Tensor:
        """The rows of ``values`` ``[T, ...]`` that are no padding."""
        if self.rows is None:
            return values
        if len(values) != self.batch_tokens:
            raise CatsparseError(
                f"{name} is given {len(values)} of the batch's {self.batch_tokens} tokens, so "
                "padding cannot be told apart; calibrate on windows without padding"
            )
        return values[self.rows.to(values.device)]

    def _no_statistics(self, site: Site) -> SiteStatistics:
        shard = self.shards.get(site.name)
        neurons = site.intermediate_size if shard is None else shard.own
        return SiteStatistics.empty(neurons, _site_device(self.model, site))

    def _no_products(self, site: Site, option: str) -> ProductStatistics:
        norm = down_norm(self.model, site, option)
        return ProductStatistics.empty(norm.to(self.statistics[site.name].histogram.device))

    def begin_products(self, decision: GateDecision) -> None:
        """The second pass starts: all batches come once more."""
        if self._resume is not None and self._skipping:
            saved = self._resume[0]
            if (saved.products_at, saved.provenance.tokens) != (decision, self.seen):
                raise self._other_run()
            self._restore(saved)
        result = self._checked()
        self.first_pass, self.products_at = self.seen, decision
        self.hash.update(repr(decision).encode())
        for name, t in result.thresholds(decision.sparsity, decision.method, False).items():
            self.products[name] = self._no_products(self.sites[name], "products_at")
            threshold = self.shards[name].cut(t.threshold) if name in self.shards else t.threshold
            assert threshold is not None
            self.thresholds[name] = threshold.to(self.products[name].histogram.device)

    def result(self) -> Calibration:
        """What was counted so far; a site that saw no token (a vision tower's, say) is left out."""
        counted = {name: self._whole(name, s) for name, s in self.statistics.items() if s.tokens}
        sites = {name: self.sites[name] for name in counted}
        provenance = replace(self.provenance, tokens=self.first_pass or self.seen)
        products, foretold = (
            {name: self._whole(name, part[name]) for name in counted if part}
            for part in (self.products, self.foretold)
        )
        decision = self.products_at
        seen = {name: s.to("cpu") for name, s in self.input_statistics.items() if s.tokens}
        return Calibration(
            *(sites, counted, provenance, self.preview, decision, products, foretold),
            inputs={name: self.inputs[name] for name in seen},
            input_statistics=seen,
        )

    def _whole(self, name: str, statistics: _Counts) -> _Counts:
        """The statistics of all neurons, on the CPU."""
        shard = self.shards.get(name)
        return (statistics if shard is None else shard.whole(statistics)).to("cpu")

    def finish(self, keep_checkpoint: bool) -> Calibration:
        if self._skipping:
            raise self._other_run()
        result = self._checked()
        if self.products_at is not None and self.seen != 2 * self.first_pass:
            raise CatsparseError(
                f"the data gave {self.first_pass} tokens at first and "
                f"{self.seen - self.first_pass} when read again; give a list of batches"
            )
        if self.checkpoint and keep_checkpoint:
            self.save()
        elif self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        return result

    def _checked(self) -> Calibration:
        result = self.result()
        if not result.provenance.tokens:
            raise CatsparseError("there is no calibration token; give more text")
        parts = (result.statistics, result.products, result.foretold, result.input_statistics)
        for name, statistics in itertools.chain(*(part.items() for part in parts)):
            if not statistics.is_finite:
                raise CatsparseError(
                    f"the activations of {name} are not finite; load the model in bf16 or fp32"
                )
        if not result.sites:
            raise CatsparseError("no token reached any gated MLP; check the model's inputs")
        return result

    def _other_run(self) -> CatsparseError:
        return CatsparseError(
            f"{self.checkpoint} holds a run over more or other data; delete it to start again"
        )

    def save(self) -> None:
        assert self.checkpoint is not None
        result = self.result()
        metadata = result.metadata()
        metadata |= {"catsparse.hash": self.hash.hexdigest(), "catsparse.seen": str(self.seen)}
        tensors = result.tensors()
        write_atomic(self.checkpoint, lambda path: save_file(tensors, path, metadata))
        self._saved_at = time.monotonic()

    def _saved_state(self) -> tuple[Calibration, str, int] | None:
        """What the checkpoint holds, the hash there, and the tokens seen until then."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        saved = Calibration.load(self.checkpoint)
        with safe_open(self.checkpoint, framework="pt") as file:
            metadata = file.metadata() or {}
        seen = metadata.get("catsparse.seen", "")
        tokens = int(seen) if seen.isdecimal() and len(seen) < 20 else 0
        return saved, metadata.get("catsparse.hash", ""), tokens

    def _skip(self, counted: int) -> None:
        """Pass over a batch that the checkpoint already holds."""
        assert self._resume is not None
        saved, digest, tokens = self._resume
        self.seen += counted
        if self.seen > tokens:
            raise self._other_run()
        if self.hash.hexdigest() == digest:
            self._restore(saved)
            self._skipping = False

    def _restore(self, saved: Calibration) -> None:
        for name, statistics in saved.statistics.items():
            device = self.statistics[name].histogram.device
            self.statistics[name] = statistics.to(device)
            if self.foretold:
                self.foretold[name] = saved.foretold[name].to(device)
            if self.products_at is not None:
                self.products[name] = saved.products[name].to(device)
        for name, seen in saved.input_statistics.items():
            self.input_statistics[name] = seen.to(self.input_statistics[name].histogram.device)


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


def _input_device(model: nn.Module) -> torch.device:
    device = getattr(model, "device", None) or next(model.parameters()).device
    # Offloaded weights are on meta; accelerate's hook moves inputs to where it computes.
    return torch.device("cpu") if device.type == "meta" else device


def _site_device(model: nn.Module, site: Site) -> torch.device:
    module = model.get_submodule(site.name)
    device = next(chain(module.parameters(), module.buffers())).device  # GPTQ has buffers only
    return torch.device("cpu") if device.type == "meta" else device
