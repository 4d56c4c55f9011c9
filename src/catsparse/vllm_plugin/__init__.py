"""vLLM runs a sparse model: quantization method ``cats``, an entry point of vLLM's plugins.

vLLM calls :func:`register` in each of its processes if catsparse is installed beside it; nothing
of vLLM is imported before. ``shards`` is the sparse MLP of one rank, ``layers`` what vLLM calls,
``ops`` what its compiled graphs hold.
"""

from __future__ import annotations

import importlib

from ..merged_weights import QUANT_METHOD

__all__ = ["register"]


def register() -> None:
    """Make vLLM know ``quant_method: cats``; safe to call again."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        importlib.import_module(f"{__name__}.layers")
