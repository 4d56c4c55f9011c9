"""Models that FSDP sharded, put together again: what follows training needs whole weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..surgery import state_owner


def without_weights(model: nn.Module) -> nn.Module:
    """A copy, but for its parameters, which are on the meta device."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    owner = state_owner(model)
    if owner is not None:  # statistics are large, and nobody changes them
        memo[id(owner.catsparse)] = owner.catsparse
    return copy.deepcopy(model, memo)


def gather(sharded: nn.Module, empty: nn.Module) -> nn.Module:
    """``empty``, made by :func:`without_weights` before sharding, with the weights of ``sharded``.

    Every process must call it, and gets all weights on its device, as it had them at first.
    """
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    empty.load_state_dict(weights, assign=True)
    if callable(tie := getattr(empty, "tie_weights", None)):
        tie()  # tied ones came one by one
    return empty
