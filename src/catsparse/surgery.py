"""sparsify / densify: put thresholds on a model's gated MLPs, in place, and take them off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ._version import __version__
from .allocation import allocate, check_budget
from .calibration import Calibration
from .config import (
    PREFILL_POLICIES,
    PRODUCT,
    BaseModel,
    InputConfig,
    SiteConfig,
    SparsityConfig,
    check_choice,
    check_preview,
)
from .errors import CatsparseError
from .kernels import Backend
from .linears import SparseLinear, add_input_sparsity, remove_input_sparsity, sparse_linears
from .methods import SiteThreshold, thresholds_of
from .modules import SparseMLP, add_sparsity, remove_sparsity, sparse_modules
from .previews_file import StoredPreviews
from .quantized import check_weights
from .sites import Site, require_sites
from .strict_json import shorten
from .weights import is_spread, why_no_matrix


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
    scope: str = "mlp",
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
        sparsity: fraction of neurons (or inputs) to drop, 0 <= sparsity < 1, the same in every
            layer or one for each by module name; 0 keeps the dense result. None for 0.5, or for
            what ``bytes_skipped`` asks.
        method: ``cats`` (one threshold a layer), ``chess`` or ``energy`` (one a neuron), which
            decide on the gate, or ``product`` (one a neuron), which decides on the product that a
            preview foretells and needs a calibration with one; or ``teal`` (one a layer) or
            ``wina`` (one an input), which decide on the inputs of linear layers and need a
            calibration with ``inputs``; see :mod:`catsparse.methods`. None for ``product`` if the
            calibration has a preview and there is no ``down_sparsity``, else ``energy``.
        compensate: replace a dropped neuron by its mean over the tokens it is dropped on.
        prefill: ``masked`` (every token is thresholded) or ``dense`` (calls of more than 16
            tokens run dense, so only decode is sparse).
        down_sparsity: fraction of W_down's rows not to be read, at least ``sparsity``: a second
            decision, once a kept neuron's product is known. The calibration must have been made
            with ``products_at`` this sparsity and this method, which is not ``product``. None for
            no second decision.
        preview: bits of the copy of W_gate, or of W_gate and W_up, that decides which neurons live;
            None for what was calibrated.
        bytes_skipped: fraction of the scope's weight bytes that decode is not to read, instead of
            ``sparsity``.
        allocation: how ``bytes_skipped`` is spread over the layers: ``uniform``, or ``greedy`` or
            ``optimal``, by measured sensitivities; see :func:`catsparse.allocate`.
        scope: ``mlp``, or ``all`` linear layers of the MLPs' blocks: attention's drop inputs by
            ``teal``, or by ``method`` if that is one of inputs.

    Raises:
        CatsparseError: the model's gated MLPs are not those that were calibrated, the calibration
            has not what ``method``, ``down_sparsity``, ``preview`` or ``allocation`` needs, or
            ``bytes_skipped`` cannot be reached or is given beside what decides it otherwise.
    """
    if isinstance(calibration_or_config, SparsityConfig):
        return apply_thresholds(model, *thresholds_of(calibration_or_config), None)
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
        sparsity = allocate(calibration, bytes_skipped, allocation, method, compensate, scope)
    elif sparsity is None:
        sparsity = 0.5
    thresholds = calibration.thresholds(sparsity, method, compensate, down_sparsity, scope)
    sites, inputs = {}, {}
    for name, t in thresholds.items():
        if (shared := calibration.inputs.get(name)) is not None:
            sizes = shared.in_features, shared.out_features
            inputs[name] = InputConfig(shared.linears, t.scalar, t.sparsity, *sizes)
            continue
        site = calibration.sites[name]
        sites[name] = SiteConfig(
            *(t.scalar, t.sparsity, site.act, site.hidden_size, site.intermediate_size),
            product_threshold=t.product_scalar,
            down_sparsity=t.down_sparsity,
        )
    config = SparsityConfig(
        sites=sites,
        method=method,
        compensate=compensate,
        sparsity=_asked(sparsity, sites, inputs),
        down_sparsity=down_sparsity,
        **measured(sites, inputs),
        preview=calibration.preview_of(method),
        prefill=prefill,
        inputs=inputs,
        scope=scope,
        base_model=base_model_of(model),
        calibration=calibration.provenance,
        catsparse_version=__version__,
    )
    return apply_thresholds(model, config, thresholds, calibration)


def densify(model: Any) -> Any:
    """Undo :func:`sparsify` in place and return the model; its parameters are the same objects."""
    if not sparse_layers(model):
        raise CatsparseError("the model is not sparse; there is nothing to undo")
    for module in sparse_modules(model).values():
        remove_sparsity(module)
    for linear in sparse_linears(model).values():
        remove_input_sparsity(linear)
    owner = state_owner(model)
    if owner is not None:
        del owner.catsparse
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "forget"):
        quantizer.forget(model)  # it came from a merged directory: save it as dense from now on
    return model


@contextmanager
def run_dense(model: nn.Module) -> Iterator[None]:
    """Run a sparse model's dense forward inside the ``with`` block; nothing is copied."""
    before = {module: module.catsparse_enabled for module in sparse_layers(model).values()}
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
    before = {module: module.catsparse_prefill for module in sparse_layers(model).values()}
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
    modules = sparse_layers(model)
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
    previews: StoredPreviews | None = None,
) -> Any:
    """Make every site of ``config`` sparse; nothing is changed if any of them does not fit.
    ``previews`` are used where they are those of the model's weights."""
    found = {site.name: site for site in require_sites(model)}
    check_weights(model, config.weight_format, config.preview)
    for name, wanted in config.sites.items():
        _check_site(name, wanted, found)
    for name, shared in config.inputs.items():
        _check_input(model, name, shared)
    for name, shared in config.inputs.items():
        t = thresholds[name]
        for linear in shared.linears:
            layer = model.get_submodule(linear)
            add_input_sparsity(layer, t.threshold, t.mean, config.prefill)
    for name in config.sites:
        t = thresholds[name]
        module, site = model.get_submodule(name), found[name]
        add_sparsity(
            *(module, site, t.threshold, t.mean, config.prefill, t.product, config.preview),
            of_products=config.method == PRODUCT,
            stored=None if previews is None else partial(previews.of, name),
        )
    model.catsparse = SparseState(config, thresholds, calibration)
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseMLP | SparseLinear]:
    """The sparse MLPs and the sparse linear layers of a model by name."""
    return {**sparse_modules(model), **sparse_linears(model)}


def layers_of(model: nn.Module) -> dict[str, list[SparseMLP | SparseLinear]]:
    """The sparse layers of each site of a model that :func:`sparsify` made sparse."""
    config = state_of(model).config
    layers: dict[str, list[SparseMLP | SparseLinear]] = {
        name: [module] for name, module in sparse_modules(model).items()
    }
    linears = sparse_linears(model)
    return layers | {n: [linears[name] for name in s.linears] for n, s in config.inputs.items()}


def state_of(model: Any) -> SparseState:
    """The sparse model's state.

    Raises:
        CatsparseError: the model is dense.
    """
    owner = state_owner(model)
    if owner is None:
        raise CatsparseError("the model is not sparse; call catsparse.sparsify(model, ...) first")
    state: SparseState = owner.catsparse
    return state


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


def _check_input(model: nn.Module, name: str, wanted: InputConfig) -> None:
    modules, rows = dict(model.named_modules()), 0
    for linear in wanted.linears:
        layer = modules.get(linear)
        reason = "the model has none of that name" if layer is None else None
        if layer is not None:
            reason = why_no_matrix(shorten(linear), layer)
        if layer is not None and reason is None and layer.in_features != wanted.in_features:
            reason = f"it has {layer.in_features} inputs, not {wanted.in_features}"
        if layer is not None and is_spread(layer.weight):
            raise CatsparseError(
                f"the input of {shorten(linear)} cannot be thresholded: its weight is spread over "
                "processes; load the model in one, or sparsify with scope mlp and a method of the "
                "gate or of products"
            )
        if layer is None or reason is not None:
            raise CatsparseError(
                f"the input of {shorten(linear)} cannot be thresholded ({reason}); use the model "
                "that was calibrated"
            )
        rows += int(layer.out_features)
    if rows != wanted.out_features:
        raise CatsparseError(
            f"the layers that share the input of {shorten(name)} have {rows} outputs in the model "
            f"but {wanted.out_features} in the calibration; use the model that was calibrated"
        )


def measured(
    sites: Mapping[str, SiteConfig], inputs: Mapping[str, InputConfig] | None = None
) -> dict[str, Any]:
    """``measured_sparsity`` and ``measured_down_sparsity`` of a config with these sites and inputs;
    the first is of inputs where there is no site."""
    down = [(s.down_sparsity, s.intermediate_size) for s in sites.values()]
    shares = [(s.sparsity, s.intermediate_size) for s in sites.values()] or [
        (s.sparsity, s.in_features * s.out_features) for s in (inputs or {}).values()
    ]
    return {
        "measured_sparsity": _mean(shares),
        "measured_down_sparsity": _mean([(s, n) for s, n in down if s is not None]),
    }


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    """Of (share, neurons) by site; None if there are none."""
    neurons = sum(size for _, size in weighted)
    return sum(share * size for share, size in weighted) / neurons if neurons else None


def _asked(
    sparsity: float | Mapping[str, float],
    sites: dict[str, SiteConfig],
    inputs: dict[str, InputConfig],
) -> float:
    """The sparsity asked for over all neurons, or over all inputs if there is no other."""
    if not isinstance(sparsity, Mapping):
        return sparsity
    weighted = [(sparsity[name], site.intermediate_size) for name, site in sites.items()]
    weighted = weighted or [
        (sparsity[name], part.in_features * part.out_features) for name, part in inputs.items()
    ]
    return _mean(weighted) or 0.0


def state_owner(model: Any) -> Any:
    """The (sub)module that carries ``catsparse``: the model itself, or inside a PEFT wrapper."""
    for module in model.modules():
        if isinstance(module.__dict__.get("catsparse"), SparseState):
            return module
    return None
