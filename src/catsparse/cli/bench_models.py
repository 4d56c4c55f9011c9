"""Models and prompts for ``catsparse bench decode``."""

from __future__ import annotations

from typing import Any

from ..config import DEFAULT_METHOD
from ..errors import CatsparseError
from .common import err, load


def random_weights(
    name: str,
    dtype: str,
    device: str,
    lengths: list[int],
    count: int,
    preview: int | None,
    method: str | None,
    scope: str,
    weights: str | None,
) -> tuple[Any, dict[int, Any]]:
    """A sparse model of a shape, and ``count`` prompts of each length."""
    import torch

    from ..bench import find_shape
    from ..bench.rows import parse_dtype
    from ..bench.shapes import random_model
    from ..inputs import inputs_needed
    from ..observation import calibrate
    from ..quantized import quantize_weights
    from ..surgery import sparsify

    shape = find_shape(name)
    err.print(f"making random weights of the shape {name} and calibrating them", style="dim")
    model = random_model(shape, parse_dtype("float32" if dtype == "auto" else dtype), device)
    if weights is not None:
        quantize_weights(model, weights)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab, (4, 128), generator=generator)
    chosen = method or DEFAULT_METHOD
    inputs = inputs_needed(chosen, scope)
    calibration = calibrate(
        model, ids, data_name="random tokens", preview=preview, progress=False, inputs=inputs
    )
    prompts = {n: torch.randint(shape.vocab, (count, n), generator=generator) for n in lengths}
    return sparsify(model, calibration, method=chosen, scope=scope), prompts


def real_weights(
    name: str,
    dtype: str,
    device: str,
    lengths: list[int],
    count: int,
    preview: int | None,
    method: str | None,
    scope: str,
    weights: str | None,
) -> tuple[Any, dict[int, Any]]:
    """The same of a checkpoint or of a sparse folder."""
    from .. import hub
    from ..inputs import inputs_needed
    from ..observation import calibrate
    from ..quantized import quantize_weights
    from ..surgery import sparsify
    from .common import token_windows

    given = (
        *(("preview", preview), ("method", method), ("weights", weights)),
        ("scope", None if scope == "mlp" else scope),
    )
    for option, value in given:
        if hub.is_artifact(name) and value is not None:
            raise CatsparseError(f"{name} has the {option} it was saved with; leave --{option} out")
    model, tokenizer = load(name, device, dtype)
    if not hub.is_artifact(name):
        if weights is not None:
            quantize_weights(model, weights)
        windows, source = token_windows(None, "calibration", tokenizer, 8192, 512, 0, "text")
        chosen = method or DEFAULT_METHOD
        inputs = inputs_needed(chosen, scope)
        calibration = calibrate(model, windows, data_name=source, preview=preview, inputs=inputs)
        model = sparsify(model, calibration, method=chosen, scope=scope)
    prompts = {
        n: token_windows(None, "heldout", tokenizer, count * n, n, None, "text")[0] for n in lengths
    }
    for n, found in prompts.items():
        if len(found) < count:
            raise CatsparseError(
                f"the bundled text holds {len(found)} prompts of {n} tokens, not {count}; take a "
                "smaller --batch, or random prompts with --config"
            )
    return model, prompts
