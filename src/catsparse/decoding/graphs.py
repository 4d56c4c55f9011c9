"""CUDA graphs of the decode step: captured on second use, kept for the last few settings."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from ..modules import SparseMLP
from ..surgery import sparse_layers

MAX_GRAPHS = 8


class Graphs:
    """Runs a step by its graph. All graphs share one memory pool, as one runs at a time.

    The first run of a key is eager, on a side stream: it is a step like any other and warms up
    what must not be captured. The second captures. So a key that is used once costs no capture.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self.device, self.capture = device, capture
        self.captures = 0
        self._graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None] = OrderedDict()
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, body: Callable[[], None], keep: Any) -> None:
        """Run ``body``, or the graph of it that ``key`` stands for; ``keep`` lives as long."""
        if not self.capture:
            body()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            self._run_aside(body)
            self._forget_oldest()
            return
        self._graphs.move_to_end(key)
        found = self._graphs[key]
        if found is None:
            graph = self._captured(body)
            if graph is None:
                body()
                return
            found = self._graphs[key] = graph, keep
        found[0].replay()

    def clear(self) -> None:
        if len(self):
            torch.cuda.synchronize(self.device)  # steps past the end of a call may still run
        self._graphs.clear()
        self._pool = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pool that the graphs' intermediate tensors live in."""
        if not len(self):
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(
            segment["total_size"]
            for segment in segments
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )

    def _run_aside(self, body: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            body()
        current.wait_stream(self._side)

    def _captured(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may go on using the device.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:
            self.capture = False
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"a step of this model cannot be captured and runs uncaptured: {reason}",
                stacklevel=2,
            )
            return None
        self.captures += 1
        return graph

    def _forget_oldest(self) -> None:
        while len(self._graphs) > MAX_GRAPHS:
            _, found = self._graphs.popitem(last=False)
            if found is not None:
                torch.cuda.synchronize(self.device)


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Changes when a graph of the model's forward would go on with what is no longer there."""
    parts: list[object] = [getattr(model.config, "_attn_implementation", None)]
    for module in model.modules():
        parts.append((id(module), type(module), module.training))
        parts += [_mark(tensor) for tensor in module._parameters.values() if tensor is not None]
        parts += [_mark(tensor) for tensor in module._buffers.values() if tensor is not None]
    for sparse in sparse_layers(model).values():
        copy = sparse._catsparse_down_t if isinstance(sparse, SparseMLP) else sparse._catsparse_copy
        parts.append(
            (
                sparse.catsparse_enabled,
                sparse.catsparse_prefill,
                sparse.catsparse_backend,
                sparse.catsparse_down_copy,
                None if copy is None else copy.data_ptr(),
            )
        )
    return tuple(parts)


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    try:
        return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()
    except RuntimeError:  # a subclass without storage of its own
        return id(tensor), version, tensor.dtype
