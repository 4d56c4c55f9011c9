"""Statistics of what a sparse model itself computes, and its thresholds set anew by them.

Training moves activations, so thresholds that were chosen before drop another share after it. The
model is read with its masks in force and its LoRA adapters on, merged or not; a decision by a
preview is that of the merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .batches import Batch, as_batches
from .calibration import Calibration, GateDecision
from .config import GATE_METHODS, PRODUCT, SparsityConfig
from .errors import CatsparseError
from .methods import SiteThreshold
from .modules import SparseMLP, sparse_modules
from .observation import Run, evaluating
from .quantized_linear import weights_of_model
from .shards import Sharded
from .sites import Site
from .surgery import SparseState, measured, state_of, state_owner, threshold_every_token
from .watching import make_previews, watch_sparse


def recalibrate(
    model: Any,
    data: Tensor | Sequence[Batch],
    *,
    batch_size: int = 8,
    seed: int = 0,
    data_name: str = "in-memory data",
    dtype: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Count the activations of a sparse model as :func:`catsparse.calibrate` does a dense one's.

    Every token is thresholded. Where the config has a second decision, products are gathered behind
    the gate's threshold for the sparsity asked, in a second pass.

    Args:
        model: a sparse model, or a PEFT model around one; left unchanged.
        data: token ids ``[N, L]``, or batches with ``input_ids`` and perhaps ``attention_mask``.
        batch_size: windows a forward pass, for token ids.
        seed, data_name: recorded in the calibration.
        dtype: recorded too: that of the weights as they will be read; None for the model's.
        progress: show a progress bar on stderr.

    Raises:
        CatsparseError: the model is dense, or sparse in inputs of linear layers, there is no data,
            activations are not finite, or weights that a preview or products need cannot be read.
    """
    config, owner = state_of(model).config, state_owner(model)
    refuse_inputs(config)
    modules = sparse_modules(owner)
    if any(isinstance(module, Sharded) for module in modules.values()):
        raise CatsparseError(
            "the thresholds of a model spread over processes cannot be set anew; load it in one"
        )
    sites = sites_of(owner)
    dtype = dtype or str(next(owner.parameters()).dtype).removeprefix("torch.")
    batches, total, provenance = as_batches(
        data, None, 0, 0, batch_size, seed, data_name, dtype, weights_of_model(owner)
    )
    previews = make_previews(owner, sites, config.preview)
    run = Run(owner, sites, None, provenance, config.preview, [])

    def read(label: str) -> None:
        console = Console(stderr=True)
        for batch in track(
            batches, label, total, console=console, transient=True, disable=not progress
        ):
            run.step(batch)

    with (
        watch_sparse(modules, sites, previews, run.count),
        threshold_every_token(owner),
        evaluating(owner),
        torch.no_grad(),
    ):
        read("recalibrating")
        if config.down_sparsity is not None:
            run.begin_products(GateDecision(config.sparsity, config.method))
            read("gathering products")
    return run.finish(keep_checkpoint=False)


def refuse_inputs(config: SparsityConfig) -> None:
    """
    Raises:
        CatsparseError: inputs of linear layers are dropped, whose thresholds cannot be set anew.
    """
    if config.inputs:
        raise CatsparseError(
            "thresholds on inputs of linear layers cannot be set anew; sparsify with scope mlp and "
            f"a method of {', '.join((*GATE_METHODS, PRODUCT))}"
        )


def sites_of(model: Any) -> list[Site]:
    """The sites of a sparse model, as :func:`catsparse.sites.find_sites` finds them in a dense
    one."""
    return [_site(name, module) for name, module in sparse_modules(model).items()]


def _site(name: str, module: SparseMLP) -> Site:
    gate, up = getattr(module, module.site_gate), module.site_up
    neurons = gate.out_features if up is not None else gate.out_features // 2
    kind = (module.site_act, module.site_act_child, module.site_down)
    return Site(name, module.site_gate, up, *kind, gate.in_features, neurons)


def set_thresholds(model: Any, calibration: Calibration, asked: Mapping[str, float]) -> None:
    """Give a sparse model the thresholds by which ``calibration`` drops what is ``asked``.

    The method stays, and so do the means in dropped neurons' place: the model was trained with
    them. What the model remembers of itself, to be saved, is then the new.

    Args:
        model: a sparse model, or a PEFT model around one.
        calibration: from :func:`recalibrate`.
        asked: sparsity by site; with a second decision the config's own counts instead.
    """
    config = state_of(model).config
    sparsity = config.sparsity if config.down_sparsity is not None else asked
    new = calibration.thresholds(sparsity, config.method, config.compensate, config.down_sparsity)
    modules = sparse_modules(state_owner(model))
    thresholds = {
        name: replace(t, mean=_mean_of(modules[name]) if config.compensate else None)
        for name, t in new.items()
    }
    for name, t in thresholds.items():
        modules[name].set_threshold(t.threshold, t.mean, t.product)
    _remember(model, config, thresholds, calibration)


def hold_thresholds(model: Any, calibration: Calibration, achieved: Mapping[str, Any]) -> None:
    """Keep a sparse model's thresholds, and let it remember what they drop now.

    Args:
        model: a sparse model, or a PEFT model around one.
        calibration: from :func:`recalibrate`; it is what a save then holds.
        achieved: by site, the fractions (of neurons, of W_down's rows) that are dropped.
    """
    state = state_of(model)
    modules = sparse_modules(state_owner(model))
    second = state.config.down_sparsity is not None
    thresholds = {
        name: replace(
            t,
            mean=_mean_of(modules[name]) if state.config.compensate else None,
            sparsity=achieved[name][0],
            down_sparsity=achieved[name][1] if second else None,
        )
        for name, t in state.thresholds.items()
    }
    _remember(model, state.config, thresholds, calibration)


def _mean_of(module: SparseMLP) -> Tensor | None:
    mean = module.catsparse_mean
    return None if mean is None else mean.detach().float().cpu()


def _remember(
    model: Any,
    config: SparsityConfig,
    thresholds: dict[str, SiteThreshold],
    calibration: Calibration,
) -> None:
    sites = {
        name: replace(
            config.sites[name],
            threshold=t.scalar,
            sparsity=t.sparsity,
            product_threshold=t.product_scalar,
            down_sparsity=t.down_sparsity,
        )
        for name, t in thresholds.items()
    }
    config = replace(config, sites=sites, calibration=calibration.provenance, **measured(sites))
    state_owner(model).catsparse = SparseState(config, thresholds, calibration)
