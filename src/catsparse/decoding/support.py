"""Which models the captured step can run: the reasons why not, as sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from ..modules import SparseMLP
from .cache import why_no_cache
from .step import takes

# The overrides of prepare_inputs_for_generation that change nothing without a long rope.
_HARMLESS_OVERRIDES = {"phi3"}
_ROPES_BY_LENGTH = {"dynamic", "longrope"}
_ATTENTIONS = {"eager", "sdpa"}


def why_no_model(model: Any) -> str | None:
    """Why ``model`` cannot be decoded by a captured step; None if it can."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        return f"{type(model).__name__} is no transformers model that generates"
    return _why_no_class(model) or _why_no_config(model.config) or _why_no_modules(model)


def _why_no_class(model: Any) -> str | None:
    kind = type(model)
    name = kind.__name__
    own = ("generate", "_sample", "_prefill", "create_masks_for_generate")
    if any(getattr(kind, one, None) is not getattr(GenerationMixin, one, None) for one in own):
        return f"{name} generates in its own way"
    if "generate" in vars(model) or "forward" in vars(model):
        return f"this {name} has been patched"
    inputs = kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    if not inputs and model.config.model_type not in _HARMLESS_OVERRIDES:
        return f"{name} prepares its inputs in its own way"
    if model.config.is_encoder_decoder:
        return f"{name} has an encoder"
    if model._is_stateful or not model._can_compile_fullgraph:
        return f"{name} cannot run on a static cache"
    if model.main_input_name != "input_ids" or not takes(
        model, "input_ids", "attention_mask", "position_ids", "past_key_values"
    ):
        return f"the forward of {name} takes other arguments"
    if getattr(model, "_compiled_call_impl", None) is not None:
        return "the model is compiled"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return f"{type(quantizer).__name__} does not allow it"
    return None


def _why_no_config(config: Any) -> str | None:
    text = config.get_text_config(decoder=True)
    if text is not config:
        return "the model takes more than text"
    if config._attn_implementation not in _ATTENTIONS:
        return f"attention is {config._attn_implementation}"
    ropes = set(_rope_types(getattr(config, "rope_parameters", None))) & _ROPES_BY_LENGTH
    if ropes:
        return f"its rotary embedding is {min(ropes)}: it depends on the length"
    return why_no_cache(config)


def _rope_types(parameters: Any) -> Iterator[str]:
    """Of the whole model, or of each of its kinds of layers."""
    if isinstance(parameters, dict):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def _why_no_modules(model: nn.Module) -> str | None:
    devices = set()
    for name, module in model.named_modules():
        where = name or "the model"
        if module.training:
            return f"{where} is in training mode"
        if "_hf_hook" in module.__dict__ or _hooks(module):
            return f"{where} has a hook"
        if isinstance(module, SparseMLP) and module.catsparse_counter is not None:
            return f"a meter counts at {where}"
        for parameter in module._parameters.values():
            if parameter is not None:
                devices.add(parameter.device)
                if type(parameter.data).__name__ == "DTensor":
                    return "the model is spread over processes"
    if len(devices) != 1:
        return "the model is not on one device"
    kind = devices.pop().type
    if kind == "meta":
        return "the weights are offloaded"
    return "autocast is on" if torch.is_autocast_enabled(kind) else None


def _hooks(module: nn.Module) -> bool:
    # transformers leaves hooks behind that do nothing until a call asks for hidden states.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any("output_capturing" not in getattr(hook, "__module__", "") for hook in hooks)
