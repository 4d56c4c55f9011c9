"""What a sparse model's fine-tuning is compared with: the same run on the dense model, and on one
whose activation is replaced by ReLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ..config import check_choice
from ..errors import CatsparseError
from ..modules import sparse_modules
from ..sites import Site, require_sites
from .examples import Examples
from .options import BASELINES, FinetuneOptions
from .processes import is_main_process
from .running import Row, remove_checkpoints, train
from .targets import adapter_targets


def run_baseline(
    model: Any,
    kind: str,
    examples: Examples,
    heldout: Examples,
    options: FinetuneOptions,
    folder: Path,
    *,
    progress: bool = True,
    keep_checkpoints: bool = False,
) -> list[Row]:
    """Train an adapter on a dense model for its loss at each step; the model comes back unchanged,
    but for FSDP, which leaves it in shards: load it again.

    Args:
        model: a dense model with gated MLPs.
        kind: ``dense``, as it is, or ``relu``: with every gated MLP's activation replaced by ReLU
            (ReLUfication, arXiv 2310.04564).
        examples, heldout, options: those of the run it is compared with.
        folder: for its log and checkpoints.
        progress: show a progress bar on stderr.
        keep_checkpoints: leave them there: a second call then only reads the rows.

    Raises:
        CatsparseError: the model is sparse, the options ask for full fine-tuning, or an activation
            is a function called by name, which cannot be replaced.
    """
    check_choice("baseline", kind, BASELINES)
    if options.full:
        raise CatsparseError(
            "baselines need the weights as they were, which full fine-tuning changes; train an "
            "adapter"
        )
    if sparse_modules(model):
        raise CatsparseError("baselines begin with the dense model; call densify(model) first")
    sites = {site.name: site for site in require_sites(model)}
    targets = adapter_targets(model, sites.values(), options.targets)
    replaced = _Relu(model, sites) if kind == "relu" else None
    try:
        trained, rows = train(
            *(model, targets, examples, heldout, options, folder, kind),
            dense=nullcontext if replaced is None else replaced.off,
            progress=progress,
        )
        trained.unload()
    finally:
        if replaced is not None:
            replaced.undo()
    if not keep_checkpoints and is_main_process():
        remove_checkpoints(folder)
    return rows


class _Relu:
    """ReLU in the place of every site's activation."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        fixed = [name for name, site in sites.items() if site.act_child is None]
        if fixed:
            raise CatsparseError(
                f"the activation of {fixed[0]} is called in its forward and cannot be replaced by "
                "ReLU; leave out that baseline"
            )
        self._places = [
            (model.get_submodule(name), str(site.act_child)) for name, site in sites.items()
        ]
        self._before = [getattr(module, child) for module, child in self._places]
        self._put([nn.ReLU() for _ in self._places])

    def _put(self, acts: list[Any]) -> None:
        for (module, child), act in zip(self._places, acts, strict=True):
            setattr(module, child, act)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model's own activations inside the ``with`` block."""
        replaced = [getattr(module, child) for module, child in self._places]
        try:
            self._put(self._before)
            yield
        finally:
            self._put(replaced)

    def undo(self) -> None:
        self._put(self._before)
