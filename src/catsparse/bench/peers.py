"""Other implementations of a gated MLP to time beside ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CatsparseError
from ..kernels import ACTIVATIONS

# A peer: (w_gate [I, H], w_up [I, H], w_down [H, I]) -> call(x [T, H], threshold, act) -> y.
Peer = Callable[[Tensor, Tensor, Tensor], Callable[[Tensor, Tensor, str], Tensor]]


def index_select(
    w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Callable[[Tensor, Tensor, str], Tensor]:
    """What torch alone can do: gather the kept rows, then multiply."""
    w_down_t = w_down.t().contiguous()

    def call(x: Tensor, threshold: Tensor, act: str) -> Tensor:
        g = ACTIVATIONS[act](F.linear(x, w_gate))
        keep = g.float().abs() > threshold
        rows = keep.any(dim=0).nonzero().squeeze(1)
        u = F.linear(x, w_up.index_select(0, rows))
        h = torch.where(keep.index_select(1, rows), g.index_select(1, rows) * u, 0.0)
        return h @ w_down_t.index_select(0, rows)

    return call


def load_peer(path: Path) -> tuple[str, Peer]:
    """A peer from a Python file of the user's that defines ``prepare`` (see :data:`Peer`).

    Raises:
        CatsparseError: there is no such file or function.
    """
    if not path.is_file():
        raise CatsparseError(f"there is no file {path}; --peer takes a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CatsparseError(f"{path} is no Python file; --peer takes one that defines prepare")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prepare = getattr(module, "prepare", None)
    if prepare is None:
        raise CatsparseError(f"{path} defines no prepare(w_gate, w_up, w_down)")
    return path.stem, prepare
