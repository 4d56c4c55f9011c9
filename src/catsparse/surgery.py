"""sparsify / densify: put thresholds on a model's gated MLPs, in place, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._version import __version__
from .allocation import allocate, check_budget
from .calibration import Calibration
from .config import (
    PREFILL_POLICIES,
    PRODUCT,
    BaseModel,
    SiteConfig,
    SparsityConfig,
    check_choice,
    check_preview,
)
from .errors import CatsparseError
from .kernels import Backend, Choice, choose_backend
from .methods import SiteThreshold
from .modules import SparseMLP, add_sparsity, remove_sparsity, sparse_modules
from .observation import require_sites
from .sites import Site, describe, find_sites


def sparsify(
    model: Any,
    calibration_or_config: Calibration | SparsityConfig,
    sparsity: float | Mapping[str, float] | None = None,
    method: str | None = None,
    compensate: bool = True,
    prefill: str = "masked",
    down_sparsity: float | None = None,
    preview: int | None = None,
    bytes_skipped: float | None = None,
    allocation: str = "uniform",
) -> Any:
    """Make ``model`` activation-sparse in place and return it.

    Example::

        calibration = catsparse.calibrate(model, texts, tokenizer)
        catsparse.sparsify(model, calibration, sparsity=0.5)

    Args:
        model: the dense model that was calibrated; parameters and names are not touched.
        calibration_or_config: a :class:`Calibration`, or a :class:`SparsityConfig` of method
            ``cats`` without compensation and second decision, whose scalar thresholds are used as
            they are (the other arguments are then the config's own).
        sparsity: fraction of neurons to drop, 0 <= sparsity < 1, the same in every layer or one
            for each by module name; 0 keeps the dense result. None for 0.5, or for what
            ``bytes_skipped`` asks.
        method: ``cats`` (one threshold a layer), ``chess`` or ``energy`` (one a neuron), which
            decide on the gate, or ``product`` (one a neuron), which decides on the product that a
            preview foretells and needs a calibration with one; see :mod:`catsparse.methods`. None
            for ``product`` if the calibration has a preview and there is no ``down_sparsity``,
            else ``energy``.
        compensate: replace a dropped neuron by its mean over the tokens it is dropped on.
        prefill: ``masked`` (every token is thresholded) or ``dense`` (calls of more than 16
            tokens run dense, so only decode is sparse).
        down_sparsity: fraction of W_down's rows not to be read, at least ``sparsity``: a second
            decision, once a kept neuron's product is known. The calibration must have been made
            with ``products_at`` this sparsity and this method, which is not ``product``. None for
            no second decision.
        preview: bits of the copy of W_gate, or of W_gate and W_up, that decides which neurons live;
            None for what was calibrated.
        bytes_skipped: fraction of the MLPs' weight bytes that decode is not to read, instead of
            ``sparsity``.
        allocation: how ``bytes_skipped`` is spread over the layers: ``uniform``, or ``greedy`` or
            ``optimal``, by measured sensitivities; see :func:`catsparse.allocate`.

    Raises:
        CatsparseError: the model's gated MLPs are not those that were calibrated, the calibration
            has not what ``method``, ``down_sparsity``, ``preview`` or ``allocation`` needs, or
            ``bytes_skipped`` cannot be reached or is given beside what decides it otherwise.
    """
    if isinstance(calibration_or_config, SparsityConfig):
        config = calibration_or_config
        return apply_thresholds(model, config, _scalar_thresholds(config), None)
    calibration = calibration_or_config
    check_choice("prefill", prefill, PREFILL_POLICIES)
    check_preview(preview)
    if preview is not None and preview != calibration.preview:
        raise CatsparseError(
            f"the calibration was made with preview={calibration.preview}; calibrate again with "
            f"preview={preview}"
        )
    method = calibration.default_method(down_sparsity) if method is None else method
    check_budget(sparsity, bytes_skipped, allocation, down_sparsity)
    if bytes_skipped is not None:
        sparsity = allocate(calibration, bytes_skipped, allocation, method, compensate)
    elif sparsity is None:
        sparsity = 0.5
    thresholds = calibration.thresholds(sparsity, method, compensate, down_sparsity)
    sites = {
        name: SiteConfig(
            t.scalar,
            t.sparsity,
            calibration.sites[name].act,
            calibration.sites[name].hidden_size,
            calibration.sites[name].intermediate_size,
            t.product_scalar,
            t.down_sparsity,
        )
        for name, t in thresholds.items()
    }
    config = SparsityConfig(
        sites=sites,
        method=method,
        compensate=compensate,
        sparsity=_asked(sparsity, sites),
        measured_sparsity=_mean([(s.sparsity, s.intermediate_size) for s in sites.values()]),
        down_sparsity=down_sparsity,
        measured_down_sparsity=_mean(
            [
                (s.down_sparsity, s.intermediate_size)
                for s in sites.values()
                if s.down_sparsity is not None
            ]
        ),
        preview=calibration.preview,
        prefill=prefill,
        base_model=base_model_of(model),
        calibration=calibration.provenance,
        catsparse_version=__version__,
    )
    return apply_thresholds(model, config, thresholds, calibration)


def densify(model: Any) -> Any:
    """Undo :func:`sparsify` in place and return the model; its parameters are the same objects."""
    modules = sparse_modules(model)
    if not modules:
        raise CatsparseError("the model is not sparse; there is nothing to undo")
    for module in modules.values():
        remove_sparsity(module)
    owner = _state_owner(model)
    if owner is not None:
        del owner.catsparse
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "forget"):
        quantizer.forget(model)  # it came from a merged directory: save it as dense from now on
    return model


@contextmanager
def run_dense(model: nn.Module) -> Iterator[None]:
    """Run a sparse model's dense forward inside the ``with`` block; nothing is copied."""
    before = {module: module.catsparse_enabled for module in sparse_modules(model).values()}
    try:
        for module in before:
            module.catsparse_enabled = False
        yield
    finally:
        for module, enabled in before.items():
            module.catsparse_enabled = enabled


@contextmanager
def threshold_every_token(model: nn.Module) -> Iterator[None]:
    """Threshold every token inside the ``with`` block, whatever the prefill policy."""
    before = {module: module.catsparse_prefill for module in sparse_modules(model).values()}
    try:
        for module in before:
            module.catsparse_prefill = "masked"
        yield
    finally:
        for module, policy in before.items():
            module.catsparse_prefill = policy


def set_backend(model: nn.Module, backend: str = "auto", down_copy: bool = True) -> None:
    """Choose how the sparse layers of ``model`` decode (calls of at most 16 tokens).

    ``auto``, which every sparse model starts with, runs the kernel for calls in which it is faster
    than torch by a measured rule; :func:`explain` says what each layer runs and why.

    Args:
        model: a sparse model.
        backend: ``auto``, ``torch`` (dense matmuls, results bit-equal to dense at sparsity 0),
            ``c`` (the CPU kernel for every decode call), ``cuda`` (the kernel for NVIDIA GPUs
            from Hopper on) or ``triton`` (any recent NVIDIA GPU; slower).
        down_copy: let the kernel keep a transposed copy of each down projection (a third of the
            MLPs' memory, made at the first decode). Without it the CPU kernel skips only rows of
            the up projection, half of what could be, and a GPU runs dense matmuls.

    Raises:
        CatsparseError: the model is dense, the backend is unknown, or it cannot run here.
    """
    check_choice("backend", backend, tuple(b.value for b in Backend))
    modules = sparse_modules(model)
    if not modules:
        raise CatsparseError("the model is not sparse; call catsparse.sparsify(model, ...) first")
    asked = Backend(backend)
    if asked is not Backend.AUTO:
        for name, module in modules.items():
            reason = None if asked is Backend.TORCH else module.why_not_raw()
            if reason is None and asked is not Backend.TORCH:
                choice = module.choose_backend(asked, down_copy)
                reason = None if choice.backend is asked else choice.reason
            if reason is not None:
                raise CatsparseError(f"{name} cannot run the backend {backend}: {reason}; use auto")
    for module in modules.values():
        module.set_backend(asked, down_copy)


@dataclass(frozen=True)
class SparseState:
    """What a sparse model remembers in ``model.catsparse``, so that it can be saved."""

    config: SparsityConfig
    thresholds: dict[str, SiteThreshold]
    calibration: Calibration | None


def apply_thresholds(
    model: Any,
    config: SparsityConfig,
    thresholds: dict[str, SiteThreshold],
    calibration: Calibration | None,
) -> Any:
    """Make every site of ``config`` sparse; nothing is changed if any of them does not fit."""
    found = {site.name: site for site in require_sites(model)}
    for name, wanted in config.sites.items():
        _check_site(name, wanted, found)
    for name in config.sites:
        t = thresholds[name]
        module, site = model.get_submodule(name), found[name]
        add_sparsity(
            *(module, site, t.threshold, t.mean, config.prefill, t.product, config.preview),
            of_products=config.method == PRODUCT,
        )
    model.catsparse = SparseState(config, thresholds, calibration)
    return model


def state_of(model: Any) -> SparseState:
    """The sparse model's state.

    Raises:
        CatsparseError: the model is dense.
    """
    owner = _state_owner(model)
    if owner is None:
        raise CatsparseError("the model is not sparse; call catsparse.sparsify(model, ...) first")
    state: SparseState = owner.catsparse
    return state


def explain(model: nn.Module) -> str:
    """How each gated MLP of ``model`` runs, and why near misses were left dense; one line each."""
    sparse, paths = sparse_modules(model), model_paths(model)
    lines = []
    for name, module in sparse.items():
        threshold = module.catsparse_threshold
        kind = "per-neuron thresholds" if threshold.dim() else f"threshold {float(threshold):.4g}"
        if module.catsparse_mean is not None:
            kind += ", compensated"
        if (bits := module.catsparse_preview_bits) is not None:
            reason = module.why_not_preview()
            on = "product" if module.catsparse_of_products else "gate"
            kind += f", {bits}-bit {on} preview"
            kind += "" if reason is None else f" (not in use: {reason}; the exact {on} decides)"
        if module.catsparse_product_threshold is not None:
            kind += ", second decision"
        lines.append(f"{name}: sparse, {kind}; decode by {paths[name].words}")
    sites, misses = find_sites(model)
    sites = [site for site in sites if site.name not in sparse]
    lines += [f"{site.name}: dense gated MLP ({site.act})" for site in sites]
    misses = [m for m in misses if m.name not in sparse]
    if misses:
        lines.append(f"refused: {describe(misses, limit=20)}")
    return "\n".join(lines) if lines else f"{type(model).__name__}: no gated MLP found"


@dataclass(frozen=True)
class DecodePath:
    """How a sparse MLP decodes, in words; whether dropped neurons' rows of up (and of gate, if a
    preview decides) and of down are then left unread. (The exact product needs all of up.)"""

    words: str
    skips_up: bool
    skips_down: bool


def model_paths(model: nn.Module) -> dict[str, DecodePath]:
    """The path that decode takes in each sparse MLP of ``model``, by name."""
    return {name: _path(module) for name, module in sparse_modules(model).items()}


def decode_paths() -> dict[str, str]:
    """How ``auto`` decodes on this machine's default device, and why, by dtype of the weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    choices = {
        str(d).removeprefix("torch."): choose_backend(Backend.AUTO, device, d) for d in dtypes
    }
    return {name: _words(choice) for name, choice in choices.items()}


def _words(choice: Choice) -> str:
    if not choice.kernel_tokens:
        return f"torch, dense matmuls ({choice.reason})"
    return f"the {choice.backend.value} kernel ({choice.reason})"


def _path(module: SparseMLP) -> DecodePath:
    reason = module.why_not_raw()
    if reason is not None:
        return DecodePath(f"masked children ({reason})", False, False)
    choice = module.choose_backend(module.catsparse_backend, module.catsparse_down_copy)
    if not choice.kernel_tokens:
        return DecodePath(_words(choice), False, False)
    rows, skips_down = ["gate", "up"], module.catsparse_down_copy
    if module.why_not_preview() is not None:  # the exact gate is read; for the exact product up too
        rows = [] if module.catsparse_of_products else ["up"]
    kept = " and ".join(", ".join([*rows, *["down"] * skips_down]).rsplit(", ", 1))
    words = f"{_words(choice)}, reading " + (f"kept rows of {kept}" if kept else "gate and up")
    words += "" if skips_down else ", all of down (no copy)"
    return DecodePath(words, bool(rows), skips_down)


def base_model_of(model: Any) -> BaseModel | None:
    """Name, type and revision of a transformers model; None for any other module."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    revision = getattr(config, "_commit_hash", None)
    return BaseModel(str(getattr(config, "_name_or_path", "")), config.model_type, revision)


def _check_site(name: str, wanted: SiteConfig, found: dict[str, Site]) -> None:
    if name not in found:
        raise CatsparseError(
            f"the model has no gated MLP named {name[:80]!r} (it has {', '.join(list(found)[:3])}, "
            "...); use the model that was calibrated"
        )
    site = found[name]
    here = (site.act, site.hidden_size, site.intermediate_size)
    there = (wanted.act, wanted.hidden_size, wanted.intermediate_size)
    if here != there:
        raise CatsparseError(
            f"{name} is {here} (activation, hidden, intermediate size) in the model but {there} in "
            "the calibration; use the model that was calibrated"
        )


def _scalar_thresholds(config: SparsityConfig) -> dict[str, SiteThreshold]:
    if config.method != "cats" or config.compensate or config.down_sparsity is not None:
        raise CatsparseError(
            "a config alone is enough only for method 'cats' without compensation and second "
            "decision; give the calibration, or load the directory with catsparse.load"
        )
    return {
        name: SiteThreshold(torch.tensor(s.threshold), None, s.threshold, s.sparsity)
        for name, s in config.sites.items()
    }


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    """Of (share, neurons) by site; None if there are none."""
    neurons = sum(size for _, size in weighted)
    return sum(share * size for share, size in weighted) / neurons if neurons else None


def _asked(sparsity: float | Mapping[str, float], sites: dict[str, SiteConfig]) -> float:
    """The sparsity asked for over all neurons."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    return _mean([(sparsity[name], site.intermediate_size) for name, site in sites.items()]) or 0.0


def _state_owner(model: Any) -> Any:
    """The (sub)module that carries ``catsparse``: the model itself, or inside a PEFT wrapper."""
    for module in model.modules():
        if isinstance(module.__dict__.get("catsparse"), SparseState):
            return module
    return None
