"""What a sparse model dropped on a text that was written."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .explanation import model_paths
from .meter import achieved_sparsity
from .surgery import sparse_layers, threshold_every_token


@dataclass(frozen=True)
class Dropped:
    """What a sparse model dropped on a text.

    Attributes:
        sparsity: fraction of neurons dropped over all MLPs; ``lowest`` and ``highest`` of any one.
            Where no MLP is sparse, of inputs over all sparse linear layers.
        bytes_skipped: fraction of the sparse layers' weight bytes that one-token decode leaves
            unread on the path it takes here: 0 where that is torch's dense matmuls.
        nbytes: the weight bytes of these layers.
    """

    sparsity: float
    lowest: float
    highest: float
    bytes_skipped: float
    nbytes: int


def measure(model: Any, ids: Tensor) -> Dropped:
    """What the sparse ``model`` drops on ``ids`` ``[T]``, in one forward pass over all of them.

    Counting needs the mask, which decode's kernels do not give, so counting while a text is
    written would slow it: the finished text is run again, every token thresholded. The prompt's
    tokens are counted with the others.
    """
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # the head is not needed
    with torch.no_grad(), threshold_every_token(model), achieved_sparsity(model) as meter:
        model(input_ids=ids[None].to(model.device), **options)
    seen, paths = meter.sites | meter.inputs, model_paths(model)
    sizes = {
        name: sum(p.nbytes for p in layer.parameters())
        for name, layer in sparse_layers(model).items()
        if name in seen
    }
    skipped = sum(
        meter.site_bytes_skipped(name, paths[name].skips_down) * size
        for name, size in sizes.items()
        if paths[name].skips_up or paths[name].skips_down
    )
    shares = (meter.sites or meter.inputs).values()
    total = sum(sizes.values())
    return Dropped(meter.sparsity, min(shares), max(shares), skipped / total, total)
