"""Which modules an adapter is put on, chosen by the found sites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..adapters import shares_weight
from ..errors import CatsparseError
from ..sites import Site

# Last parts of names of query and value projections, fused ones included.
_ATTENTION = (
    *("q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wq", "wv"),
    *("q_b_proj", "kv_b_proj", "query", "value"),
)


def adapter_targets(model: Any, sites: Iterable[Site], wanted: str) -> list[str]:
    """Full names of the linears of ``model`` that an adapter is for.

    Args:
        model: dense or sparse, without adapters.
        sites: its gated MLPs.
        wanted: ``targets`` of :class:`~catsparse.finetune.FinetuneOptions`.

    Raises:
        CatsparseError: a part of ``wanted`` names nothing, or a layer with another's weight.
    """
    children = {
        f"{site.name}.{child}"
        for site in sites
        for child in (site.gate, site.up, site.down)
        if child is not None
    }
    linears = [name for name, module in model.named_modules() if _adaptable(module)]
    layers = {site.name.rpartition(".")[0] for site in sites}
    inside = [name for name in linears if any(_within(name, layer) for layer in layers)]
    groups = {
        "mlp": [name for name in linears if name in children],
        "attention": [
            name
            for name in inside
            if name not in children and name.rpartition(".")[2] in _ATTENTION
        ],
        "all": inside,
    }
    chosen: set[str] = set()
    for part in wanted.split(","):
        names = groups.get(part)
        if names is None:
            names = [
                name for name in linears if part and (name == part or name.endswith(f".{part}"))
            ]
        if not names:
            raise CatsparseError(
                f"no linear layer is meant by the target {part[:60]!r}; give mlp, attention, all "
                f"or names such as {', '.join(sorted({n.rpartition('.')[2] for n in inside})[:6])}"
            )
        chosen.update(names)
    for name in sorted(chosen):
        if (other := shares_weight(model, name)) is not None:
            raise CatsparseError(
                f"{name} shares its weight with {other}, which an adapter merged into it would "
                "change too; leave it out of the targets"
            )
    return [name for name in linears if name in chosen]


def _within(name: str, layer: str) -> bool:
    return not layer or name.startswith(f"{layer}.")


def _adaptable(module: nn.Module) -> bool:
    """A linear, also a quantized one in its place; not the output head, which no layer holds."""
    return isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )
