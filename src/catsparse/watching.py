"""What a site's children compute while the model runs, and what calibration reads of their weights.

Nothing of the model is changed: hooks come off whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CatsparseError
from .kernels import dequantize, make_preview
from .sites import Site
from .weights import why_no_matrix, why_not_readable

# Called with a site, its gate's and up's outputs, and its down projection's input.
Count = Callable[[Site, Tensor, Tensor, Tensor], None]
Previews = dict[str, tuple[Tensor, Tensor]]


def make_previews(model: nn.Module, sites: Sequence[Site], bits: int | None) -> Previews:
    """Each site's gate preview and its scales, packed; nothing if ``bits`` is None.

    Raises:
        CatsparseError: a gate's weight cannot be read as it is.
    """
    previews: Previews = {}
    if bits is None:
        return previews
    for site in sites:
        gate: Any = model.get_submodule(site.name).get_submodule(site.gate)
        reason = why_not_readable(site.gate, gate)
        if reason is not None:
            raise CatsparseError(
                f"{site.name} can have no preview ({reason}); calibrate without preview"
            )
        weight = gate.weight if site.up is not None else gate.weight[: site.intermediate_size]
        previews[site.name] = make_preview(weight, bits)
    return previews


@torch.no_grad()
def down_norm(model: nn.Module, site: Site) -> Tensor:
    """``[I]`` fp32: the norm of each neuron's row of W_down.

    Raises:
        CatsparseError: the weight cannot be read.
    """
    down: Any = model.get_submodule(site.name).get_submodule(site.down)
    reason = why_no_matrix(site.down, down)
    if reason is not None:
        raise CatsparseError(
            f"{site.name} can have no second decision ({reason}); calibrate without products_at"
        )
    # By pieces: a whole fp32 copy of w_down would be 235 MB at 7B.
    squares = [rows.float().square().sum(0) for rows in down.weight.split(1024)]
    return torch.stack(squares).sum(0).sqrt()


@contextmanager
def watch(
    model: nn.Module, sites: Sequence[Site], previews: Previews, count: Count
) -> Iterator[None]:
    """Call ``count`` for each site's tokens while the model runs.

    The gate's output it is given is the preview's, where there is one.
    """
    handles: list[Any] = []
    try:
        for site in sites:
            handles += _watch(model.get_submodule(site.name), site, previews.get(site.name), count)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    module: nn.Module, site: Site, preview: tuple[Tensor, Tensor] | None, count: Count
) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(child: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    def consume(child: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = seen.pop("gate")
        gate, up = gate.chunk(2, dim=-1) if site.up is None else (gate, seen.pop("up"))
        count(site, seen.pop("preview", gate), up, args[0])

    handles = [
        module.get_submodule(site.gate).register_forward_hook(keep("gate")),
        module.get_submodule(site.down).register_forward_pre_hook(consume),
    ]
    if preview is not None:
        packed, scale = preview

        def decide(child: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            seen["preview"] = F.linear(x, dequantize(packed, scale, x.shape[-1], x.dtype))

        handles.append(module.get_submodule(site.gate).register_forward_pre_hook(decide))
    if site.up is not None:
        handles.append(module.get_submodule(site.up).register_forward_hook(keep("up")))
    return handles
