"""What a site's children compute while the model runs, and what calibration reads of their weights.

Nothing of the model is changed: hooks come off whatever happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CatsparseError
from .inputs import InputSite
from .kernels import ACTIVATIONS, dequantize, make_preview
from .modules import SparseMLP
from .quantized_linear import QuantizedLinear
from .shards import find_shard, local_weight, why_no_shard
from .sites import Site
from .weights import effective_weight, why_no_matrix, why_not_plain_lora, why_not_readable

# Called with a site, its gate's output (the preview's, where there is one), its up's, its down
# projection's input, and what the preview foretells of up's output.
Count = Callable[[Site, Tensor, Tensor, Tensor, "Tensor | None"], None]
Previews = dict[str, tuple[Tensor, Tensor]]


def make_previews(model: nn.Module, sites: Sequence[Site], bits: int | None) -> Previews:
    """Each site's preview of products and its scales, packed; nothing if ``bits`` is None. Of a
    site spread over processes it is of the rank's neurons.

    Raises:
        CatsparseError: a gate's or up's weight cannot be read as it is.
    """
    previews: Previews = {}
    if bits is None:
        return previews
    for site in sites:
        module = model.get_submodule(site.name)
        shard, weights = find_shard(module, site), list[Tensor]()
        neurons = site.intermediate_size if shard is None else shard.own
        for name in (site.gate, site.up):
            if name is None:
                continue
            child: Any = module.get_submodule(name)
            reason = (why_not_readable if shard is None else why_no_shard)(name, child)
            if reason is not None and why_not_plain_lora(child) is not None:
                raise CatsparseError(
                    f"{site.name} can have no preview ({reason}); calibrate without preview"
                )
            weight = effective_weight(child) if shard is None else local_weight(child)
            weights += weight.detach().split(neurons)
        previews[site.name] = make_preview(weights[0], bits, weights[1])
    return previews


@torch.no_grad()
def down_norm(model: nn.Module, site: Site, option: str) -> Tensor:
    """``[I]`` fp32: the norm of each neuron's row of W_down, which ``option`` needs; of a site
    spread over processes, of the rank's neurons.

    Raises:
        CatsparseError: the weight cannot be read.
    """
    down: Any = model.get_submodule(site.name).get_submodule(site.down)
    shard = find_shard(model.get_submodule(site.name), site)
    kind = QuantizedLinear if isinstance(down, QuantizedLinear) else nn.Linear
    reason = why_no_matrix(site.down, down, kind, spread=shard is not None)
    if reason is not None and why_not_plain_lora(down) is not None:
        raise CatsparseError(
            f"the products of {site.name} cannot be scored ({reason}); calibrate without {option}"
        )
    # By pieces: a whole fp32 copy of w_down would be 235 MB at 7B.
    weight = effective_weight(down) if shard is None else local_weight(down).detach()
    squares = [rows.float().square().sum(0) for rows in weight.split(1024)]
    return torch.stack(squares).sum(0).sqrt()


@contextmanager
def watch(
    model: nn.Module, sites: Sequence[Site], previews: Previews, count: Count
) -> Iterator[None]:
    """Call ``count`` for each site's tokens while the model runs.

    What a preview foretells of gate and up is computed beside.
    """
    handles: list[Any] = []
    try:
        for site in sites:
            handles += _watch(model.get_submodule(site.name), site, previews.get(site.name), count)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_sparse(
    modules: Mapping[str, SparseMLP], sites: Sequence[Site], previews: Previews, count: Count
) -> Iterator[None]:
    """:func:`watch` for sparse modules, whose down projection is given masked products: what is
    counted is the exact product of gate and up, and the masks stay in force."""
    try:
        for site in sites:
            module, preview = modules[site.name], previews.get(site.name)
            module.catsparse_observer = partial(_observe, site, preview, count)
        yield
    finally:
        for site in sites:
            modules[site.name].catsparse_observer = None


def _observe(
    site: Site,
    preview: tuple[Tensor, Tensor] | None,
    count: Count,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
) -> None:
    hidden = ACTIVATIONS[site.act](gate) * up
    if preview is None:
        count(site, gate, up, hidden, None)
    else:
        foretold = [
            F.linear(x, dequantize(packed, scale, x.shape[-1], x.dtype))
            for packed, scale in zip(*(part.chunk(2) for part in preview), strict=True)
        ]
        count(site, foretold[0], up, hidden, foretold[1])


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
        foretold = seen.pop("foretold gate", gate), seen.pop("foretold up", None)
        count(site, foretold[0], up, args[0], foretold[1])

    handles = [
        module.get_submodule(site.gate).register_forward_hook(keep("gate")),
        module.get_submodule(site.down).register_forward_pre_hook(consume),
    ]
    if preview is not None:
        # Half by half: dequantized, each is as large as the weight.
        halves = tuple(zip(*(part.chunk(2) for part in preview), strict=True))

        def foretell(child: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            for name, (packed, scale) in zip(("gate", "up"), halves, strict=True):
                w = dequantize(packed, scale, x.shape[-1], x.dtype)
                seen[f"foretold {name}"] = F.linear(x, w)

        handles.append(module.get_submodule(site.gate).register_forward_pre_hook(foretell))
    if site.up is not None:
        handles.append(module.get_submodule(site.up).register_forward_hook(keep("up")))
    return handles


@contextmanager
def watch_inputs(
    model: nn.Module, sites: Sequence[InputSite], count: Callable[[InputSite, Tensor], None]
) -> Iterator[None]:
    """Call ``count`` with what the linears of each site are given while the model runs."""

    def consume(site: InputSite) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda linear, args: count(site, args[0])

    handles: list[Any] = []
    try:
        for site in sites:
            # They share it, so one of them tells.
            linear = model.get_submodule(site.name)
            handles.append(linear.register_forward_pre_hook(consume(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def model_hash(
    model: nn.Module,
    sites: list[Site],
    dtype: str,
    preview: int | None,
    inputs: list[InputSite],
) -> Any:
    """Tells runs apart: sites, inputs, dtype, preview's bits, a little of each site's weights."""
    kept: tuple[object, ...] = () if preview is None else ("foretold",)  # older ones are without
    kept += tuple(inputs)
    digest = hashlib.sha256(repr((sites, dtype, preview, *kept)).encode())
    for site in sites:
        weight: Any = getattr(
            model.get_submodule(site.name).get_submodule(site.gate), "weight", None
        )
        readable = weight is not None and type(weight) in (Tensor, nn.Parameter)
        if readable and weight.device.type != "meta":
            digest.update(raw_bytes(weight.detach().flatten()[:64].float()))
    return digest


def raw_bytes(values: Tensor) -> bytes:
    """Shape and elements of a tensor, to be hashed."""
    array = values.cpu().contiguous().numpy()
    return repr(array.shape).encode() + array.tobytes()
