"""What ``bench decode`` finds out before it times: what a step reads, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CatsparseError
from ..kernels import gated_mlp_reference, sparse_linear_reference
from ..linears import SparseLinear, sparse_linears
from ..modules import SparseMLP, sparse_modules
from ..surgery import sparse_layers
from .rows import TOLERANCE

# On a GPU, a step's kernels are built and its graph is captured while these tokens are decoded; a
# batch's time is that of a long run less one of so many tokens.
WARM_TOKENS = 8


@dataclass(frozen=True)
class Kept:
    """What decode steps of a batch read.

    Attributes:
        first: share of neurons that any sequence keeps by the first decision.
        down: share of them kept in all.
        input_bytes: weight bytes of sparse linear layers, whose input every sequence drops, a step.
    """

    first: float
    down: float
    input_bytes: float


def kept(model: Any, prompt: Tensor) -> Kept:
    """Counted in a few decode steps after ``prompt`` ``[B, T]``."""
    neurons, linears = _Union(prompt.shape[0]), sparse_linears(model)
    unions = {name: _Union(prompt.shape[0]) for name in linears}
    try:
        for module in sparse_modules(model).values():
            module.catsparse_counter = neurons
        for name, linear in linears.items():
            linear.catsparse_counter = unions[name]
        model.generate(prompt, **options_for(prompt, WARM_TOKENS))
    finally:
        for layer in sparse_layers(model).values():
            layer.catsparse_counter = None
    shares = [(unions[name].shares()[0], m.weight.nbytes) for name, m in linears.items()]
    return Kept(*neurons.shares(), sum((1 - share) * size for share, size in shares))


class _Union:
    """Counts, in decode steps of ``batch`` sequences, neurons or inputs that any of them keeps."""

    def __init__(self, batch: int) -> None:
        self.batch, self.total = batch, 0
        self.keep: Tensor | int = 0
        self.kept: Tensor | int = 0

    def __call__(self, keep: Tensor, kept: Tensor | None = None) -> None:
        neurons = keep.shape[-1]
        kept = keep if kept is None else kept
        if keep.numel() == self.batch * neurons:  # else it is the prompt's
            self.keep = self.keep + keep.view(-1, neurons).any(0).sum(dtype=torch.int64)
            self.kept = self.kept + kept.view(-1, neurons).any(0).sum(dtype=torch.int64)
            self.total += neurons

    def shares(self) -> tuple[float, float]:
        total = max(self.total, 1)
        return float(self.keep) / total, float(self.kept) / total


def options_for(prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }


def check(model: Any, prompt: Tensor) -> float:
    """Largest error of first, middle and last layer on their real inputs for the last prompt token.

    Raises:
        CatsparseError: it is above the dtype's tolerance.
    """
    modules: list[tuple[str, Any]] = list(sparse_layers(model).items())
    chosen = dict(modules[i] for i in sorted({0, len(modules) // 2, len(modules) - 1}))
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(module: Any, args: tuple[Tensor]) -> None:
            inputs[name] = args[0].reshape(-1, args[0].shape[-1])[-1:].detach()

        return hook

    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in chosen.items()]
    try:
        with torch.no_grad():
            model(prompt, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return max([_error(name, chosen[name], x) for name, x in inputs.items()])


@torch.no_grad()
def _error(name: str, module: SparseMLP | SparseLinear, x: Tensor) -> float:
    y = _expected(name, module, x)
    error = float((module(x).float() - y).abs().max() / y.abs().max())
    if not error <= TOLERANCE[x.dtype]:
        raise CatsparseError(
            f"{name} differs from the reference by {error:.2g} of its largest value; "
            "a wrong result is not timed"
        )
    return error


def _expected(name: str, module: SparseMLP | SparseLinear, x: Tensor) -> Tensor:
    """The reference in fp32."""
    if isinstance(module, SparseLinear):
        module.prepare_decode()
        weight_t = module.weight.detach().float().t()
        limits = module.catsparse_threshold, module.catsparse_mean, module.catsparse_bias
        return sparse_linear_reference(x.float(), weight_t, *limits)
    weights = module.raw_weights(x.dtype)
    if weights is None:
        raise CatsparseError(
            f"{name} cannot run the kernel ({module.why_not_raw(x.dtype)}); merge or convert first"
        )
    gate, up, down_t = weights.floats(torch.float32)
    bias = None if module.catsparse_mean is None else module.catsparse_mean @ down_t
    threshold, product = module.limits(module.catsparse_preview)
    return gated_mlp_reference(
        x.float(),
        *(gate, up, down_t, threshold, module.site_act),
        *(module.catsparse_mean, bias, product),
        *(module.catsparse_preview, module.catsparse_preview_scale),
    )
