"""What vLLM calls: a quantization config, and a linear method each for gate_up_proj and down_proj.

vLLM runs an MLP as linear, activation, linear. The first linear method gives few tokens the whole
sparse MLP, leaves what it returns to the activation unwritten, and hands the result over to the
second. More tokens run all three dense; the second then masks, if the prefill policy says so, by
the exact weights: unpacking a preview for some tens of tokens costs more than the whole step.

Where vLLM may add LoRA adapters' products to the linears' own, all three run dense for any number
of tokens, and the second masks what the activation made of the sum, by the exact products.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import vllm.envs as envs
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from ..adapters import ADAPTER_CONFIG
from ..config import SparsityConfig
from ..errors import CatsparseError
from ..hub import read_artifact
from ..merged_weights import QUANT_METHOD
from ..methods import SiteThreshold
from ..modules import SparseMLP
from ..strict_json import shorten
from .ops import LoadedMLP
from .shards import check_config, find_site, make_shard, mask_alone, sparse_tokens

GATE_UP, DOWN = ".gate_up_proj", ".down_proj"
SETTINGS = '{"quantization_config": {"quant_method": "cats", "artifact": "DIR"}}'
logger = init_logger("vllm.plugins.catsparse")  # of vLLM's, so that it is shown


class Pair:
    """The two linear layers of one MLP, and what the first hands to the second.

    Args:
        site: the MLP's name in the catsparse directory.
        prefix: its name in vLLM.
        adapters: whether vLLM may add LoRA products to either layer's.
    """

    def __init__(self, site: str, prefix: str, adapters: bool) -> None:
        self.site, self.prefix, self.adapters = site, prefix, adapters
        self.name = f"{prefix}.catsparse"  # in vLLM's forward context
        self.layers: dict[str, weakref.ref[Any]] = {}
        self.weights: dict[str, Tensor] = {}
        self.shard: SparseMLP | None = None
        self.handed: tuple[Tensor, ...] = ()  # within one forward pass only

    def is_served(self) -> bool:
        """Whether vLLM has both layers, and runs them by our methods."""
        layers = [ref() for ref in self.layers.values()]
        methods = [getattr(layer, "quant_method", None) for layer in layers]
        return len(methods) == 2 and all(getattr(m, "pair", None) is self for m in methods)


@register_quantization_config(QUANT_METHOD)
class CatsConfig(QuantizationConfig):  # type: ignore[misc]
    """The thresholds of a catsparse directory.

    Args:
        artifact: the directory or Hub repository; None for the model's own, a merged one.
    """

    def __init__(self, artifact: str | None = None) -> None:
        super().__init__()
        self.artifact = artifact
        self.model: tuple[str, str | None] | None = None  # and its revision
        self._clear()

    def _clear(self) -> None:
        self.pairs: dict[str, Pair] = {}
        self.config: SparsityConfig | None = None
        self.source = ""
        self.thresholds: dict[str, SiteThreshold] = {}
        self.expected: list[str] = []  # sites of this pipeline stage
        self.mlps: set[str] = set()  # of vLLM's model, sparse or not
        self.checked = False
        self.context: dict[str, Any] = {}  # vLLM's, where the ops look

    def __getstate__(self) -> dict[str, Any]:
        """Other processes read the directory themselves."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._clear()
        return copy.__dict__

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
        unknown = set(config) - {"quant_method", "artifact"}
        if unknown:
            raise CatsparseError(
                f"quantization_config holds {shorten(min(unknown))}, which catsparse does not "
                f"know; over a base model it is {SETTINGS}"
            )
        return cls(config.get("artifact"))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM says which model this is the config of: a draft model has one of its own."""
        self.model = model_name, revision

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The linear method of ``layer``; None for layers that are neither that nor embeddings."""
        if isinstance(layer, VocabParallelEmbedding):
            self._read()
            return _Embedding(self)
        if not isinstance(layer, LinearBase):
            return None
        config = self._read()
        for suffix, method in ((GATE_UP, GateUpMethod), (DOWN, DownMethod)):
            if prefix.endswith(suffix):
                mlp = prefix.removesuffix(suffix)
                self.mlps.update([mlp] if suffix == GATE_UP else [])
                site = find_site(mlp, config.sites)
                if site is not None:
                    pair = self._pair(site, mlp)
                    pair.layers[suffix] = weakref.ref(layer)
                    return method(self, pair)
        return _Plain(self)

    def _pair(self, site: str, prefix: str) -> Pair:
        pair = self.pairs.get(site)
        if pair is None:
            pair = self.pairs[site] = Pair(site, prefix, self._takes_adapters(prefix))
        if pair.prefix != prefix:
            raise CatsparseError(
                f"both {shorten(pair.prefix)} and {shorten(prefix)} of vLLM's model could be "
                f"{shorten(site)} of the catsparse directory; run it with catsparse generate "
                "instead"
            )
        return pair

    def _takes_adapters(self, prefix: str) -> bool:
        """Whether vLLM wraps either layer, which it does ahead of any adapter."""
        lora = get_current_vllm_config().lora_config
        if lora is None:
            return False
        from vllm.lora.utils import is_in_target_modules  # it imports all of vLLM's layers

        # A target may be a full name, which other models may know under another prefix.
        targets = lora.target_modules and [name.rpartition(".")[2] for name in lora.target_modules]
        packed = {**(self.packed_modules_mapping or {}), "gate_up_proj": ["gate_proj", "up_proj"]}
        if not any(
            is_in_target_modules(prefix + part, targets, packed) for part in (GATE_UP, DOWN)
        ):
            return False
        # What the activation is given, and what down_proj's adapter multiplies, is found and
        # changed in place.
        if getattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", False):
            raise CatsparseError(
                "LoRA adapters of sparse MLPs cannot run on a stream of their own; unset "
                "VLLM_LORA_ENABLE_DUAL_STREAM, or keep adapters off the MLPs by "
                "--lora-target-modules"
            )
        if not current_platform.can_update_inplace():
            raise CatsparseError(
                "this platform cannot run LoRA adapters of sparse MLPs; keep adapters off the "
                "MLPs by --lora-target-modules"
            )
        return True

    def _read(self) -> SparsityConfig:
        if self.config is None:
            now = get_current_vllm_config()
            model, revision = self.model or (now.model_config.model, None)
            source = self.artifact or model
            if (Path(source) / ADAPTER_CONFIG).exists():
                raise CatsparseError(
                    f"{shorten(source)} holds a LoRA adapter beside its thresholds; fold it into "
                    "the weights first, by finetune --merge or catsparse.save(..., merge=True)"
                )
            if getattr(self, "online_quantization_config", None) is not None:
                raise CatsparseError(
                    "vLLM cannot quantize the weights of a sparse model while it loads them; "
                    "give no other quantization beside cats"
                )
            if self.artifact is None and revision is None and model == now.model_config.model:
                revision = now.model_config.revision
            config = self._read_from(source, None if self.artifact else revision)
            check_config(config, source)
            self._check_model(config, source, now.model_config)
            self.config, self.source = config, shorten(source)
            self.context = now.compilation_config.static_forward_context
            self.expected = [name for name in config.sites if _on_this_stage(name, now)]
            # Which layers are sparse is part of what vLLM compiles, and so of what it keeps
            # compiled graphs by: the directory may be another one by the next start.
            if isinstance(now.additional_config, dict):
                sites = repr(sorted(config.sites)).encode()
                now.additional_config[f"catsparse {source}"] = hashlib.sha256(sites).hexdigest()
        return self.config

    def _read_from(self, source: str, revision: str | None) -> SparsityConfig:
        try:
            config, self.thresholds, _ = read_artifact(source, revision)
        except CatsparseError as error:
            if self.artifact is not None:
                raise
            raise CatsparseError(
                f"{error}; over a base model, name the directory by --hf-overrides '{SETTINGS}'"
            ) from error
        return config

    def _check_model(self, config: SparsityConfig, source: str, model: Any) -> None:
        base, found = config.base_model, [model.hf_config, model.hf_text_config]
        kinds = [getattr(part, "model_type", "") for part in found]
        if self.artifact is not None and base is not None and base.model_type not in kinds:
            raise CatsparseError(
                f"{shorten(source)} belongs to a {base.model_type} model, and {model.model} is of "
                f"type {kinds[0]}; serve the model that it was made of"
            )

    def check(self) -> None:
        """Once the whole model is built: every MLP that should be sparse will be."""
        if self.checked:
            return
        for name in self.expected:
            pair = self.pairs.get(name)
            if pair is None or not pair.is_served():
                raise CatsparseError(
                    f"vLLM's model has no {shorten(name)} of a {GATE_UP[1:]} and a {DOWN[1:]}, "
                    "which the catsparse directory has thresholds for; run it with catsparse "
                    "generate instead"
                )
        self.checked = True

    def complete(self, pair: Pair, layer: Any) -> None:
        """Both layers of an MLP are loaded: make its rank's part sparse."""
        assert self.config is not None
        shard = make_shard(
            pair.site,
            self.config,
            self.thresholds[pair.site],
            pair.weights[GATE_UP],
            pair.weights[DOWN],
            layer.tp_rank,
            layer.tp_size,
        )
        most_tokens = sparse_tokens(self.config, pair.site, shard)
        if pair.adapters:
            mask_alone(shard)
        else:
            shard.prepare_decode()
        first = pair.shard is None  # weights may be loaded again
        pair.shard = shard
        self.context[pair.name] = LoadedMLP(shard, most_tokens)
        done = [p for p in self.pairs.values() if p.shard is not None]
        if first and len(done) == len(self.pairs) and layer.tp_rank == 0:
            counts = len(done), len(self.mlps)
            logger.info("catsparse: %d of %d MLPs run sparse, by %s", *counts, self.source)
            if any(p.adapters for p in done):
                logger.info(
                    "catsparse: as LoRA adapters may reach them, the MLPs are masked, but all "
                    "their weights are read; --lora-target-modules can keep adapters off them"
                )


def shards_of(model: torch.nn.Module) -> dict[str, SparseMLP]:
    """The sparse MLPs of a model of vLLM's, by its names: what ``LLM.apply_model`` can ask for."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    pairs = [method.pair for method in methods if isinstance(method, DownMethod)]
    return {pair.prefix: pair.shard for pair in pairs if pair.shard is not None}


def _on_this_stage(site: str, now: Any) -> bool:
    """Whether this process is the one to have the MLP: the last one for layers beyond the model."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    if now.parallel_config.pipeline_parallel_size == 1 or number is None:
        return True
    model = now.model_config
    start, end = model.get_layers_start_end_indices(now.parallel_config)
    layer, layers = int(number[1]), model.get_total_num_hidden_layers()
    return bool(start <= min(layer, layers - 1) < end)


class _Plain(UnquantizedLinearMethod):  # type: ignore[misc]
    """Of a linear layer that stays dense."""

    def __init__(self, config: CatsConfig) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check()
        super().process_weights_after_loading(layer)


class _Embedding(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """It only checks: a model may have no linear layer of ours."""

    def __init__(self, config: CatsConfig) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check()
        super().process_weights_after_loading(layer)


class _Method(UnquantizedLinearMethod):  # type: ignore[misc]
    """What both have in common: weights as vLLM makes them, and left in place."""

    suffix: str

    def __init__(self, config: CatsConfig, pair: Pair) -> None:
        super().__init__()
        self.config, self.pair = config, pair

    def process_weights_after_loading(self, layer: Any) -> None:
        self.config.check()
        if layer.bias is not None:
            raise CatsparseError(
                f"{self.pair.site}{self.suffix} has a bias, which the sparse MLP has not; run the "
                "model with catsparse generate instead"
            )
        self.pair.weights[self.suffix] = layer.weight.data
        if len(self.pair.weights) == 2:
            self.config.complete(self.pair, layer)


class GateUpMethod(_Method):
    """``[T, H]`` to ``[T, 2 I/R]``, unwritten for few tokens."""

    suffix = GATE_UP

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        pair = self.pair
        if pair.adapters:
            gate_up = F.linear(x, layer.weight)
            pair.handed = (gate_up,)  # vLLM adds to it in place
            return gate_up
        gate_up, y = torch.ops.catsparse.vllm_gate_up(x, layer.weight.shape[0], pair.name)
        pair.handed = (x, gate_up, y)
        return gate_up  # type: ignore[no-any-return]


class DownMethod(_Method):
    """``[T, I/R]`` to ``[T, H]``, to be added over ranks."""

    suffix = DOWN

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        pair = self.pair
        handed, pair.handed = pair.handed, ()
        if pair.adapters:
            # In place, as vLLM multiplies the same x by the adapter's weights.
            torch.ops.catsparse.vllm_mask(x, *handed, pair.name)
            return F.linear(x, layer.weight)
        return torch.ops.catsparse.vllm_down(x, *handed, pair.name)  # type: ignore[no-any-return]
