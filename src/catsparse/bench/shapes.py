"""Sizes of well-known models, for benchmarks on random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config import ACTIVATIONS
from ..errors import CatsparseError


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; ``layers`` 0 means that only the MLP is known.

    Attributes:
        hidden: H. intermediate: I.
        act: activation of the gate.
        tied: whether lm_head is the embedding.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    vocab: int = 0
    tied: bool = False
    head_dim: int | None = None
    act: str = "silu"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", 576, 1536, 30, 9, 3, 49152, True),
        Shape("smollm2-1.7b", 2048, 8192, 24, 32, 32, 49152, True),
        Shape("qwen3-0.6b", 1024, 3072, 28, 16, 8, 151936, True, 128),
        Shape("qwen3-8b", 4096, 12288, 36, 32, 8, 151936, False, 128),
        Shape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256, True),
        Shape("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256, True),
        Shape("llama-2-7b", 4096, 11008, 32, 32, 32, 32000),
        Shape("llama-3-8b", 4096, 14336, 32, 32, 8, 128256),
        Shape("llama-3-70b", 8192, 28672, 80, 64, 8, 128256),
        Shape("mistral-7b", 4096, 14336, 32, 32, 8, 32768),
        Shape("gemma-7b", 3072, 24576, 28, 16, 16, 256000, True, 256, "gelu_tanh"),
    )
}


def find_shape(name: str) -> Shape:
    """A named shape, or ``H,I`` or ``H,I,ACT`` for an MLP of one's own.

    Raises:
        CatsparseError: neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes, act = name.split(",")[:2], (name.split(",")[2:] or ["silu"])[0]
    if len(sizes) == 2 and all(s.isdigit() and int(s) > 0 for s in sizes) and act in ACTIVATIONS:
        return Shape(name, int(sizes[0]), int(sizes[1]), act=act)
    raise CatsparseError(
        f"there is no shape {name!r}; give H,I as 4096,11008 or one of {', '.join(SHAPES)}"
    )


def random_model(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A Llama of this shape with random weights: as fast as the real one, with nothing to say.

    Raises:
        CatsparseError: the shape is of an MLP only.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if not shape.layers:
        raise CatsparseError(f"{shape.name} is the shape of an MLP; name a model's with --config")
    acts = {"gelu_tanh": "gelu_pytorch_tanh"}
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
        hidden_act=acts.get(shape.act, shape.act),
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return model.eval()
