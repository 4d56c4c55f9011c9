"""The key-value cache of the captured step: buffers that stay, of which attention reads a part.

Every layer writes into ``[B, heads, slots, D]`` and shows attention the first ``window`` slots.
Sliding layers hold all slots as well and leave the sliding to the mask: transformers' own sliding
layer counts in Python integers, which a captured graph would repeat for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

SMALLEST_WINDOW = 256
_DOUBLING_ENDS = 8192

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def bucket(used: int, smallest: int = SMALLEST_WINDOW) -> int:
    """The least window that holds ``used`` slots: doubling up to 8192, then multiples of it."""
    if used > _DOUBLING_ENDS:
        return -(-used // _DOUBLING_ENDS) * _DOUBLING_ENDS
    window = smallest
    while window < used:
        window *= 2
    return window


@dataclass
class Cursor:
    """Where the layers write and how far attention reads; one for all layers.

    ``start`` is set in prefill only: the slots are then known on the host, and the shapes are those
    that a growing cache would give. In decode it is None and the device's ``position`` rules.
    """

    position: Tensor  # [1] int64
    window: int
    start: int | None = None


class WindowLayer(StaticLayer):  # type: ignore[misc]
    """One layer's keys and values; ``update`` returns views of the first ``window`` slots."""

    def __init__(self, slots: int, cursor: Cursor, sliding: bool) -> None:
        super().__init__(max_cache_len=slots)
        self.cursor, self.is_sliding = cursor, sliding
        self.cumulative_length = cursor.position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; transformers' own also marks the buffers for dynamo, which it would import."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        rows = (self.batch_size, self.num_heads, self.max_cache_len)
        self.keys = key_states.new_zeros((*rows, self.k_head_dim))
        self.values = value_states.new_zeros((*rows, self.v_head_dim))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write at the cursor, which the caller advances once all layers have written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cursor = self.cursor
        if cursor.start is None:
            self.keys.index_copy_(2, cursor.position, key_states)
            self.values.index_copy_(2, cursor.position, value_states)
        else:
            slots = slice(cursor.start, cursor.start + key_states.shape[2])
            self.keys[:, :, slots] = key_states
            self.values[:, :, slots] = value_states
        return self.keys[:, :, : cursor.window], self.values[:, :, : cursor.window]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.window, 0

    def get_seq_length(self) -> int | Tensor:
        start = self.cursor.start
        return self.cursor.position[0] if start is None else start

    def reset(self) -> None:
        # What an earlier call left is masked, but a NaN there would come through all the same.
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()


class WindowCache(StaticCache):  # type: ignore[misc]
    """A static cache of :class:`WindowLayer`; ``cursor`` steers all of them."""

    def __init__(self, config: Any, slots: int, device: torch.device) -> None:
        position = torch.zeros(1, dtype=torch.int64, device=device)
        self.slots, self.cursor = slots, Cursor(position, slots, 0)
        sliding = [layer.is_sliding for layer in StaticCache(config, max_cache_len=slots).layers]
        Cache.__init__(self, layers=[WindowLayer(slots, self.cursor, one) for one in sliding])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        ready = [layer for layer in self.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in ready)


def why_no_cache(config: Any) -> str | None:
    """Why a model's layers cannot keep their state in a :class:`WindowCache`; None if they can."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", None):
        return "its layers share their keys and values"
    if getattr(text, "attention_chunk_size", None):
        return "its attention is chunked"
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        return f"it has layers of type {min(others)}"
    try:
        layers = StaticCache(text, max_cache_len=1).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return "transformers has no static cache for it"
    for layer in layers:
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            return f"its cache has a {type(layer).__name__}"
    return None if layers else "it has no attention layers"
