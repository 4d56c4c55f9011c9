"""``catsparse info``: what is in a folder or a model."""

from __future__ import annotations

import json as json_module

from rich.table import Table

from .common import Json, Model, out, print_json


def info(model: Model = "default", json: Json = False) -> None:
    """What is in a sparse folder, or which gated MLPs a dense model has (no weights are read)."""
    from .. import hub
    from ..explanation import decode_paths, explain

    if not hub.is_artifact(model):
        skeleton = hub.load_skeleton(model)
        lines = explain(skeleton).split("\n")
        if json:
            print_json({"model": model, "modules": lines})
        else:
            out.print(f"{model} ({type(skeleton).__name__})")
            out.print("\n".join(lines), highlight=False)
        return
    config, _, calibration = hub.read_artifact(model)
    paths = decode_paths(config)
    if json:
        described = json_module.loads(config.to_json())
        print_json(described | {"bytes_skipped": config.bytes_skipped, "decode": paths})
        return
    base, origin = config.base_model, config.calibration
    out.print(
        f"{model}: {(base.name_or_path if base else '') or 'unnamed'} "
        f"({base.model_type if base else '?'}), method {config.described}, "
        f"prefill {config.prefill}"
    )
    unread = config.measured_down_sparsity
    down = "" if unread is None else f", {unread:.1%} of down rows unread"
    out.print(
        f"asked {config.sparsity:.1%}, {config.measured_sparsity or 0:.1%} of "
        f"{'neurons' if config.sites else 'inputs'} dropped{down} on the calibration tokens, "
        f"{config.bytes_skipped:.1%} of {config.weights} weight bytes skipped"
    )
    if origin:
        out.print(
            f"calibrated on {origin.tokens:,} tokens of {origin.data} in windows of "
            f"{origin.seq_len}, {origin.dtype}, seed {origin.seed}"
            + ("" if calibration else " (statistics not kept)")
        )
    second = () if unread is None else ("product threshold", "down rows unread")
    table = Table("gated MLP", "act", "H", "I", "threshold", "dropped", *second)
    for name, site in config.sites.items():
        cells = (f"{site.product_threshold:.4g}", f"{site.down_sparsity:.1%}") if second else ()
        table.add_row(
            name,
            site.act,
            str(site.hidden_size),
            str(site.intermediate_size),
            f"{site.threshold:.4g}",
            f"{site.sparsity:.1%}",
            *cells,
        )
    if config.sites:
        out.print(table)
    if config.inputs:
        inputs = Table("input of", "layers", "inputs", "outputs", "threshold", "dropped")
        for name, part in config.inputs.items():
            sizes = (str(len(part.linears)), str(part.in_features), str(part.out_features))
            inputs.add_row(name, *sizes, f"{part.threshold:.4g}", f"{part.sparsity:.1%}")
        out.print(inputs)
    for dtype, path in paths.items():
        out.print(f"decode here in {dtype}: by {path}", highlight=False, soft_wrap=True)
