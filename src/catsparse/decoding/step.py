"""One step of decode on static device buffers, and the prefill that fills them.

A step may be anything that fits :class:`Step`; :class:`ModelStep` calls the model's own forward,
:class:`CompiledStep` the same compiled, and the fused step (fused.py) our own kernels.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..surgery import sparse_layers
from .cache import WindowCache


@dataclass(frozen=True)
class State:
    """Static device tensors of a batch. All rows are left-padded to the same length.

    Args:
        tokens: ``[B, 1]`` int64, what the next step consumes.
        position: ``[1]`` int64, cache slots used so far: the slot the next step writes. The loop
            advances it after the step, so a step only reads it.
        starts: ``[B]`` int64, slots of left padding; a row's position is ``position - starts``.
        mask: ``[B, slots]`` bool, False on the padding. What lies ahead of ``position`` is True:
            causality is the step's to see to.
        cache: keys and values, ``cache.layers[i].keys`` ``[B, heads, slots, D]``; decode reads
            ``cache.cursor.window`` slots of it.
    """

    tokens: Tensor
    position: Tensor
    starts: Tensor
    mask: Tensor
    cache: WindowCache

    @classmethod
    def empty(cls, config: Any, batch: int, slots: int, device: torch.device) -> State:
        cache = WindowCache(config, slots, device)
        return cls(
            torch.zeros(batch, 1, dtype=torch.int64, device=device),
            cache.cursor.position,
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.ones(batch, slots, dtype=torch.bool, device=device),
            cache,
        )

    def begin(self, starts: Tensor) -> None:
        """Make it that of a new prompt; ``starts`` ``[B]`` may be on the host."""
        self.cache.reset()
        self.position.zero_()
        self.starts.copy_(starts)
        slots = torch.arange(self.cache.slots, device=self.starts.device)
        self.mask.copy_(slots >= self.starts[:, None])

    @property
    def nbytes(self) -> int:
        tensors = (self.tokens, self.position, self.starts, self.mask)
        return self.cache.nbytes + sum(tensor.nbytes for tensor in tensors)


class Step(Protocol):
    """``logits [B, V] = step(tokens [B, 1], state)`` for the last token.

    It is captured in a CUDA graph: device operations of fixed shapes only, and all that changes
    from step to step is read from ``state`` on the device. It writes the new keys and values at
    slot ``state.position`` and leaves ``position`` alone. It outlives the call it was built in, so
    it must not hold the model itself strongly.
    """

    @property
    def words(self) -> str:
        """What decodes, for people."""
        ...

    @property
    def windowed(self) -> bool:
        """Whether it reads ``state.cache.cursor.window``, so a graph is good for one window."""
        ...

    @property
    def nbytes(self) -> int:
        """Device memory of its own."""
        ...

    def refresh(self) -> None:
        """Called before each prompt: what was made of weights is made again."""
        ...

    def __call__(self, tokens: Tensor, state: State) -> Tensor: ...


# (model, cache, batch) -> a step, or None if it does not suit. The cache holds the prompt already
# and has a free slot at its position, where a trial may write.
Factory = Callable[[Any, WindowCache, int], Step | None]


class ModelStep:
    """The model's own forward; serves every model that :mod:`.request` lets through."""

    words: ClassVar[str] = "the model's own forward"
    windowed: ClassVar[bool] = True
    nbytes: ClassVar[int] = 0

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @classmethod
    def try_build(cls, model: Any, cache: WindowCache, batch: int) -> ModelStep:
        return cls(model)

    def refresh(self) -> None:
        pass

    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        mask = state.mask[:, : state.cache.cursor.window]
        positions = (state.position - state.starts)[:, None]
        model = self._model()
        return _forward(model, state.cache, tokens, mask, positions, _keep_one(model))


class CompiledStep(ModelStep):
    """The model's own forward, compiled: faster where no fused step serves, after a minute or so.

    It is built for one size of the cache, all of which it reads: another would be compiled anew.
    """

    words: ClassVar[str] = "the model's own forward, compiled"
    windowed: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in sparse_layers(model).values():
            layer.prepare_decode()  # a compiled forward cannot
        # A code object of its own: torch counts compilations by those, and gives up after eight.
        own = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
        self._forward = torch.compile(own, dynamic=False)
        self._keep = _keep_one(model)

    @classmethod
    def try_build(cls, model: Any, cache: WindowCache, batch: int) -> CompiledStep:
        return cls(model)

    def __call__(self, tokens: Tensor, state: State) -> Tensor:
        state.cache.cursor.window = state.cache.slots
        positions = (state.position - state.starts)[:, None]
        model = self._model()
        logits: Tensor = self._forward(
            model, state.cache, tokens, state.mask, positions, self._keep
        )
        return logits


def prefill(model: Any, state: State, ids: Tensor, padded: bool, chunk: int) -> Tensor:
    """Run the prompt ``[B, T]`` through the model in chunks; the last token's logits ``[B, V]``."""
    cursor, length = state.cache.cursor, ids.shape[1]
    logits = ids.new_empty(0)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        cursor.start, cursor.window = start, end
        # Without padding no mask, as in generate: attention may then take its fastest kernel.
        mask = state.mask[:, :end] if padded else None
        slots = torch.arange(start, end, device=ids.device)
        positions = (slots - state.starts[:, None]).clamp(min=0)
        part = ids[:, start:end]
        logits = _forward(model, state.cache, part, mask, positions, _keep_one(model))
    cursor.start, cursor.window = None, state.cache.slots
    state.position.fill_(length)
    return logits


def _forward(
    model: Any,
    cache: WindowCache,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    keep: dict[str, int],
) -> Tensor:
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **keep,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _keep_one(model: Any) -> dict[str, int]:
    """What makes the forward compute the last token's logits alone, if it can."""
    return {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}


def takes(model: Any, *names: str) -> bool:
    """Whether the model's forward has arguments of these names."""
    return set(names) <= set(inspect.signature(model.forward).parameters)
