"""save / load / merge: the only reader of transformers' loading API.

An artifact is a small directory: ``catsparse.json`` and ``calibration.safetensors`` beside a base
model named in it; a merged one also holds the weights and loads through transformers itself.
Only safetensors are read, never pickles, and no downloaded code is run.
"""

from __future__ import annotations

import os
import tempfile
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, device, float32
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from .calibration import Calibration
from .config import CALIBRATION_NAME, CONFIG_NAME, SparsityConfig, write_atomic
from .errors import CatsparseError
from .methods import SiteThreshold
from .modules import sparse_modules
from .surgery import apply_thresholds, state_of

DEFAULT_MODEL = "default"
_BUNDLED = Path(__file__).parent / "models" / "default"
_QUANT_METHOD = "cats"


def save(model: Any, directory: str | Path, merge: bool = False) -> None:
    """Write the sparse model's artifact.

    Args:
        model: a model made sparse by :func:`catsparse.sparsify` or :func:`load`.
        directory: created if need be; each file appears whole or not at all.
        merge: also write the weights, so that after ``import catsparse``
            ``AutoModelForCausalLM.from_pretrained(directory)`` restores the sparse model.

    Raises:
        CatsparseError: the model is dense, holds unmerged adapters, or has no base to refer to.
    """
    state = state_of(model)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise CatsparseError(
            "the model holds PEFT adapters that are not merged; call model.merge_and_unload() first"
        )
    target = Path(directory)
    config = replace(state.config, base_model=_portable_base(state.config, merge))
    if target.exists() and not target.is_dir():
        raise CatsparseError(f"{target} is a file; name a folder")
    target.mkdir(parents=True, exist_ok=True)
    if merge:
        _save_weights(model, target)
    tensors = {} if state.calibration is None else state.calibration.tensors()
    metadata = {} if state.calibration is None else state.calibration.metadata()
    for name, t in state.thresholds.items():
        tensors[f"{name}.threshold"] = t.threshold.contiguous()
        if t.mean is not None:
            tensors[f"{name}.mean"] = t.mean.contiguous()
    write_atomic(target / CALIBRATION_NAME, lambda path: save_file(tensors, path, metadata))
    card = _card(config, merge)
    write_atomic(target / "README.md", lambda path: _write(path, card))
    # Last: a directory with this file in it is complete.
    write_atomic(target / CONFIG_NAME, lambda path: _write(path, config.to_json()))


def load(
    directory: str | Path, base_model: str | None = None, **from_pretrained_kwargs: Any
) -> Any:
    """Load a sparse model from an artifact directory or a Hub repository of that form.

    Args:
        directory: written by :func:`save`, merged or not.
        base_model: take the weights from here instead of the recorded base model.
        **from_pretrained_kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        CatsparseError: the artifact or its base model cannot be read, or they do not fit.
    """
    config, thresholds, calibration = read_artifact(str(directory))
    merged = _find(str(directory), "config.json") is not None
    if merged and base_model is None:
        return load_dense_model(str(directory), **from_pretrained_kwargs)
    if base_model is None:
        if config.base_model is None or not config.base_model.name_or_path:
            raise CatsparseError(f"{directory} names no base model; give base_model=...")
        base_model = config.base_model.name_or_path
        if config.base_model.revision is not None:
            from_pretrained_kwargs.setdefault("revision", config.base_model.revision)
    model = load_dense_model(base_model, **from_pretrained_kwargs)
    expected = config.base_model.model_type if config.base_model else model.config.model_type
    if model.config.model_type != expected:
        raise CatsparseError(
            f"{directory} belongs to a {expected} model, {base_model} is a "
            f"{model.config.model_type}; give the right one with base_model=..."
        )
    return apply_thresholds(model, config, thresholds, calibration)


def load_dense_model(name: str, **from_pretrained_kwargs: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` in evaluation mode; ``default`` is the bundled one.

    Raises:
        CatsparseError: there is no such model, or not in safetensors.
    """
    from_pretrained_kwargs.setdefault("use_safetensors", True)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name), **from_pretrained_kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, CatsparseError):
            raise
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"cannot load the model {name}: {reason}") from error
    return model.eval()


def load_skeleton(name: str) -> Any:
    """The model's modules without its weights (on the meta device).

    Raises:
        CatsparseError: there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(model_path(name))
        with device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"cannot read the model {name}: {reason}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, or of the model that an artifact directory refers to."""
    if (Path(name) / CONFIG_NAME).is_file() and not (Path(name) / "tokenizer_config.json").exists():
        base = SparsityConfig.from_file(Path(name) / CONFIG_NAME).base_model
        name = base.name_or_path if base else name
    try:
        return AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"cannot load the tokenizer of {name}: {reason}") from error


def model_path(name: str) -> str:
    """Where transformers finds ``name``: the bundled model's folder for ``default``."""
    return str(_BUNDLED) if name == DEFAULT_MODEL else name


def bundled_text(which: str) -> Path:
    """The text files that come with the default model: ``calibration`` or ``heldout``."""
    return _BUNDLED / f"{which}.txt"


def is_artifact(name: str) -> bool:
    """Whether ``name`` is a local directory holding ``catsparse.json``."""
    return (Path(name) / CONFIG_NAME).is_file()


def read_artifact(
    directory: str, revision: str | None = None
) -> tuple[SparsityConfig, dict[str, SiteThreshold], Calibration | None]:
    """Read and check the artifact's two files; nothing of a model is loaded.

    Raises:
        CatsparseError: a file is missing, damaged, or does not fit the other.
    """
    config_path = _find(directory, CONFIG_NAME, revision)
    if config_path is None:
        raise CatsparseError(f"{directory} holds no {CONFIG_NAME}; is it a catsparse directory?")
    tensor_path = _find(directory, CALIBRATION_NAME, revision)
    if tensor_path is None:
        raise CatsparseError(f"{directory} holds no {CALIBRATION_NAME}; save it again")
    config = SparsityConfig.from_file(config_path)
    try:
        with safe_open(tensor_path, framework="pt") as file:
            names = set(file.keys())
            thresholds = {
                name: _read_threshold(config, name, names, file.get_tensor) for name in config.sites
            }
            has_statistics = "catsparse.sites" in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CatsparseError(f"{tensor_path} is damaged ({error}); save it again") from error
    return config, thresholds, Calibration.load(tensor_path) if has_statistics else None


def _read_threshold(
    config: SparsityConfig, name: str, names: set[str], get: Callable[[str], Tensor]
) -> SiteThreshold:
    site = config.sites[name]
    neurons = site.intermediate_size
    threshold = _read_vector(f"{name}.threshold", names, get, [(), (neurons,)])
    mean = _read_vector(f"{name}.mean", names, get, [(neurons,)]) if config.compensate else None
    if threshold.dim() == 0 and float(threshold) != site.threshold:
        raise CatsparseError(
            f"the threshold of {name} is {site.threshold} in {CONFIG_NAME} but {float(threshold)} "
            f"in {CALIBRATION_NAME}; save it again"
        )
    return SiteThreshold(threshold, mean, site.threshold, site.sparsity)


def _read_vector(
    key: str, names: set[str], get: Callable[[str], Tensor], shapes: list[tuple[int, ...]]
) -> Tensor:
    if key not in names:
        raise CatsparseError(f"{CALIBRATION_NAME} lacks {key[:120]}; save it again")
    value = get(key)
    if value.dtype != float32 or tuple(value.shape) not in shapes:
        raise CatsparseError(
            f"{key} in {CALIBRATION_NAME} is {value.dtype} {list(value.shape)}, not float32 of the "
            "site's size; save it again"
        )
    if not bool(value.isfinite().all()):
        raise CatsparseError(f"{key} in {CALIBRATION_NAME} is not finite; save it again")
    return value


def _find(directory: str, name: str, revision: str | None = None) -> Path | None:
    """The local path of an artifact's file, fetched from the Hub if ``directory`` is a repo id."""
    if Path(directory).is_dir():
        path = Path(directory) / name
        return path if path.is_file() else None
    if Path(directory).exists():
        raise CatsparseError(f"{directory} is a file; name the artifact's folder")
    try:
        found = cached_file(
            directory, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
    except (OSError, ValueError) as error:
        raise CatsparseError(f"there is no folder or Hub repository {directory}") from error
    return None if found is None else Path(found)


def _portable_base(config: SparsityConfig, merge: bool) -> Any:
    base = config.base_model
    name = base.name_or_path if base else ""
    if not name and not merge:
        raise CatsparseError(
            "the model was not loaded from a name or path, so an adapter directory cannot refer to "
            "it; save it with merge=True"
        )
    if base is None:
        return None
    if name == str(_BUNDLED):
        return replace(base, name_or_path=DEFAULT_MODEL)
    # A relative path would depend on where the program is started.
    return replace(base, name_or_path=str(Path(name).resolve())) if Path(name).is_dir() else base


def _save_weights(model: Any, target: Path) -> None:
    """save_pretrained into a folder beside the files, then move each of them into place."""
    had_config = getattr(model.config, "quantization_config", None)
    if had_config is not None and not isinstance(had_config, CatsConfig):
        raise CatsparseError(
            "the model's weights are quantized, so they cannot be merged; save without merge"
        )
    with tempfile.TemporaryDirectory(dir=target, prefix=".merge-") as temporary:
        try:
            model.config.quantization_config = CatsConfig()
            type(model).save_pretrained(model, temporary)
        finally:
            if had_config is None:
                del model.config.quantization_config
            else:
                model.config.quantization_config = had_config
        # config.json last: until it is there, the folder is not a model.
        for path in sorted(Path(temporary).iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, target / path.name)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _card(config: SparsityConfig, merge: bool) -> str:
    base = config.base_model.name_or_path if config.base_model else "a model of yours"
    code = "import catsparse\n\n"
    if merge:
        code += (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        )
    else:
        code += 'model = catsparse.load("path/to/this/folder")\n'
    note = (
        "\nWithout `import catsparse`, transformers warns of an unknown quantization type and "
        "loads the dense model.\n"
        if merge
        else ""
    )
    return (
        f"# {base}, {config.sparsity:.0%} activation-sparse\n\n"
        f"Made with [catsparse](https://pypi.org/project/catsparse/) {config.catsparse_version}: "
        f"method {config.method}{', compensated' if config.compensate else ''}, "
        f"{config.bytes_skipped:.1%} of the MLP's weight bytes skipped in decode.\n\n"
        f"```python\n{code}```\n{note}"
    )


class CatsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a merged directory: a marker; the data is in its own two files."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = _QUANT_METHOD


class CatsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes transformers put the thresholds on after it has loaded a merged directory."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Nothing: buffers set before the weights are loaded would not survive it."""

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        source = model.config._name_or_path
        artifact = read_artifact(source, getattr(model.config, "_commit_hash", None))
        apply_thresholds(model, *artifact)
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
    if sparse_modules(model):
        save(model, Path(save_directory), merge=True)
    else:
        type(model).save_pretrained(model, save_directory, **kwargs)


def register_with_transformers() -> None:
    """Register ``quant_method: cats``; safe to call again."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if _QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_QUANT_METHOD)(CatsConfig)
        register_quantizer(_QUANT_METHOD)(CatsQuantizer)
