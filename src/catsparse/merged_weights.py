"""The weights of a merged directory, and the word in its config.json that tells it apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import CatsparseError
from .weights import is_spread

# What config.json says; quantizer.py and vllm_plugin answer to it.
QUANT_METHOD = "cats"


def write_weights(model: Any, folder: Path, **save_pretrained_kwargs: Any) -> None:
    """``save_pretrained`` with a config.json that says ``quant_method: cats``. Weights spread over
    processes are gathered, which every rank must call, and the first one writes.

    Raises:
        CatsparseError: the weights are quantized by another library, or were.
    """
    had_config = getattr(model.config, "quantization_config", None)
    plain = all(type(p) is nn.Parameter or is_spread(p) for p in model.parameters())
    if not plain or getattr(had_config, "quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise CatsparseError(
            "the model's weights are quantized, so they cannot be merged; save without merge"
        )
    try:
        model.config.quantization_config = {"quant_method": QUANT_METHOD}
        type(model).save_pretrained(model, folder, **save_pretrained_kwargs)
        _write_index(folder)
    finally:
        if had_config is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = had_config


def _write_index(folder: Path) -> None:
    """Say which file holds weights: without an index vLLM reads every safetensors file as such."""
    weights, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if weights.exists() and not index.exists():
        with safe_open(weights, framework="pt") as file:
            names = dict.fromkeys(sorted(file.keys()), SAFE_WEIGHTS_NAME)
        metadata = {"total_size": weights.stat().st_size}
        index.write_text(
            json.dumps({"metadata": metadata, "weight_map": names}, indent=2) + "\n", "utf-8"
        )
