"""Sparse folders and result rows for the tests of the report's page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import catsparse
import tiny
from catsparse import hub

GRID = (0.25, 0.5, 0.9)


def make_folder(
    root: Path,
    *,
    method: str = "energy",
    table: bool = True,
    keep: bool = True,
    preview: int | None = None,
    base: str = "tiny",
    config: Any = None,
    **options: Any,
) -> Path:
    """A tiny model's sparse folder ``root/sparse``, its base ``root/<base>`` beside.

    Args:
        table: measure the sensitivities, too.
        keep: with the calibration's statistics.
        config: of the model.
        options: of ``sparsify``; by default half of the neurons are dropped.
    """
    model = hub.load_dense_model(str(tiny.save_base(root / base, config)))
    down = options.get("down_sparsity")
    calibration = catsparse.calibrate(
        model,
        tiny.tokens(8, 32, seed=7),
        progress=False,
        data_name="a text",
        preview=preview,
        products_at=None if down is None else options["sparsity"],
        inputs="all" if method in ("teal", "wina") or options.get("scope") == "all" else None,
    )
    if table:
        calibration.sensitivities = catsparse.measure_sensitivities(
            model,
            calibration,
            tiny.tokens(2, 32, seed=9),
            method,
            sparsities=GRID,
            progress=False,
            scope=options.get("scope", "mlp"),
        )
    options = options or {"sparsity": 0.5}
    catsparse.sparsify(model, calibration, method=method, **options)
    if not keep:
        model.catsparse = replace(model.catsparse, calibration=None)
    catsparse.save(model, root / "sparse")
    return root / "sparse"


def compare_row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "method": "cats",
        "compensate": False,
        "preview": None,
        "allocation": "uniform",
        "target": 0.3,
        "bytes_skipped": 0.31,
        "sparsity": 0.465,
        "perplexity": 22.0,
        "perplexity_se": 0.5,
        "dense_perplexity": 20.0,
        "dense_perplexity_se": 0.4,
        "rise": 0.1,
        "rise_se": 0.003,
        "tokens": 1000,
        "heldout": "held out",
    } | changes


def task_row(**changes: Any) -> dict[str, Any]:
    """As ``catsparse compare --tasks`` prints it of a sparse model."""
    return {
        "task": "blimp",
        "source": "local",
        "variant": "sparse",
        "metric": "acc",
        "value": 0.65,
        "stderr": 0.07,
        "n": 40,
        "difference": -0.05,
        "difference_stderr": 0.01,
        "model": "tiny",
        "method": "cats",
        "compensate": False,
        "preview": None,
        "scope": "mlp",
        "sparsity": 0.465,
        "bytes_skipped": 0.31,
        "allocation": "uniform",
        "bytes_asked": 0.3,
    } | changes


def evaluate_row(config: catsparse.SparsityConfig, **changes: Any) -> dict[str, Any]:
    """As ``catsparse evaluate --json`` prints it for a folder of this config."""
    names = [*config.sites, *config.inputs]
    return {
        "model": "out/sparse",
        "base_model": "tiny",
        "data": "held out",
        "tokens": 1000,
        "seq_len": 32,
        "method": config.method,
        "compensate": config.compensate,
        "preview": config.preview,
        "perplexity": 21.0,
        "perplexity_se": 0.5,
        "dense_perplexity": 20.0,
        "dense_perplexity_se": None,
        "rise": 0.05,
        "rise_se": 0.002,
        "sparsity": 0.52,
        "bytes_skipped": 0.34,
        "sites": {name: 0.5 + k / 100 for k, name in enumerate(names)},
        "expected_sites": {n: p.sparsity for n, p in (config.sites | config.inputs).items()},
        "positions": {
            "starts": [0, 1, 2],
            "length": 4,
            "sparsity": [0.4, 0.5, 0.6],
            "sites": {name: [0.4, 0.5, 0.6] for name in names},
        },
    } | changes


def bench_row(**changes: Any) -> dict[str, Any]:
    return {
        "what": "op",
        "name": "llama-2-7b",
        "impl": "catsparse",
        "device": "a processor",
        "threads": 2,
        "dtype": "float32",
        "tokens": 1,
        "context": 0,
        "sparsity": 0.5,
        "bytes_skipped": 0.333,
        "p20": 9.0,
        "p50": 10.0,
        "p80": 12.0,
        "limit": 8.0,
        "of_limit": 1.25,
        "vs_dense": 1.4,
        "max_err": 0.0,
        "versions": {},
        "commit": "abc",
    } | changes
