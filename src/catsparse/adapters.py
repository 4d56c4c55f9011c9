"""PEFT adapters on a sparse model: written beside its artifact, put back on it, folded in.

The files are PEFT's own (``adapter_config.json``, ``adapter_model.safetensors``); a pickled adapter
is never opened. PEFT is imported only where a model has an adapter or is given one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CatsparseError
from .quantized_linear import QuantizedLinear
from .strict_json import first_sentence

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# As a PEFT model wraps a model, its parameters' names begin with this.
_PREFIX = "base_model.model."


def has_adapters(model: Any) -> bool:
    """Whether PEFT layers stand in for some of the model's own."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def shares_weight(model: Any, name: str) -> str | None:
    """Another module of ``model`` with the very weight of the one called ``name``; None if there is
    none. An output head may have the embedding's."""
    weight = getattr(model.get_submodule(name), "weight", None)
    others = (
        other
        for other, module in model.named_modules()
        if other != name and weight is not None and module._parameters.get("weight") is weight
    )
    return next(others, None)


def write_adapter(model: Any, folder: Path, base: str) -> None:
    """Write the one adapter of ``model`` as PEFT's ``save_pretrained`` does.

    Args:
        model: a transformers model with PEFT layers in it, not the wrapper around.
        folder: must exist.
        base: name or path of the base model, for PEFT.

    Raises:
        CatsparseError: there are several adapters, or they are merged already.
    """
    import peft

    names = list(getattr(model, "peft_config", {}))
    if len(names) != 1:
        raise CatsparseError(
            f"the model holds {len(names)} PEFT adapters, and only one can be saved; merge or "
            "delete the others"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise CatsparseError(
            "the adapter is merged into the weights; call unmerge_adapter() or merge_and_unload() "
            "before saving"
        )
    state = peft.get_peft_model_state_dict(model, adapter_name=names[0])
    tensors = {
        _PREFIX + name.removeprefix(_PREFIX): value.detach().cpu().contiguous()
        for name, value in state.items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = model.peft_config[names[0]]
    before = config.base_model_name_or_path, config.inference_mode
    try:
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path, config.inference_mode = before


def attach_adapter(model: Any, config_path: Path, weights_path: Path) -> None:
    """Put an adapter on ``model`` in place, frozen; the modules' names stay.

    Raises:
        CatsparseError: PEFT is not installed, a file is damaged, or the adapter does not fit.
    """
    try:
        import peft
    except ImportError as error:
        raise CatsparseError(
            "the folder holds a PEFT adapter; pip install 'catsparse[finetune]' to load it"
        ) from error
    try:
        config = peft.PeftConfig.from_pretrained(str(config_path.parent))
        state = load_file(weights_path)
        dtypes = {value.dtype for value in state.values()}
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_" in name and len(dtypes) == 1:
                parameter.data = parameter.data.to(next(iter(dtypes)))  # not rounded to the base's
        found = peft.set_peft_model_state_dict(
            model, {name.removeprefix(_PREFIX): value for name, value in state.items()}
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CatsparseError(
            f"the adapter in {config_path.parent} cannot be loaded ({first_sentence(error)}); "
            "save it again"
        ) from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        wrong = [*missing, *found.unexpected_keys][0]
        raise CatsparseError(
            f"the adapter in {config_path.parent} does not fit the model ({wrong[:80]}); take the "
            "model it was trained on"
        )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    model.eval()


@torch.no_grad()
def fold_adapters(model: Any) -> Any:
    """Merge the adapters of ``model`` into its weights in place and return it, so that kernels can
    read them. (A PEFT wrapper has ``merge_and_unload`` for that.)

    Raises:
        CatsparseError: one cannot be merged, or only together with another layer's weight.
    """
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    for name, layer in layers.items():
        if (other := shares_weight(model, f"{name}.base_layer")) is not None:
            raise CatsparseError(
                f"{name} shares its weight with {other}, which merging its adapter would change "
                "too; load the model without merge_adapter"
            )
        if isinstance(layer.get_base_layer(), QuantizedLinear):
            raise CatsparseError(
                f"the adapter of {name} cannot be merged into packed weights; load the model "
                "without merge_adapter"
            )
        try:
            layer.merge()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise CatsparseError(
                f"the adapter of {name} cannot be merged ({first_sentence(error)}); load the model "
                "without merge_adapter"
            ) from error
        parent, _, child = name.rpartition(".")
        # Through setattr: a sparse MLP must hear of it.
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if layers:
        vars(model).pop("peft_config", None)
        model._hf_peft_config_loaded = False
    return model
