"""``quant_method: cats``: lets transformers itself restore a merged directory.

transformers has one door for changing a model while it loads, its quantizers. Packed weights are
loaded as they lie in the file; nothing is quantized.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import hub
from .merged_weights import QUANT_METHOD
from .quantized import prepare_to_load
from .surgery import apply_thresholds, sparse_layers


class CatsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a merged directory: a marker; the data is in its own two files."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = QUANT_METHOD


class CatsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes transformers put the thresholds on after it has loaded a merged directory."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Layers to load packed weights into. No thresholds: buffers set now would not survive."""
        revision = getattr(model.config, "_commit_hash", None)
        config = hub.read_artifact(model.config._name_or_path, revision)[0]
        if config.weight_format is not None:
            prepare_to_load(model, config.weight_format)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        source = model.config._name_or_path
        revision = getattr(model.config, "_commit_hash", None)
        artifact = hub.read_artifact(source, revision)
        apply_thresholds(model, *artifact, hub.stored_previews(source, artifact[0], revision))
        model.save_pretrained = types.MethodType(_save_pretrained, model)
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        model = super().postprocess_model(model, **kwargs)
        for module in model.modules():
            # The weights are ordinary: .half() and full fine-tuning must work.
            if "is_quantized" in module.__dict__:
                module.is_quantized = False
        return model

    def forget(self, model: Any) -> None:
        """After densify: the model is an ordinary dense one again."""
        self.remove_quantization_config(model)
        model.__dict__.pop("save_pretrained", None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """A merged model's ``save_pretrained``: the weights and the thresholds with them."""
    if sparse_layers(model):
        hub.save_files(model, Path(save_directory), merge=True, **kwargs)
    else:
        type(model).save_pretrained(model, save_directory, **kwargs)


def register_with_transformers() -> None:
    """Register ``quant_method: cats``; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(CatsConfig)
        register_quantizer(QUANT_METHOD)(CatsQuantizer)
