"""What vLLM calls: a quantization config, and a linear method each for gate_up_proj and down_proj.

vLLM runs an MLP as linear, activation, linear. The first linear method gives few tokens the whole
sparse MLP, leaves what it returns to the activation unwritten, and hands the result over to the
second. More tokens run all three dense; the second then masks, if the prefill policy says so, by
the exact weights: unpacking a preview for some tens of tokens costs more than the whole step.
Which it is, is decided within opaque ops, so neither torch.compile nor a CUDA graph sees it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..adapters import ADAPTER_CONFIG
from ..config import SparsityConfig
from ..errors import CatsparseError
from ..hub import read_artifact
from ..merged_weights import QUANT_METHOD
from ..methods import SiteThreshold
from ..modules import SparseMLP
from ..strict_json import shorten
from .shards import check_config, find_site, make_shard, sparse_tokens

GATE_UP, DOWN = ".gate_up_proj", ".down_proj"

# The ranks' MLPs of all models of this process; ops find theirs by a key.
SHARDS: dict[str, SparseMLP] = {}
MOST_TOKENS: dict[str, int] = {}  # of a step that the sparse MLP takes
_models = itertools.count()


class Pair:
    """The two linear layers of one MLP, and what the first hands to the second."""

    def __init__(self, name: str, key: str) -> None:
        self.name, self.key = name, key
        self.weights: dict[str, Tensor] = {}
        # The input, its product with W_gate and W_up, and the sparse MLP's result; within one
        # forward pass only.
        self.handed: tuple[Tensor, Tensor, Tensor] | None = None


@register_quantization_config(QUANT_METHOD)
class CatsConfig(QuantizationConfig):  # type: ignore[misc]
    """The thresholds of a catsparse directory.

    Args:
        artifact: the directory or Hub repository; None for the model's own, a merged one.
    """

    def __init__(self, artifact: str | None = None) -> None:
        super().__init__()
        self.artifact = artifact
        self.pairs: dict[str, Pair] = {}
        self.config: SparsityConfig | None = None
        self.thresholds: dict[str, SiteThreshold] = {}
        self.model = -1

    def __getstate__(self) -> dict[str, Any]:
        """Other processes read the directory themselves."""
        fresh = type(self)(self.artifact).__dict__
        return {**self.__dict__, **{name: fresh[name] for name in fresh if name != "artifact"}}

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CatsConfig:
        return cls(config.get("artifact"))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The linear method of ``layer``; None for embeddings and others."""
        if not isinstance(layer, LinearBase):
            return None
        config = self._read()
        for suffix, method in ((GATE_UP, GateUpMethod), (DOWN, DownMethod)):
            if prefix.endswith(suffix):
                name = find_site(prefix.removesuffix(suffix), config.sites)
                if name is not None:
                    key = f"{self.model}.{name}"
                    return method(self, self.pairs.setdefault(name, Pair(name, key)))
        return UnquantizedLinearMethod()

    def _read(self) -> SparsityConfig:
        if self.config is None:
            model = get_current_vllm_config().model_config
            source = self.artifact or model.model
            if (Path(source) / ADAPTER_CONFIG).exists():
                raise CatsparseError(
                    f"{shorten(source)} holds a LoRA adapter beside its thresholds; fold it into "
                    "the weights first, by finetune --merge or catsparse.save(..., merge=True)"
                )
            revision = None if self.artifact else model.revision
            config, self.thresholds, _ = read_artifact(source, revision)
            check_config(config, source)
            self.config, self.model = config, next(_models)
        return self.config

    def complete(self, pair: Pair, layer: Any) -> None:
        """Both layers of an MLP are loaded: make its rank's part sparse."""
        assert self.config is not None
        stages = get_current_vllm_config().parallel_config.pipeline_parallel_size
        missing = [name for name in self.config.sites if name not in self.pairs]
        if missing and stages == 1:
            raise CatsparseError(
                f"vLLM's model has no {shorten(missing[0])}{GATE_UP}, which the catsparse "
                "directory has thresholds for; run it with catsparse generate instead"
            )
        shard = make_shard(
            pair.name,
            self.config,
            self.thresholds[pair.name],
            pair.weights[GATE_UP],
            pair.weights[DOWN],
            layer.tp_rank,
            layer.tp_size,
        )
        shard.prepare_decode()
        SHARDS[pair.key] = shard
        MOST_TOKENS[pair.key] = sparse_tokens(self.config, pair.name, shard)


class _Method(UnquantizedLinearMethod):  # type: ignore[misc]
    """What both have in common: weights as vLLM makes them, and left in place."""

    suffix: str

    def __init__(self, config: CatsConfig, pair: Pair) -> None:
        super().__init__()
        self.config, self.pair = config, pair

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.bias is not None:
            raise CatsparseError(
                f"{self.pair.name}{self.suffix} has a bias, which the sparse MLP has not; run the "
                "model with catsparse generate instead"
            )
        self.pair.weights[self.suffix] = layer.weight.data
        if len(self.pair.weights) == 2:
            self.config.complete(self.pair, layer)


class GateUpMethod(_Method):
    """``[T, H]`` to ``[T, 2 I/R]``, unwritten for few tokens."""

    suffix = GATE_UP

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        gate_up, y = torch.ops.catsparse.vllm_gate_up(x, self.pair.key)
        self.pair.handed = (x, gate_up, y)
        return gate_up  # type: ignore[no-any-return]


class DownMethod(_Method):
    """``[T, I/R]`` to ``[T, H]``, to be added over ranks."""

    suffix = DOWN

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert self.pair.handed is not None
        handed, self.pair.handed = self.pair.handed, None
        return torch.ops.catsparse.vllm_down(x, *handed, self.pair.key)  # type: ignore[no-any-return]


def _few(x: Tensor, key: str) -> bool:
    return x.numel() <= MOST_TOKENS[key] * x.shape[-1]


def _gate_up(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    shard: Any = SHARDS[key]
    if _few(x, key):
        return x.new_empty(_gate_up_shape(x, shard)), shard(x)
    return shard.gate_up_proj(x), torch.empty_like(x)


def _gate_up_fake(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(_gate_up_shape(x, SHARDS[key])), torch.empty_like(x)


def _gate_up_shape(x: Tensor, shard: Any) -> tuple[Any, ...]:
    return (*x.shape[:-1], shard.gate_up_proj.weight.shape[0])


def _down(h: Tensor, x: Tensor, gate_up: Tensor, y: Tensor, key: str) -> Tensor:
    if _few(x, key):
        return y.clone()  # an op's result may not be one of its arguments
    shard: Any = SHARDS[key]
    if not shard.catsparse_enabled or shard.catsparse_prefill == "dense":
        return F.linear(h, shard.down_proj.weight)
    return shard.mask_and_project(x, *gate_up.chunk(2, dim=-1), foretell=False)  # type: ignore[no-any-return]


torch.library.define("catsparse::vllm_gate_up", "(Tensor x, str key) -> (Tensor, Tensor)")
torch.library.impl("catsparse::vllm_gate_up", "default", _gate_up)
torch.library.register_fake("catsparse::vllm_gate_up", _gate_up_fake)
torch.library.define(
    "catsparse::vllm_down", "(Tensor h, Tensor x, Tensor gate_up, Tensor y, str key) -> Tensor"
)
torch.library.impl("catsparse::vllm_down", "default", _down)
torch.library.register_fake(
    "catsparse::vllm_down", lambda h, x, gate_up, y, key: torch.empty_like(x)
)
