"""``bench decode``: tokens/s of ``generate`` on one model, dense and sparse interleaved.

On a GPU ``catsparse.generate`` decodes, and transformers' own loop runs beside it; on a CPU they
are the same.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..calibration import Calibration, GateDecision
from ..config import PRODUCT
from ..decoding import generate
from ..errors import CatsparseError
from ..footprint import bytes_skipped
from ..linears import sparse_linears
from ..methods import SiteThreshold
from ..modules import SparseMLP, sparse_modules
from ..quantized_linear import QuantizedLinear, weights_name
from ..surgery import run_dense, set_backend, sparse_layers, state_of
from .checks import WARM_TOKENS, check, kept, options_for
from .rows import Probe, Row, commit, device_name, quantiles, versions

_STEPS = {"transformers": "plain", "dense_compiled": "compile"}

Preview = tuple[Tensor | None, Tensor | None]  # packed, and its scales


@dataclass
class Variant:
    """Dense, or one sparsity with its thresholds; ``intervals`` are seconds between tokens.

    ``transformers`` is dense in transformers' own loop, ``dense_compiled`` by the compiled step.
    With ``previews`` these decide, else the gate itself.
    """

    impl: str
    sparsity: float
    thresholds: dict[str, SiteThreshold] | None = None
    previews: dict[str, Preview] | None = None
    unread: float = 0.0  # bytes of the sparse layers a step
    max_err: float = 0.0
    intervals: list[float] = field(default_factory=list)


def bench_decode(
    model: Any,
    name: str,
    sparsities: Sequence[float],
    prompt: Tensor,
    new_tokens: int,
    rounds: int,
    backend: str = "auto",
    down_copy: bool = True,
    compiled: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Greedy decode after ``prompt``; the prompt's own time is left out.

    The rows' order is dense (on a GPU transformers' loop first), our kernel at sparsity 0, then
    each sparsity. Each round generates with every variant in turn. The kernel is checked on the
    model's own activations first.

    Args:
        model: a sparse model that holds its calibration.
        name: what the rows call it; see :class:`Row`.
        prompt: ``[B, T]`` token ids.
        compiled: also decode dense by the model's own forward, compiled; needs a GPU.
        advance: called after every generation.

    Raises:
        CatsparseError: the model cannot take another sparsity, or the kernel disagrees with the
            reference.
    """
    calibration = state_of(model).calibration
    if calibration is None:
        raise CatsparseError("the model was saved without its calibration; calibrate it again")
    if any(p.dim() > 2 for p in model.parameters()):
        raise CatsparseError(
            "the model has expert weights, of which a token reads a few only, so its byte limit is "
            "not known; bench op measures one MLP of its shape"
        )
    before = [
        (
            *(m, m.catsparse_threshold, m.catsparse_mean, m.catsparse_product_threshold),
            *(m.catsparse_backend, m.catsparse_down_copy, _preview(m)),
        )
        for m in sparse_modules(model).values()
    ]
    linears = [
        (m, m.catsparse_threshold, m.catsparse_mean, m.catsparse_backend, m.catsparse_down_copy)
        for m in sparse_linears(model).values()
    ]
    try:
        return _bench(
            *(model, name, sparsities, prompt, new_tokens, rounds),
            *(backend, down_copy, compiled, advance),
        )
    finally:
        for module, threshold, mean, product, asked, copy, preview in before:
            module.catsparse_preview, module.catsparse_preview_scale = preview
            module.set_backend(asked, copy)
            module.set_threshold(threshold, mean, product)
        for linear, threshold, mean, asked, copy in linears:
            linear.set_backend(asked, copy)
            linear.set_threshold(threshold, mean)


def _bench(
    model: Any,
    name: str,
    sparsities: Sequence[float],
    prompt: Tensor,
    new_tokens: int,
    rounds: int,
    backend: str,
    down_copy: bool,
    compiled: bool,
    advance: Callable[[], None],
) -> list[Row]:
    calibration = state_of(model).calibration
    assert calibration is not None
    set_backend(model, backend, down_copy)
    prompt = prompt.to(model.device)
    on_gpu = prompt.is_cuda
    if (on_gpu or prompt.shape[0] > 1) and new_tokens < WARM_TOKENS + 2:
        raise CatsparseError(f"{new_tokens} new tokens are too few; give {WARM_TOKENS + 2} or more")
    variants = [Variant("transformers", 0.0)] if on_gpu else []
    if compiled:
        variants.append(Variant("dense_compiled", 0.0))
    variants.append(Variant("dense", 0.0))
    previews = {name: _preview(m) for name, m in sparse_modules(model).items()}
    left_out = any(None in pair for pair in previews.values())  # see catsparse.explain
    # Without its preview method product would read all of gate and up: only keeping all is shown,
    # unless that is how the model decodes.
    exact = () if state_of(model).config.method == PRODUCT and not left_out else sparsities
    for s in sorted({0.0, *exact}):
        variants.append(_variant(model, calibration, s, prompt, down_copy, None))
    if calibration.preview is not None and not left_out:
        for s in sorted({*sparsities} - {0.0}):
            variants.append(_variant(model, calibration, s, prompt, down_copy, previews))
    probe = Probe(model.device)
    for round_number in range(rounds + 1):
        for variant in variants:
            intervals = _generate(model, variant, prompt, new_tokens)
            if round_number:  # the first round warms up
                variant.intervals += intervals
            advance()
        probe.measure()
    return _rows(model, name, variants, probe, prompt)


def _variant(
    model: Any,
    calibration: Calibration,
    sparsity: float,
    prompt: Tensor,
    down_copy: bool,
    previews: dict[str, Preview] | None,
) -> Variant:
    """Thresholds, the bytes they skip on this very text, and the check."""
    config = state_of(model).config
    # What the model has of a second decision belongs to its own sparsity.
    own = calibration.products_at == GateDecision(sparsity, config.method)
    thresholds = calibration.thresholds(
        *(sparsity, config.method, config.compensate, config.down_sparsity if own else None),
        scope=config.scope,
    )
    kind = "product" if config.method == PRODUCT else "preview"
    impl = "catsparse" if previews is None else f"catsparse_{kind}{calibration.preview}"
    variant = Variant(impl, sparsity, thresholds, previews)
    _apply(model, variant)
    modules = sparse_modules(model).values()
    choices = [layer._catsparse_choice for layer in sparse_layers(model).values()]
    if all(choice and prompt.shape[0] <= choice.kernel_tokens for choice in choices):
        seen = kept(model, prompt)
        if modules:
            one = next(iter(modules))
            all_of_up = previews is None and config.method == PRODUCT
            share = bytes_skipped(
                0.0 if all_of_up else 1 - seen.first,
                1 - seen.down if down_copy else 0.0,
                None if previews is None else calibration.preview,
                getattr(one, one.site_gate).in_features,
                one.weight_bytes,
                of_products=config.method == PRODUCT,
            )
            variant.unread += share * sum(map(_stored_bytes, modules))
        variant.unread += seen.input_bytes if down_copy else 0.0
    variant.max_err = check(model, prompt)
    return variant


def _apply(model: Any, variant: Variant) -> None:
    if variant.thresholds is not None:
        for name, module in sparse_modules(model).items():
            t = variant.thresholds[name]
            module.set_threshold(t.threshold, t.mean, t.product)
            none: Preview = (None, None)
            preview = none if variant.previews is None else variant.previews[name]
            module.catsparse_preview, module.catsparse_preview_scale = preview
        for name, part in state_of(model).config.inputs.items():
            t = variant.thresholds[name]
            for linear in part.linears:
                model.get_submodule(linear).set_threshold(t.threshold, t.mean)


def _preview(module: SparseMLP) -> Preview:
    return module.catsparse_preview, module.catsparse_preview_scale


def _generate(model: Any, variant: Variant, prompt: Tensor, new_tokens: int) -> list[float]:
    """Seconds between the new tokens of one run; on a GPU their mean, as tokens come in bunches."""
    _apply(model, variant)
    clock = _Clock()
    step = _STEPS.get(variant.impl, "auto")
    with run_dense(model) if variant.thresholds is None else nullcontext():
        if prompt.shape[0] > 1:  # a streamer takes one sequence: the time of a long and a short run
            return [_difference(model, step, prompt, new_tokens)]
        options = options_for(prompt, new_tokens)
        generate(model, prompt, step=step, streamer=clock, **options)
    # The first time is the prompt's arrival, the second the token that its forward pass gave.
    times = clock.times[1:]
    if prompt.is_cuda:
        times = times[WARM_TOKENS:]
        return [(times[-1] - times[0]) / (len(times) - 1)]
    return [b - a for a, b in itertools.pairwise(times)]


def _difference(model: Any, step: str, prompt: Tensor, new_tokens: int) -> float:
    """Seconds a step: a run of ``new_tokens`` less a short one, after a warm one."""
    took = []
    for count in (WARM_TOKENS, WARM_TOKENS, new_tokens):
        start = time.perf_counter()
        ids = generate(model, prompt, step=step, **options_for(prompt, count))
        ids[0, -1].item()
        took.append(time.perf_counter() - start)
    return (took[2] - took[1]) / (new_tokens - WARM_TOKENS)


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes to the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def bytes_per_token(model: Any) -> tuple[int, int]:
    """(weight bytes that a dense decode step reads, those of the sparse layers among them).

    An input embedding is one row, unless it is the output layer as well. The KV cache is left out:
    see :func:`cache_bytes`.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = _stored_bytes(model)
    if embedding is not head:
        total -= embedding.nbytes
    return total, sum(_stored_bytes(layer) for layer in sparse_layers(model).values())


def _stored_bytes(model: Any) -> int:
    """Of parameters, and of packed weights' scales."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    scales: int = sum(layer.weight_scale.nbytes for layer in layers)
    return scales + sum(int(p.nbytes) for p in model.parameters())


def cache_bytes(model: Any, slots: int) -> int:
    """Bytes of keys and values that a step reads for one sequence of so many tokens."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * slots)


def _rows(
    model: Any, name: str, variants: list[Variant], probe: Probe, prompt: Tensor
) -> list[Row]:
    total, of_sparse = bytes_per_token(model)
    if state_of(model).config.scope == "all":
        name = f"{name}, all linears"
    batch, context = prompt.shape
    rates = [(v, quantiles([batch / s for s in v.intervals])) for v in variants]
    best = max(q[1] for v, q in rates if v.sparsity == 0)
    rows = []
    for v, (p20, p50, p80) in rates:
        read = total - v.unread + batch * cache_bytes(model, context)
        limit = batch * probe.bandwidth / read
        rows.append(
            Row(
                what="decode",
                name=name,
                impl=v.impl,
                device=device_name(model.device),
                threads=torch.get_num_threads() if model.device.type == "cpu" else 0,
                dtype=str(model.dtype).removeprefix("torch."),
                weights=weights_name(model),
                tokens=batch,
                context=context,
                sparsity=v.sparsity,
                bytes_skipped=v.unread / of_sparse,
                p20=p20,
                p50=p50,
                p80=p80,
                limit=limit,
                of_limit=p50 / limit,
                vs_dense=p50 / best,
                max_err=v.max_err,
                versions=versions(),
                commit=commit(),
            )
        )
    return rows
