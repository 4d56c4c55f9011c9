"""The opaque ops of a forward pass, which neither torch.compile nor a CUDA graph looks into.

They find an MLP in vLLM's forward context, by its name, as vLLM's attention does: all that a
compiled graph holds, which vLLM may keep for other processes, is that name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context

from ..modules import SparseMLP


class LoadedMLP:
    """What the ops need of a rank's MLP: ``most_tokens`` of a step run the sparse one."""

    def __init__(self, shard: SparseMLP, most_tokens: int) -> None:
        self.shard: Any = shard
        self.most_tokens = most_tokens

    def takes(self, x: Tensor) -> bool:
        return x.numel() <= self.most_tokens * x.shape[-1]

    def masks_no_more(self) -> bool:
        """Whether steps of more tokens are dense."""
        return not self.shard.catsparse_enabled or self.shard.catsparse_prefill == "dense"


def _loaded(name: str) -> LoadedMLP:
    return get_forward_context().no_compile_layers[name]  # type: ignore[no-any-return]


def _gate_up(x: Tensor, rows: int, name: str) -> tuple[Tensor, Tensor]:
    """``[..., H]`` to ``[..., 2 I/R]``, unwritten for few tokens, and the sparse MLP's result,
    unwritten for more."""
    mlp = _loaded(name)
    if mlp.takes(x):
        return x.new_empty((*x.shape[:-1], rows)), mlp.shard(x)
    return mlp.shard.gate_up_proj(x), torch.empty_like(x)


def _gate_up_fake(x: Tensor, rows: int, name: str) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], rows)), torch.empty_like(x)


def _down(h: Tensor, x: Tensor, gate_up: Tensor, y: Tensor, name: str) -> Tensor:
    """``[..., I/R]`` to ``[..., H]``, given what :func:`_gate_up` had and returned."""
    mlp = _loaded(name)
    if mlp.takes(x):
        return y.clone()  # an op's result may not be one of its arguments
    if mlp.masks_no_more():
        return F.linear(h, mlp.shard.down_proj.weight)
    return mlp.shard.mask_and_project(x, *gate_up.chunk(2, dim=-1), foretell=False)  # type: ignore[no-any-return]


def _mask(h: Tensor, gate_up: Tensor, name: str) -> None:
    """Write means, or zeros, over the dropped neurons of ``[..., I/R]``. ``gate_up`` is what the
    activation was given."""
    mlp = _loaded(name)
    tokens = h.numel() // h.shape[-1]
    if mlp.shard.catsparse_enabled and (tokens <= mlp.most_tokens or not mlp.masks_no_more()):
        # The shard's down_proj gives its input back.
        h.copy_(mlp.shard.mask_and_project(h, *gate_up.chunk(2, dim=-1), foretell=False))


for schema, op, fake in (
    ("vllm_gate_up(Tensor x, int rows, str name) -> (Tensor, Tensor)", _gate_up, _gate_up_fake),
    (
        "vllm_down(Tensor h, Tensor x, Tensor gate_up, Tensor y, str name) -> Tensor",
        _down,
        lambda h, x, gate_up, y, name: torch.empty_like(x),
    ),
    (
        "vllm_mask(Tensor(a!) h, Tensor gate_up, str name) -> ()",
        _mask,
        lambda h, gate_up, name: None,
    ),
):
    full_name = f"catsparse::{schema.partition('(')[0]}"
    torch.library.define(full_name, schema[schema.index("(") :])
    torch.library.impl(full_name, "default", op)
    torch.library.register_fake(full_name, fake)
