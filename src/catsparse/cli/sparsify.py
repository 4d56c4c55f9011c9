"""``catsparse sparsify``: calibrate a model and write a sparse one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config import (
    ALLOCATIONS,
    CONFIG_NAME,
    DEFAULT_METHOD,
    GATE_METHODS,
    GPTQ,
    METHODS,
    OWN,
    PREFILL_POLICIES,
    PRODUCT,
    ROUNDING_TOKENS,
    ROUNDINGS,
    SCOPES,
    WEIGHTS,
    check_choice,
    check_down_sparsity,
    check_method,
    check_preview,
    check_sparsity,
)
from ..errors import CatsparseError
from ..files import check_target
from .common import (
    BatchSize,
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Scope,
    Seed,
    SeqLen,
    Tokens,
    err,
    load,
    load_dense,
    out,
    print_json,
    refuse_options,
    token_windows,
)


def sparsify(
    context: typer.Context,
    model: Model = "default",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")] = ...,  # type: ignore[assignment]
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of neurons (with teal and wina inputs) to drop, 0 to 1.",
            show_default="0.5, unless --bytes-skipped is given",
        ),
    ] = None,
    bytes_skipped: Annotated[
        float | None,
        typer.Option(help="Fraction of the scope's weight bytes not to read, not with --sparsity."),
    ] = None,
    allocation: Annotated[
        str,
        typer.Option(
            help=f"How --bytes-skipped is spread over layers: {', '.join(ALLOCATIONS)}; all but "
            "the first measure every layer's sensitivity, which costs as much as 30 evaluations."
        ),
    ] = "uniform",
    scope: Scope = "mlp",
    method: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(METHODS)}; else {PRODUCT} with a preview and no second "
            f"decision, {DEFAULT_METHOD} without."
        ),
    ] = None,
    compensate: Annotated[
        bool, typer.Option(help="Replace dropped neurons by their means (free at run time).")
    ] = True,
    preview: Annotated[
        int | None,
        typer.Option(
            help="Bits of a copy of gate and up (of the gate alone, unless the method is product) "
            "that decides, 4 or 8; else the gate itself."
        ),
    ] = None,
    down_sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the down projection's rows not to read, at least the sparsity: a "
            "second decision, not with the method product."
        ),
    ] = None,
    prefill: Annotated[
        str, typer.Option(help=f"{' or '.join(PREFILL_POLICIES)} treatment of the prompt.")
    ] = "masked",
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"Format to pack the linear layers' weights in, one of {', '.join(WEIGHTS)}, or "
            f"{OWN}, the codes of a checkpoint that is quantized already; calibrated afterwards."
        ),
    ] = None,
    data: Data = None,
    column: Column = "text",
    tokens: Tokens = 100_000,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    rounding: Annotated[
        str,
        typer.Option(
            help=f"Of --weights: nearest, or gptq, with up to {ROUNDING_TOKENS:,} tokens of the "
            "text; then also --merge."
        ),
    ] = "nearest",
    merge: Annotated[bool, typer.Option("--merge", help="Write the weights as well.")] = False,
    store_preview: Annotated[
        bool, typer.Option("--store-preview", help="With --merge: write the preview as well.")
    ] = False,
    json: Json = False,
) -> None:
    """Calibrate MODEL and write a sparse one to the output folder.

    Given a folder that was written before, take its calibration and only choose new thresholds.
    """
    if sparsity is not None:
        check_sparsity(sparsity)
    check_choice("allocation", allocation, ALLOCATIONS)
    if method is not None:
        check_choice("method", method, METHODS)
    check_choice("prefill", prefill, PREFILL_POLICIES)
    check_choice("scope", scope, SCOPES)
    check_preview(preview)
    if weights is not None:
        check_choice("weights", weights, (*WEIGHTS, OWN))
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding == GPTQ and (weights in (None, OWN) or not merge):
        raise CatsparseError(
            "--rounding gptq is of floats to a format, and kept with the weights; give --weights "
            "and --merge as well"
        )
    if weights == "int4" and preview is not None:
        raise CatsparseError("int4 weights are their own preview; leave --preview out")
    check_target(output, merge)
    if store_preview and not merge:
        raise CatsparseError("--store-preview writes beside the weights; give --merge as well")
    if store_preview and preview is None and not (Path(model) / CONFIG_NAME).is_file():
        raise CatsparseError("there is no preview to store; give --preview 4 as well")
    from ..allocation import Read, check_budget, check_reachable

    check_budget(sparsity, bytes_skipped, allocation, down_sparsity)
    sparsity = 0.5 if sparsity is None and bytes_skipped is None else sparsity
    if down_sparsity is not None and sparsity is not None:
        check_down_sparsity(down_sparsity, sparsity)
    from .. import hub
    from ..calibration import Calibration, GateDecision
    from ..explanation import masked_layers
    from ..footprint import weight_bytes
    from ..inputs import find_inputs, inputs_needed, select_parts
    from ..observation import calibrate
    from ..probing import GRID, TOKENS, measure_sensitivities, split_windows
    from ..quantized import quantize_weights
    from ..quantized_linear import weights_of_model
    from ..sites import describe, find_sites, require_sites
    from ..surgery import densify, state_of
    from ..surgery import sparsify as sparsify_model

    calibration: Calibration | None = None
    probing = allocation != "uniform"
    if hub.is_artifact(model):
        refuse_options(
            context,
            ("data", "column", "tokens", "seq_len", "batch_size", "seed", "weights", "rounding"),
            f"{model} brings its own calibration; name the dense model to calibrate again",
        )
        sparse, tokenizer = load(model, device, dtype, merge_adapter=merge)
        calibration = state_of(sparse).calibration
        if calibration is None:
            raise CatsparseError(f"{model} was saved without its calibration; name the dense model")
        if method is not None:
            check_method(method, calibration.preview_of(method), down_sparsity)
        wanted = None if sparsity is None else GateDecision(sparsity, method or DEFAULT_METHOD)
        if preview not in (None, calibration.preview):
            lacks = f"for a {preview}-bit preview"
        elif down_sparsity is not None and calibration.products_at != wanted:
            lacks = f"for a second decision behind {method or DEFAULT_METHOD} at {sparsity:.1%}"
        elif method == PRODUCT and not calibration.foretold:
            lacks = "for method product, which is newer"
        elif probing and calibration.sensitivities is None:
            lacks = f"with sensitivities, which the allocation {allocation} needs"
        else:
            calibration.parts(method or calibration.default_method(down_sparsity), scope)
            lacks = ""
        if lacks:
            raise CatsparseError(
                f"{model} was not calibrated {lacks}; name the dense model to calibrate again"
            )
        dense = densify(sparse)
    else:
        if method is not None:
            check_method(method, preview, down_sparsity)
        dense, tokenizer = load_dense(model, device, dtype)
        if rounding == GPTQ:
            size = min(tokens, ROUNDING_TOKENS)
            text = token_windows(data, "calibration", tokenizer, size, seq_len, seed, column)[0]
            quantize_weights(dense, weights, text, batch_size=batch_size)
        elif weights is not None:
            quantize_weights(dense, None if weights == OWN else weights)
    if calibration is None:
        products = preview is not None and method in (None, PRODUCT)
        chosen = method or (PRODUCT if products else DEFAULT_METHOD)
        inputs = inputs_needed(chosen, scope)
        if bytes_skipped is not None:  # refused now, not after the work
            sites = require_sites(dense)
            shared = find_inputs(dense, sites) if inputs else []
            parts = select_parts(
                {s.name: s for s in sites}, {s.name: s for s in shared}, chosen, scope
            )
            read = Read(preview, products, weight_bytes(str(dense.dtype), weights_of_model(dense)))
            check_reachable(parts, read, bytes_skipped, GRID[-1] if probing else 1.0)
        more = max(1, TOKENS // seq_len) * seq_len if probing else 0
        windows, data_name = token_windows(
            data, "calibration", tokenizer, tokens + more, seq_len, seed, column
        )
        windows, held_out = split_windows(windows, more // seq_len)
        partial = output / ".calibration.partial.safetensors"
        try:
            calibration = calibrate(
                dense,
                windows,
                batch_size=batch_size,
                seed=seed,
                data_name=data_name,
                checkpoint=partial,
                preview=preview,
                products_at=None if down_sparsity is None else sparsity,
                method=method if method in GATE_METHODS else DEFAULT_METHOD,
                keep_checkpoint=probing,
                inputs=inputs,
            )
            if probing:
                calibration.sensitivities = measure_sensitivities(
                    dense,
                    calibration,
                    held_out,
                    method,
                    compensate,
                    scope,
                    checkpoint=output / ".sensitivities.partial.safetensors",
                )
                partial.unlink(missing_ok=True)
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on from the last saved part")
            raise typer.Exit(130) from None
    left_dense = describe(find_sites(dense)[1])
    sparse = sparsify_model(
        dense,
        calibration,
        sparsity,
        method,
        compensate,
        prefill,
        down_sparsity,
        bytes_skipped=bytes_skipped,
        allocation=allocation,
        scope=scope,
    )
    hub.save(sparse, output, merge, store_preview)
    if merge:
        tokenizer.save_pretrained(output)
    config, masked = sparse.catsparse.config, masked_layers(sparse)
    result = {
        "output": str(output),
        "method": config.method,
        "compensate": compensate,
        "preview": config.preview,
        "weights": config.weight_format,
        "allocation": allocation,
        "scope": scope,
        "sparsity": config.measured_sparsity,
        "down_sparsity": config.measured_down_sparsity,
        "bytes_skipped": config.bytes_skipped,
        "sites": {name: site.sparsity for name, site in config.sites.items()},
        "input_sparsity": config.input_sparsity,
        "inputs": {name: part.sparsity for name, part in config.inputs.items()},
        "calibration_tokens": calibration.provenance.tokens,
        "calibration_data": calibration.provenance.data,
        "left_dense": left_dense,
        "masked": masked,
    }
    if json:
        print_json(result)
        return
    if left_dense:
        err.print(f"left dense: {left_dense}", highlight=False, markup=False, soft_wrap=True)
    packed = f" of {config.weight_format} weights" if config.weight_format else ""
    by_preview = f" by a {config.preview}-bit {config.decided_on} preview" if config.preview else ""
    unread = config.measured_down_sparsity
    lines = []
    for layers, shares, what, mean in (
        ("gated MLPs", [s.sparsity for s in config.sites.values()], "neurons", None),
        ("inputs", [p.sparsity for p in config.inputs.values()], "them", config.input_sparsity),
    ):
        if shares:
            mean = config.measured_sparsity if mean is None else mean
            spread = f" ({min(shares):.1%} to {max(shares):.1%})" if allocation != "uniform" else ""
            lines.append(f"{len(shares)} {layers}, {mean:.1%} of {what} dropped{spread}")
    out.print(
        f"{output}: {'; '.join(lines)}{packed}{by_preview}, "
        f"{'' if unread is None else f'{unread:.1%} of down rows unread, '}"
        f"{config.bytes_skipped:.1%} of {config.weights} weight bytes skipped in decode "
        f"({calibration.provenance.tokens:,} tokens of {calibration.provenance.data})"
    )
    if masked:
        why = next(iter(masked.values()))
        err.print(
            f"{len(masked)} gated MLPs are only masked, which skips no bytes: {why}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    out.print(f"next: catsparse evaluate {output}")
