"""``quantize_weights``: pack the linear layers of a model that decode reads.

Round to nearest: the same model gives the same bits, so that an artifact needs to say the format
only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapters import has_adapters
from .config import WEIGHTS, check_choice
from .errors import CatsparseError
from .inputs import block_of
from .kernels.preview import GROUP
from .quantized_linear import QuantizedLinear
from .sites import require_sites
from .strict_json import shorten
from .weights import is_spread, why_no_matrix

# What rows call weights that are not packed.
FLOAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def quantize_weights(model: Any, weights: str) -> Any:
    """Pack every linear layer that decode reads, in place, and return the model.

    These are the linear layers of the gated MLPs' blocks and the output layer; one that is tied to
    the embedding gets a packed copy of its own, and the embedding stays. Calibrate afterwards:
    thresholds belong to the weights that decode reads.

    Args:
        model: a dense model with its weights in memory.
        weights: ``int8`` (a scale a row), ``fp8`` (e4m3, a scale a row) or ``int4`` (a scale for 64
            inputs).

    Raises:
        CatsparseError: the format is unknown, a layer does not fit it, or the model is sparse,
            spread over processes, wrapped by PEFT, quantized already, or has experts.
    """
    check_choice("weights", weights, WEIGHTS)
    if getattr(model, "catsparse", None) is not None:
        raise CatsparseError("the model is sparse already; quantize it before calibrate")
    if has_adapters(model):
        raise CatsparseError(
            "the model holds PEFT adapters; quantize it before they are added, or merge them first"
        )
    found = linears_to_quantize(model)
    for name, by_input in found.items():
        layer = model.get_submodule(name)
        reason = why_no_matrix(shorten(name), layer)
        if reason is None and is_spread(layer.weight):
            reason = f"{shorten(name)} is spread over processes"
        if reason is None and weights == "int4":
            size = layer.out_features if by_input else layer.in_features
            if size % GROUP:
                reason = f"rows of {size} in {shorten(name)} are not whole groups of {GROUP}"
            elif layer.out_features % 8 and not by_input:
                # Half of a fused one must begin where the packing's pattern does.
                reason = f"{shorten(name)} has {layer.out_features} rows, no multiple of 8"
        if reason is not None:
            raise CatsparseError(f"the weights cannot be packed in {weights}: {reason}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        model.config.tie_word_embeddings = False  # the packed head is no copy of the embedding
    for name, by_input in found.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, QuantizedLinear.of(getattr(owner, child), weights, by_input))
    return model


@contextmanager
def quantized(model: Any, weights: str | None) -> Iterator[None]:
    """Inside, ``model`` is packed by :func:`quantize_weights`, which may refuse; afterwards it has
    its own layers again, which are kept in memory beside. None packs nothing."""
    if weights is None:
        yield
        return
    before = {name: model.get_submodule(name) for name in linears_to_quantize(model)}
    tied = model.config.tie_word_embeddings
    try:
        quantize_weights(model, weights)
        yield
    finally:
        model.config.tie_word_embeddings = tied
        for name, layer in before.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def prepare_to_load(model: Any, weights: str) -> None:
    """Put empty packed layers in place of those that :func:`quantize_weights` packs, before a
    checkpoint of them is loaded."""
    for name, by_input in linears_to_quantize(model).items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        old = getattr(owner, child)
        sizes, biased = (old.in_features, old.out_features), old.bias is not None
        like = {"dtype": old.weight.dtype, "device": old.weight.device}
        setattr(owner, child, QuantizedLinear(*sizes, weights, by_input, biased, **like))


def linears_to_quantize(model: Any) -> dict[str, bool]:
    """The names of the layers that :func:`quantize_weights` packs, and whether by input.

    Raises:
        CatsparseError: the model has no gated MLP, or experts.
    """
    sites = require_sites(model)
    downs = {f"{site.name}.{site.down}" for site in sites}
    found: dict[str, bool] = {}
    for block in dict.fromkeys(block_of(model, site.name) for site in sites):
        inner = model.get_submodule(block)
        experts = [n for n, p in inner.named_parameters() if p.dim() > 2 and p.shape[0] > 1]
        if experts:
            raise CatsparseError(
                f"{shorten(block)} has expert weights ({experts[0]}), which cannot be packed yet"
            )
        for name, module in inner.named_modules(prefix=block):
            if isinstance(module, nn.Linear):
                found[name] = name in downs
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            found[name] = False
    return found


def weights_of_model(model: Any) -> str | None:
    """The format that :func:`quantize_weights` packed a model in; None for one of floats."""
    kinds = {m.weights for m in model.modules() if isinstance(m, QuantizedLinear)}
    return kinds.pop() if len(kinds) == 1 else None


def weights_name(model: Any) -> str:
    """What rows call a model's weights: a format, or a dtype of floats."""
    return weights_of_model(model) or FLOAT_NAMES.get(model.dtype, str(model.dtype))


def check_weights(model: Any, weights: str | None, preview: int | None) -> None:
    """Refuse thresholds of other weights than the model's.

    Raises:
        CatsparseError: the model is not packed in the format ``weights``, or is in int4 and a
            preview is to decide.
    """
    here = weights_of_model(model)
    if here != weights:
        named = [f"{w} weights" if w else "floats" for w in (weights, here)]
        remedy = "calibrate again"
        if weights:
            remedy = f"call catsparse.quantize_weights(model, {weights!r})"
        raise CatsparseError(
            f"the thresholds are those of {named[0]}, the model holds {named[1]}; {remedy}"
        )
    if here == "int4" and preview is not None:
        raise CatsparseError(
            "int4 weights are their own preview; calibrate without preview and take a method of "
            "the gate"
        )
