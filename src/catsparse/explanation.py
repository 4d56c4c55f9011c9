"""How each layer of a model runs, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import PRODUCT, SparsityConfig
from .kernels import Backend, Choice, Decisions, PreviewKind, choose_backend
from .linears import SparseLinear, sparse_linears
from .modules import SparseMLP, sparse_modules
from .shards import Sharded
from .sites import describe, find_sites


def explain(model: nn.Module) -> str:
    """How each gated MLP and sparse linear layer of ``model`` runs, and why near misses were left
    dense; one line each."""
    sparse, paths = sparse_modules(model), model_paths(model)
    lines = []
    for name, module in sparse.items():
        threshold = module.catsparse_threshold
        kind = "per-neuron thresholds" if threshold.dim() else f"threshold {float(threshold):.4g}"
        if module.catsparse_mean is not None:
            kind += ", compensated"
        if (bits := module.catsparse_preview_bits) is not None:
            reason = module.why_not_preview()
            on = "product" if module.catsparse_of_products else "gate"
            kind += f", {bits}-bit {on} preview"
            kind += "" if reason is None else f" (not in use: {reason}; the exact {on} decides)"
        if module.catsparse_product_threshold is not None:
            kind += ", second decision"
        if isinstance(module, Sharded):
            shard = module.catsparse_shard
            kind += f", {shard.own} of {shard.neurons} neurons"
            kind += f" (rank {shard.rank} of {shard.ranks}, which add up)"
        lines.append(f"{name}: sparse, {kind}; decode by {paths[name].words}")
    for name, linear in sparse_linears(model).items():
        threshold = linear.catsparse_threshold
        kind = "per-input thresholds" if threshold.dim() else f"threshold {float(threshold):.4g}"
        if linear.catsparse_mean is not None:
            kind += ", compensated"
        lines.append(f"{name}: sparse inputs, {kind}; decode by {paths[name].words}")
    sites, misses = find_sites(model)
    of_inputs = "".join(f" {name}" for name in sparse_linears(model))
    sites = [s for s in sites if s.name not in sparse and f" {s.name}." not in of_inputs]
    lines += [f"{site.name}: dense gated MLP ({site.act})" for site in sites]
    misses = [m for m in misses if m.name not in sparse]
    if misses:
        lines.append(f"refused: {describe(misses, limit=20)}")
    return "\n".join(lines) if lines else f"{type(model).__name__}: no gated MLP found"


@dataclass(frozen=True)
class DecodePath:
    """How a sparse layer decodes, in words; whether dropped neurons' rows of up (and of gate, if a
    preview decides) and of down are then left unread. (The exact product needs all of up.) Of a
    linear layer ``skips_down`` stands for the weights of dropped inputs."""

    words: str
    skips_up: bool
    skips_down: bool


def model_paths(model: nn.Module) -> dict[str, DecodePath]:
    """The path that decode takes in each sparse MLP and linear layer of ``model``, by name."""
    paths = {name: _path(module) for name, module in sparse_modules(model).items()}
    return paths | {name: _linear_path(layer) for name, layer in sparse_linears(model).items()}


def masked_layers(model: nn.Module) -> dict[str, str]:
    """The gated MLPs of ``model`` whose children are called, so that a mask saves no bytes, and
    why: layers of another library, say."""
    sparse = sparse_modules(model)
    return {name: why for name, m in sparse.items() if (why := m.why_not_raw()) is not None}


def decode_paths(config: SparsityConfig | None = None) -> dict[str, str]:
    """How ``auto`` decodes on this machine's default device, and why, by dtype of the weights.

    Args:
        config: of a sparse model, whose largest gated MLP then answers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, decisions = None, Decisions()
    packed = None if config is None else config.weight_format
    if config is not None and config.sites:
        site = max(config.sites.values(), key=lambda s: s.hidden_size * s.intermediate_size)
        sizes = site.hidden_size, site.intermediate_size, site.hidden_size
        products, bits = config.method == PRODUCT, config.preview
        kind = None if bits is None else PreviewKind(bits, products)
        decisions = Decisions(kind, products or config.down_sparsity is not None)
    paths = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        choice = choose_backend(Backend.AUTO, device, dtype, sizes, decisions, packed)
        words = _words(choice)
        if choice.without_preview is not None:
            words += f", without the preview ({choice.without_preview})"
        paths[str(dtype).removeprefix("torch.")] = words
    return paths


def _words(choice: Choice) -> str:
    if not choice.kernel_tokens:
        return f"torch, dense matmuls ({choice.reason})"
    return f"the {choice.backend.value} kernel ({choice.reason})"


def _path(module: SparseMLP) -> DecodePath:
    reason = module.why_not_raw()
    if reason is not None:
        return DecodePath(f"masked children ({reason})", False, False)
    choice = module.choose_backend(module.catsparse_backend, module.catsparse_down_copy)
    if not choice.kernel_tokens:
        return DecodePath(_words(choice), False, False)
    rows, skips_down = ["gate", "up"], module.catsparse_down_copy
    if module.why_not_preview() is not None:  # the exact gate is read; for the exact product up too
        rows = [] if module.catsparse_of_products else ["up"]
    kept = " and ".join(", ".join([*rows, *["down"] * skips_down]).rsplit(", ", 1))
    words = f"{_words(choice)}, reading " + (f"kept rows of {kept}" if kept else "gate and up")
    words += "" if skips_down else ", all of down (no copy)"
    return DecodePath(words, bool(rows), skips_down)


def _linear_path(linear: SparseLinear) -> DecodePath:
    reason = linear.why_not_raw()
    if reason is not None:
        return DecodePath(f"a masked input ({reason})", False, False)
    choice = linear.choose_backend(linear.catsparse_backend, linear.catsparse_down_copy)
    if not choice.kernel_tokens:
        return DecodePath(_words(choice), False, False)
    return DecodePath(f"{_words(choice)}, reading the weights of kept inputs", False, True)
