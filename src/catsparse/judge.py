"""What every measurement of quality rests on: layers that did run sparse, batches that fit."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .errors import CatsparseError
from .meter import SparsityMeter, achieved_sparsity
from .surgery import sparse_layers, state_of, threshold_every_token

T = TypeVar("T")


@contextmanager
def scored_sparse(model: Any, positions: bool = False) -> Iterator[SparsityMeter]:
    """Threshold and count every token inside the ``with`` block, and check at its end that each
    sparse layer did so.

    The policy ``dense`` for prefill would hide the loss that decode meets, so it does not hold
    inside the block. ``positions`` is that of :func:`catsparse.achieved_sparsity`.

    Raises:
        CatsparseError: the model is dense or being measured already; at the end of the block: a
            layer that is meant to be sparse let tokens through dense, or saw none.
    """
    modules = sparse_layers(model)
    seen = dict.fromkeys(modules, 0)

    def watcher(name: str) -> Callable[..., None]:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            seen[name] += x.numel() // x.shape[-1]

        return note

    with threshold_every_token(model), achieved_sparsity(model, positions) as meter:
        handles = [
            module.register_forward_pre_hook(watcher(name), with_kwargs=True)
            for name, module in modules.items()
        ]
        try:
            yield meter
        finally:
            for handle in handles:
                handle.remove()
        _refuse_dense(model, modules, meter, seen)


def _refuse_dense(
    model: Any, modules: Mapping[str, nn.Module], meter: SparsityMeter, seen: dict[str, int]
) -> None:
    remedy = "no result is reported; load the model again (catsparse.explain tells what each runs)"
    gone = [name for name in _believed(model) if not _present(name, modules)]
    if gone:
        raise CatsparseError(f"{gone[0]} is meant to be sparse and is dense in the model: {remedy}")
    for name in modules:
        counted = meter.tokens(name)
        if seen[name] == 0 and counted == 0:
            raise CatsparseError(f"no token went through the sparse layer {name}: {remedy}")
        if counted < seen[name]:
            dense = seen[name] - counted
            raise CatsparseError(
                f"{name} is meant to be sparse and ran dense for {dense:,} of {seen[name]:,} "
                f"tokens: {remedy}"
            )


def _believed(model: Any) -> list[str]:
    try:
        config = state_of(model).config
        return [*config.sites, *(n for part in config.inputs.values() for n in part.linears)]
    except CatsparseError:  # made sparse module by module: nothing more is known
        return []


def _present(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Also under a wrapper's prefix, as PEFT has one."""
    return name in modules or any(other.endswith(f".{name}") for other in modules)


def while_it_fits(size: int, run: Callable[[int], T]) -> T:
    """``run(size)``, or from its start with half of it for as long as memory is too small.

    Raises:
        CatsparseError: not even size 1 fits.
    """
    while True:
        try:
            return run(size)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        # Out of the handler, whose traceback holds the tensors.
        if size == 1:
            raise CatsparseError(
                "the model does not fit into memory with its smallest batch; use another device, "
                "a smaller dtype, or shorter texts"
            )
        size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return "out of memory" in words or "can't allocate memory" in words


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """On stderr, with an estimate of the time left; gone at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        yield bar


def standard_error(values: Tensor) -> float:
    """Of the mean of ``values`` ``[N]``; nan for a single one."""
    if len(values) < 2:
        return math.nan
    return float(values.std()) / math.sqrt(len(values))
