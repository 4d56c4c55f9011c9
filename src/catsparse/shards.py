"""A rank's share of a gated MLP whose neurons are spread over processes (tensor parallel).

Neurons are cut over the ranks in their order, as torch.chunk does it (the last may have fewer):
rows of W_gate and W_up, columns of W_down.
A rank decides on its own neurons alone, so thresholds and means are cut as the weights are, and the
sum over ranks adds the outputs and each rank's own part of the compensation's bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import CatsparseError
from .sites import Site
from .statistics import Magnitudes
from .weights import Children, is_spread, why_no_matrix, why_not_readable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Counts = TypeVar("_Counts", bound=Magnitudes)


def cut(value: Tensor | None, rank: int, ranks: int) -> Tensor | None:
    """A rank's part of ``[I]``; what is one number for all neurons stays."""
    if value is None or value.dim() == 0:
        return value
    return value.chunk(ranks)[rank].contiguous()


@dataclass(frozen=True)
class Shard:
    """Which of a site's neurons this process holds.

    Attributes:
        mesh: the processes, in one dimension.
        neurons: I, of all of them.
        own: neurons here.
    """

    mesh: DeviceMesh
    neurons: int
    own: int

    @property
    def rank(self) -> int:
        return int(self.mesh.get_local_rank())

    @property
    def ranks(self) -> int:
        return int(self.mesh.size())

    def cut(self, value: Tensor | None) -> Tensor | None:
        """This rank's part of ``[I]``; what is one number for all neurons stays."""
        return cut(value, self.rank, self.ranks)

    def whole(self, statistics: _Counts) -> _Counts:
        """Statistics of all neurons from each rank's of its own; every rank must call it."""
        parts: dict[str, Any] = {}
        for field in fields(statistics):  # type: ignore[arg-type]
            value = getattr(statistics, field.name)
            if field.name == "histogram":
                parts[field.name] = _sum(value, self.mesh.get_group())
            elif isinstance(value, Tensor):
                parts[field.name] = self._join(value)
        return replace(statistics, **parts)  # type: ignore[type-var]

    def _join(self, value: Tensor) -> Tensor:
        """``[..., own]`` of each rank to ``[..., I]``."""
        widest = math.ceil(self.neurons / self.ranks)  # the last rank may have fewer
        mine = nn.functional.pad(value, (0, widest - self.own)).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, mine, group=self.mesh.get_group())
        return torch.cat(parts, dim=-1)[..., : self.neurons].contiguous()


def find_shard(module: nn.Module, site: Site) -> Shard | None:
    """What of the MLP at ``site`` is here; None if all of it is, or each call gathers it.

    Raises:
        CatsparseError: its neurons are spread in a way that thresholds cannot follow.
    """
    down: Any = getattr(module.get_submodule(site.down), "weight", None)
    if not is_spread(down):
        return None
    gate: Any = getattr(module.get_submodule(site.gate), "weight", None)
    up: Any = gate if site.up is None else getattr(module.get_submodule(site.up), "weight", None)
    if down.device_mesh.ndim != 1:
        if any(p.is_shard(1) for p in down.placements):
            raise CatsparseError(
                f"{site.name} is spread over a mesh of {down.device_mesh.ndim} dimensions; load "
                "the model with tensor parallelism alone (tp_size)"
            )
        return None
    if not down.placements[0].is_shard(1):
        return None  # sharded for storage (FSDP): gathered before it is used
    if site.up is None:
        # Halves that are each cut lie so; else all of the product is gathered on every rank.
        halves = getattr(gate.placements[0], "split_factor", 1) == 2 if is_spread(gate) else False
        own = gate.to_local().shape[0] // 2 if halves else 0
    else:
        halves = all(is_spread(w) and w.placements[0].is_shard(0) for w in (gate, up))
        own = gate.to_local().shape[0] if halves else 0
    if not halves:
        return None
    shard = Shard(down.device_mesh, site.intermediate_size, own)
    pieces = torch.arange(site.intermediate_size).chunk(shard.ranks)
    here = pieces[min(shard.rank, len(pieces) - 1)]
    if len(pieces) < shard.ranks or not len(here) == own == _local(down).shape[1]:
        raise CatsparseError(
            f"the {site.intermediate_size} neurons of {site.name} are not dealt out to "
            f"{shard.ranks} ranks, each with some; load the model with another tp_size or tp_plan"
        )
    return shard


def shards_of(model: nn.Module, sites: Mapping[str, Site]) -> dict[str, Shard]:
    """The shards of the sites that are spread over processes."""
    found = {name: find_shard(model.get_submodule(name), site) for name, site in sites.items()}
    return {name: shard for name, shard in found.items() if shard is not None}


class Sharded(Children):
    """Put before the sparse class of an MLP whose neurons are spread: it reads the rank's weights,
    and few-token calls end in the sum over ranks that the dense down projection makes itself."""

    catsparse_shard: Shard

    def forward_few(self, *args: Any) -> Tensor:
        """A call of few tokens, ``[..., H]``: this rank's neurons, then the sum over all."""
        y: Tensor = super().forward_few(*args)  # type: ignore[misc]
        torch.distributed.all_reduce(y, group=self.catsparse_shard.mesh.get_group())
        return y

    def mask_and_project(self, x: Tensor, gate: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gate.shape[-1] != self.catsparse_shard.own:
            raise CatsparseError(
                f"an MLP's {self.site_gate} gives {gate.shape[-1]} neurons where the rank holds "
                f"{self.catsparse_shard.own}; load the model with tp_plan colwise for it"
            )
        return super().mask_and_project(x, gate, *args, **kwargs)  # type: ignore[misc,no-any-return]

    def set_threshold(self, *values: Tensor | None) -> None:
        super().set_threshold(*map(self.catsparse_shard.cut, values))  # type: ignore[misc]

    @property
    def own_neurons(self) -> int:
        return self.catsparse_shard.own

    def weight_of(self, name: str) -> Tensor:
        return _local(getattr(self, name).weight)

    def why_not_child(self, name: str, dtype: torch.dtype | None = None) -> str | None:
        return why_no_shard(name, getattr(self, name), dtype)

    def effective_gate_up(self) -> tuple[Tensor, Tensor]:
        return self.raw_gate_up()

    def why_not_effective(self) -> str | None:
        return self.why_not_raw()


@torch.no_grad()
def _local(weight: Any) -> Tensor:
    local: Tensor = weight.to_local()  # without gradients the very tensor, not a view of it
    return local


def local_weight(child: Any) -> Tensor:
    """This rank's part of the weight of a child that :func:`find_shard` found."""
    return _local(child.weight)


def why_no_shard(name: str, child: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """:func:`catsparse.weights.why_not_readable` of a child whose weight is spread: transformers
    replaces its forward by one that also sums over ranks, which the op's caller does itself."""
    if (reason := why_no_matrix(name, child, nn.Linear, spread=True)) is not None:
        return reason
    forward = child.__dict__.get("forward")
    if "_hf_hook" in child.__dict__ or getattr(forward, "__name__", "") != "tp_forward":
        return f"{name} is hooked"
    return why_not_readable(name, child, dtype, spread=True)


def sum_counts(statistics: Mapping[str, _Counts], group: Any) -> dict[str, _Counts]:
    """Statistics by site, of all processes of ``group`` added up; each of them must call it."""
    sums = {}
    for name, mine in statistics.items():
        parts: dict[str, Any] = {}
        for field in fields(mine):  # type: ignore[arg-type]
            value = getattr(mine, field.name)
            if field.name not in mine.of_model:
                total = _sum(torch.as_tensor(value), group)
                parts[field.name] = total if isinstance(value, Tensor) else int(total)
        sums[name] = replace(mine, **parts)  # type: ignore[type-var]
    return sums


def _sum(value: Tensor, group: Any) -> Tensor:
    on_gpu = value.is_cuda or torch.distributed.get_backend(group) != "nccl"
    total = value.clone() if on_gpu else value.to("cuda")  # all that NCCL takes
    torch.distributed.all_reduce(total, group=group)
    return total.to(value.device)
