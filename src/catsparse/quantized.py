"""``quantize_weights``: pack the linear layers of a model that decode reads.

Rounded to nearest the same model gives the same bits, so that an artifact needs to say the format
only; rounded with data (:mod:`.gptq`) they are saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .adapters import has_adapters
from .batches import Data, as_batches
from .checkpoints import Codes, is_linear, own_codes, quantized_by, settle
from .config import GPTQ, OWN, ROUNDING_TOKENS, WEIGHTS, check_choice
from .errors import CatsparseError
from .gptq import round_model
from .inputs import block_of
from .kernels.preview import GROUP
from .quantized_linear import QuantizedLinear, weights_of_model
from .sites import require_sites
from .strict_json import shorten
from .weights import is_spread, why_no_matrix


def quantize_weights(
    model: Any,
    weights: str | None = None,
    data: Data | None = None,
    tokenizer: Any = None,
    *,
    tokens: int = ROUNDING_TOKENS,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Pack every linear layer that decode reads, in place, and return the model.

    These are the linear layers of the gated MLPs' blocks and the output layer; one that is tied to
    the embedding gets a packed copy of its own, and the embedding stays. Calibrate afterwards:
    thresholds belong to the weights that decode reads.

    Of a checkpoint that another library quantized, ``weights=None`` keeps the very codes and scales
    of each layer whose layout can be read by rows; the other layers stay as they are, a gated MLP
    as a whole, and :func:`catsparse.explain` says why. Scales that a checkpoint makes of each
    token's activations are left out: the inputs are not rounded any more. Naming a format rounds
    such layers' floats once more, which adds an error to that of the checkpoint.

    With ``data`` the weights are rounded by GPTQ, each block seeing what the packed ones before it
    make; such a model is saved with ``merge=True`` only. Its floats are kept until the end.

    Args:
        model: a dense model with its weights in memory.
        weights: ``int8`` (a scale a row), ``fp8`` (e4m3, a scale a row) or ``int4`` (a scale for 64
            inputs); None for the checkpoint's own.
        data, tokenizer, tokens, seq_len, batch_size, seed: text to round with, as for
            :func:`catsparse.calibrate`; None for round to nearest.
        progress: show a progress bar on stderr, with ``data``.

    Raises:
        CatsparseError: the format is unknown, a layer does not fit it, no layer has codes of its
            own that can be read by rows, or the model is sparse, spread over processes, wrapped by
            PEFT, packed already, or has experts; or ``data`` is no text, does not reach a layer, or
            is given for a checkpoint that is quantized already.
    """
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    if getattr(model, "catsparse", None) is not None:
        raise CatsparseError("the model is sparse already; quantize it before calibrate")
    if has_adapters(model):
        raise CatsparseError(
            "the model holds PEFT adapters; pack it before they are added, or merge them first"
        )
    found = linears_to_quantize(model)
    if weights is None and data is None:
        return _keep_codes(model, found)
    if data is not None and (
        weights is None or any(quantized_by(model.get_submodule(name)) for name in found)
    ):
        raise CatsparseError(
            "weights are rounded with data from floats, to a format; leave data out"
        )
    assert weights is not None
    for name, by_input in found.items():
        layer = model.get_submodule(name)
        foreign = quantized_by(layer) is not None
        reason = None if foreign else why_no_matrix(shorten(name), layer)
        if reason is None and not foreign and is_spread(layer.weight):
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
    tied_before = model.config.tie_word_embeddings
    made = {}
    for name, by_input in found.items():
        layer = model.get_submodule(name)
        if quantized_by(layer) is not None:  # before any change, as the library may fail
            made[name] = QuantizedLinear.of(layer, weights, by_input)
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        model.config.tie_word_embeddings = False  # the packed head is no copy of the embedding
    if data is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        settings = (tokenizer, tokens, seq_len, batch_size, seed, "rounding", dtype, None)
        try:
            round_model(model, found, weights, as_batches(data, *settings)[0], progress)
        except BaseException:
            model.config.tie_word_embeddings = tied_before
            raise
        return model
    for name, by_input in found.items():
        packed = made.get(name) or QuantizedLinear.of(model.get_submodule(name), weights, by_input)
        model.set_submodule(name, packed)
    settle(model)
    return model


def quantize_again(model: Any, stored: str) -> None:
    """Pack a base model as an artifact of it says: a value of ``config.STORED_WEIGHTS``.

    Raises:
        CatsparseError: what :func:`quantize_weights` refuses, or weights that were rounded with
            data.
    """
    source, _, weights = stored.rpartition("-")
    if source == GPTQ:
        raise CatsparseError(
            "the thresholds belong to weights that were rounded with data, which only a merged "
            "folder holds; load that"
        )
    quantize_weights(model, None if source == OWN else weights)


def _keep_codes(model: Any, found: dict[str, bool]) -> Any:
    """:func:`quantize_weights` with a checkpoint's own codes."""
    codes: dict[str, Codes] = {}
    reasons: list[str] = []
    left: set[str] = set()
    for name in found:
        layer = model.get_submodule(name)
        if quantized_by(layer) is None:
            continue
        got = own_codes(layer)
        if isinstance(got, Codes):
            codes[name] = got
        else:
            reasons.append(f"{shorten(name)}, {got}")
    if not codes and not reasons:
        raise CatsparseError("no linear layer of the model is quantized; name a format of weights")
    for site in require_sites(model):
        names = [f"{site.name}.{n}" for n in (site.gate, site.up, site.down) if n is not None]
        kinds = {codes[n].weights if n in codes else None for n in names}
        if len(kinds) > 1 or kinds & {None, "int4"}:
            # An MLP runs in one path; W_down in 4 bits has its scales along the wrong axis.
            left.update(names)
            reasons += [f"{shorten(site.name)}, int4 codes lie by output"] * ("int4" in kinds)
    codes = {name: c for name, c in codes.items() if name not in left}
    formats = sorted({c.weights for c in codes.values()})
    if len(formats) != 1:
        why = f"they are of several formats ({', '.join(formats)})" if formats else reasons[0]
        raise CatsparseError(
            f"the checkpoint's own codes cannot be packed: {why}; leave them, or name a format to "
            "round again"
        )
    dtype = model.get_input_embeddings().weight.dtype
    for name, own in codes.items():
        layer = QuantizedLinear.of_codes(model.get_submodule(name), own, dtype, found[name])
        model.set_submodule(name, layer)
    settle(model)
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
            model.set_submodule(name, layer)


def prepare_to_load(model: Any, weights: str) -> None:
    """Put empty packed layers in place of those that :func:`quantize_weights` packs, before a
    checkpoint of them is loaded."""
    source, _, weights = weights.rpartition("-")
    for name, by_input in linears_to_quantize(model).items():
        old = model.get_submodule(name)
        sizes, biased = (old.in_features, old.out_features), old.bias is not None
        like = {"dtype": old.weight.dtype, "device": old.weight.device}
        empty = QuantizedLinear(*sizes, weights, by_input, biased, **like)
        empty.source = source or None
        model.set_submodule(name, empty)


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
            if is_linear(module):
                found[name] = name in downs
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if module is head and is_linear(module):
            found[name] = False
    return found


def as_arguments(weights: str) -> str:
    """What :func:`quantize_weights` is called with for a stored format."""
    if weights.startswith(OWN):
        return "model"
    source, _, weights = weights.rpartition("-")
    return f"model, {weights!r}" + ", data" * (source == GPTQ)


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
            remedy = f"call catsparse.quantize_weights({as_arguments(weights)})"
        raise CatsparseError(
            f"the thresholds are those of {named[0]}, the model holds {named[1]}; {remedy}"
        )
    if here is not None and here.endswith("int4") and preview is not None:
        raise CatsparseError(
            "int4 weights are their own preview; calibrate without preview and take a method of "
            "the gate"
        )
