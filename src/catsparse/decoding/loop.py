"""The decode loop: prefill, then one graph launch for each token; the host reads a little behind.

The host never waits for the token it launches: finished rows and stop strings are seen a few steps
late, and what was decoded past the end is cut off.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor, nn

from .cache import SMALLEST_WINDOW, bucket
from .fused import FusedStep, why_not_fused
from .graphs import Graphs, fingerprint
from .request import Request
from .sampling import Rows, Sampler
from .step import CompiledStep, Factory, ModelStep, State, Step, prefill

LAG = 4  # steps that the host reads behind the device
MAX_WORKSPACES = 2  # batch sizes kept for each model

# Tried in this order; the last takes every model.
FACTORIES: tuple[Factory, ...] = (FusedStep.try_build, ModelStep.try_build)
COMPILED: tuple[Factory, ...] = (CompiledStep.try_build,)


class NoRoomError(Exception):
    """The cache does not fit in the device's memory; nothing has been decoded."""


class Workspace:
    """What one model's calls of one batch size share: buffers, the step and its graphs."""

    def __init__(
        self,
        model: Any,
        batch: int,
        slots: int,
        factories: tuple[Factory, ...],
        capture: bool,
    ) -> None:
        self.factories = factories
        self.device: torch.device = model.device
        self.state = State.empty(model.config, batch, slots, self.device)
        self.rows = Rows.empty(batch, slots + 1, self.device)
        self.graphs = Graphs(self.device, capture)
        self.step: Step | None = None
        self._fingerprint: tuple[object, ...] | None = None

    def begin(self, request: Request) -> None:
        """Take up a prompt; graphs of a model that has changed since are dropped."""
        if self._fingerprint is None or self._fingerprint != fingerprint(request.model):
            self.graphs.clear()
            self.step = None
        if self.step is not None:
            self.step.refresh()
        self._fingerprint = None  # an interrupted call leaves none
        self.state.begin(request.starts)
        self.rows.finished.zero_()
        self.rows.least.fill_(request.least)
        if request.sampling.penalty is not None:
            length = request.seen.shape[1]
            self.rows.seen.copy_(request.seen[:, -1:])  # free columns: counted in any case
            self.rows.seen[:, :length] = request.seen.to(self.device)

    def end(self, model: nn.Module) -> None:
        # Not before the call: the first forward makes what follows from the weights.
        self._fingerprint = fingerprint(model)

    @property
    def nbytes(self) -> int:
        step = 0 if self.step is None else self.step.nbytes
        return self.state.nbytes + self.rows.nbytes + self.graphs.nbytes + step


class _Kept:
    """The workspaces of one model, and the lock under which they are used."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workspaces: OrderedDict[tuple[object, ...], Workspace] = OrderedDict()

    def take(self, model: Any, batch: int, slots: int, compiled: bool, capture: bool) -> Workspace:
        key = batch, model.device, model.dtype, compiled, capture
        found = self.workspaces.pop(key, None)
        if found is None or found.state.cache.slots < slots:
            if found is not None:
                found.graphs.clear()
            del found  # its memory serves the larger one
            found = Workspace(model, batch, slots, COMPILED if compiled else FACTORIES, capture)
        self.workspaces[key] = found
        while len(self.workspaces) > MAX_WORKSPACES:
            _, oldest = self.workspaces.popitem(last=False)
            oldest.graphs.clear()
        return found


_KEPT: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_KEPT_LOCK = threading.Lock()


def memory_bytes(model: nn.Module) -> int:
    """Device memory that decoding keeps for ``model``: caches, buffers and the graphs' pools."""
    kept = _KEPT.get(model)
    return sum(one.nbytes for one in list(kept.workspaces.values())) if kept else 0


def last_step(model: nn.Module) -> str | None:
    """What decoded the last call for ``model`` here, in words; None if none did."""
    kept = _KEPT.get(model)
    step = next(reversed(kept.workspaces.values())).step if kept and kept.workspaces else None
    if step is None:
        return None
    reason = why_not_fused(model) if type(step) is ModelStep else None
    return f"{step.words} in one CUDA graph" + (f" ({reason})" if reason else "")


def forget(model: nn.Module) -> None:
    """Give that memory back."""
    kept = _KEPT.pop(model, None)
    if kept is not None:
        for one in kept.workspaces.values():
            one.graphs.clear()


def run(
    request: Request,
    *,
    compiled: bool = False,
    capture: bool = True,
    smallest: int = SMALLEST_WINDOW,
    lag: int = LAG,
) -> Tensor:
    """Serve a request.

    Args:
        request: from :func:`.request.resolve`.
        compiled: decode by the model's own forward under ``torch.compile``.
        capture: launch each step as a CUDA graph; else run it as it is.
        smallest: the smallest window of the cache that attention reads.
        lag: steps that the host may read behind; a CPU needs none.

    Returns:
        ``[B, T + new]`` on the model's device.
    """
    model = request.model
    batch, length = request.ids.shape
    slots = bucket(length + request.new_tokens - 1, smallest)
    with _KEPT_LOCK:
        kept = _KEPT.setdefault(model, _Kept())
    # Buffers made in inference mode could not be written outside of it, by a later call.
    with kept.lock, _on(model.device), torch.inference_mode(False), torch.no_grad():
        try:
            workspace = kept.take(model, batch, slots, compiled, capture)
        except torch.OutOfMemoryError as error:
            raise NoRoomError(f"there is no memory for a cache of {batch} x {slots}") from error
        try:
            workspace.begin(request)
            columns = _decode(request, workspace, smallest, lag)
        except BaseException:
            _wait(model.device)  # steps under way write what the next call begins with
            raise
        workspace.end(model)
        new = torch.tensor(columns, dtype=torch.int64).t()
        return torch.cat([request.ids, new], 1).to(model.device)


def _decode(request: Request, workspace: Workspace, smallest: int, lag: int) -> list[list[int]]:
    model, state, rows = request.model, workspace.state, workspace.rows
    cursor, batch = state.cache.cursor, request.ids.shape[0]
    reader = _Reader(batch, lag, workspace.device, request.sampling.do_sample)
    answer = _Answer(request)
    logits = prefill(model, state, request.ids.to(model.device), request.padded, request.chunk)
    sampler = Sampler(request.sampling, logits.shape[-1], workspace.device)
    state.tokens.copy_(sampler(logits, rows, state.position)[:, None])
    del logits
    reader.push(state.tokens)

    def body() -> None:
        assert workspace.step is not None
        logits = workspace.step(state.tokens, state)
        state.position.add_(1)
        state.tokens.copy_(sampler(logits, rows, state.position)[:, None])

    with model._optimize_model_for_decode():
        for launched in range(1, request.new_tokens + 1):
            last = launched == request.new_tokens
            while len(reader) > (0 if last else lag) or reader.has_arrived():
                if answer.take(reader.pop()):
                    reader.rewind()
                    return answer.columns
            if not last:
                step = workspace.step = workspace.step or _build(model, workspace)
                used = request.ids.shape[1] + launched
                cursor.window = min(bucket(used, smallest), state.cache.slots)
                window = cursor.window if step.windowed else 0
                workspace.graphs.run((window, request.sampling), body, sampler)
                reader.push(state.tokens)
    return answer.columns


def _build(model: Any, workspace: Workspace) -> Step:
    state = workspace.state
    steps = (make(model, state.cache, state.tokens.shape[0]) for make in workspace.factories)
    return next(step for step in steps if step is not None)


class _Reader:
    """Brings tokens to the host without waiting for those just launched."""

    def __init__(self, batch: int, lag: int, device: torch.device, draws: bool) -> None:
        self._cuda = pin = device.type == "cuda"
        self._free = deque(
            torch.empty(batch, 1, dtype=torch.int64, pin_memory=pin) for _ in range(lag + 1)
        )
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, int]] = deque()
        self._generator = _generator(device) if draws and self._cuda else None
        self._offset: int = 0

    def __len__(self) -> int:
        return len(self._pending)

    def push(self, tokens: Tensor) -> None:
        """Start to copy ``tokens [B, 1]``."""
        buffer = self._free.popleft()
        buffer.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event() if self._cuda else None
        if event is not None:
            event.record()
        offset = 0 if self._generator is None else self._generator.get_offset()
        self._pending.append((buffer, event, offset))

    def has_arrived(self) -> bool:
        """Whether the next tokens can be had without waiting, so that a streamer gets them soon."""
        event = self._pending[0][1] if self._pending else None
        return event is not None and event.query()

    def pop(self) -> list[int]:
        """The oldest tokens pushed."""
        buffer, event, self._offset = self._pending.popleft()
        if event is not None:
            event.synchronize()
        self._free.append(buffer)
        values: list[int] = buffer[:, 0].tolist()
        return values

    def rewind(self) -> None:
        """Leave the random numbers as if nothing had been drawn past what was read."""
        if self._generator is not None and self._pending:
            self._generator.set_offset(self._offset)


class _Answer:
    """The tokens read so far, column by column, and whether all rows have ended."""

    def __init__(self, request: Request) -> None:
        self.columns: list[list[int]] = []
        batch, self._length = request.ids.shape
        self._request, self._ended = request, [False] * batch
        self._eos = frozenset(request.sampling.eos)
        self._ids = request.ids
        if request.stop is not None:
            self._ids = nn.functional.pad(request.ids, (0, request.new_tokens))
        if request.streamer is not None:
            request.streamer.put(request.ids)

    def take(self, tokens: list[int]) -> bool:
        """Note a column; True if it is the last."""
        request, ended = self._request, self._ended
        pad = request.sampling.pad
        if self._eos and pad is not None:  # also rows that a stop string ended
            tokens = [pad if done else token for token, done in zip(tokens, ended, strict=True)]
        self.columns.append(tokens)
        self._length += 1
        ended = [done or token in self._eos for token, done in zip(tokens, ended, strict=True)]
        if request.stop is not None:
            self._ids[:, self._length - 1] = torch.tensor(tokens)
            stopped = request.stop(self._ids[:, : self._length], None).tolist()
            ended = [one or other for one, other in zip(ended, stopped, strict=True)]
        self._ended = ended
        if request.streamer is not None:
            request.streamer.put(torch.tensor(tokens))
        done = all(ended) or len(self.columns) == request.new_tokens
        if done and request.streamer is not None:
            request.streamer.end()
        return done


def _generator(device: torch.device) -> torch.Generator:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
