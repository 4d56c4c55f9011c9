"""Tiny models with random weights, and the sparse maths written out once more, by hand."""

from __future__ import annotations

import copy
import os
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import catsparse

os.environ["HF_HUB_OFFLINE"] = "1"  # for subprocesses
huggingface_hub.constants.HF_HUB_OFFLINE = True

VOCABULARY = 64
SHORT, LONG = 5, 24  # tokens: below and above what the op takes in one call


# The wide initialisation spreads the gates, so that a threshold has something to cut.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SMALL | changes))


def build(config: Any, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # Random tokens must not end a generation early.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def save_base(folder: Path, config: Any | None = None, seed: int = 0) -> Path:
    """A dense model's directory."""
    build(llama_config() if config is None else config, seed).save_pretrained(folder)
    return folder


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def calibrate(model: Any, seed: int = 7) -> catsparse.Calibration:
    return catsparse.calibrate(model, tokens(8, 32, seed), progress=False)


@torch.no_grad()
def logits(model: Any, length: int = LONG, seed: int = 3) -> Tensor:
    return model(input_ids=tokens(1, length, seed), use_cache=False).logits


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Within ``tolerance`` of the largest value; the default is for fp32 sums in another order."""
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def masked_by_hand(sparse: Any, dense: Any, compensate: bool = True) -> Any:
    """A copy of ``dense`` whose MLPs compute by hand what ``sparse`` ought to compute.

    Only the thresholds and the means are taken from ``sparse``.
    """
    model = copy.deepcopy(dense)
    for name, site in sparse.catsparse.thresholds.items():
        mean = site.mean if compensate else None
        mlp = model.get_submodule(name)
        mlp.forward = types.MethodType(_forward_by_hand(site.threshold, mean), mlp)
    return model


def _forward_by_hand(threshold: Tensor, mean: Tensor | None) -> Any:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        if hasattr(mlp, "gate_up_proj"):
            gate, up = mlp.gate_up_proj(x).split(len(mlp.gate_up_proj.weight) // 2, dim=-1)
        else:
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        kind = getattr(getattr(mlp, "config", None), "hidden_activation", "")
        tanh_gelu = kind == "gelu_pytorch_tanh"
        g = F.gelu(gate, approximate="tanh") if tanh_gelu else F.silu(gate)
        kept = (g.abs() > threshold).to(g.dtype)
        filled = torch.zeros_like(g) if mean is None else mean.to(g.dtype).expand_as(g)
        return mlp.down_proj(g * up * kept + filled * (1 - kept))

    return forward


def masked_by_hand_in_place(sparse: Any, dense: Any, length: int) -> Tensor:
    """The logits of :func:`masked_by_hand` for a model that cannot be copied: ``dense`` itself is
    changed, and changed back."""
    modules = {name: dense.get_submodule(name) for name in sparse.catsparse.thresholds}
    try:
        for name, site in sparse.catsparse.thresholds.items():
            forward = _forward_by_hand(site.threshold, site.mean)
            modules[name].forward = types.MethodType(forward, modules[name])
        return logits(dense, length)
    finally:
        for mlp in modules.values():
            del mlp.forward
