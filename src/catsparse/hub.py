"""save / load / merge: the only reader of transformers' loading API.

An artifact is a small directory: ``catsparse.json`` and ``calibration.safetensors`` beside a base
model named in it; a merged one also holds the weights and loads through transformers itself.
Only safetensors are read, never pickles, and no downloaded code is run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from .adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    attach_adapter,
    fold_adapters,
    has_adapters,
    write_adapter,
)
from .calibration import Calibration
from .card import model_card
from .config import CALIBRATION_NAME, CONFIG_NAME, GPTQ, PRODUCT, SiteConfig, SparsityConfig
from .errors import CatsparseError
from .files import check_target, move_files
from .merged_weights import write_weights
from .methods import SiteThreshold
from .modules import sparse_modules
from .previews_file import PREVIEWS_NAME, StoredPreviews, write_previews
from .quantized import quantize_again
from .quantized_linear import weights_of_model
from .strict_json import first_sentence, shorten
from .surgery import apply_thresholds, densify, sparse_layers, state_of, state_owner
from .thresholds_file import read_threshold
from .weights import is_spread

DEFAULT_MODEL = "default"
_BUNDLED = Path(__file__).parent / "models" / "default"


def save(
    model: Any, directory: str | Path, merge: bool = False, store_preview: bool = False
) -> None:
    """Write the sparse model's artifact.

    A PEFT adapter on the model is written beside, as PEFT writes it. Of a model spread over
    processes every rank must call it; the first one writes.

    Args:
        model: a model made sparse by :func:`catsparse.sparsify` or :func:`load`, or a PEFT model
            around one.
        directory: created if need be; each file appears whole or not at all.
        merge: also write the weights, so that after ``import catsparse``
            ``AutoModelForCausalLM.from_pretrained(directory)`` restores the sparse model.
        store_preview: with ``merge``, also write the preview, so that a load on a CPU need not make
            it.

    Raises:
        CatsparseError: the model is dense, has no base to refer to, or holds adapters that with
            ``merge`` would have to be merged before, or of which there are several; there is no
            preview to store, or no merged directory for it; adapters or previews are those of a
            model spread over processes.
    """
    if store_preview and not merge:
        raise CatsparseError("a preview is stored beside the weights only; save with merge=True")
    if store_preview and state_of(model).config.preview is None:
        raise CatsparseError("the model has no preview to store; save it without store_preview")
    save_files(model, Path(directory), merge, store_preview)


def save_files(
    model: Any,
    target: Path,
    merge: bool,
    store_preview: bool = False,
    **save_pretrained_kwargs: Any,
) -> None:
    """:func:`save`; the keywords go to ``save_pretrained`` (a shard size, say)."""
    state, model = state_of(model), state_owner(model)
    adapted = has_adapters(model)
    spread = any(is_spread(parameter) for parameter in model.parameters())
    if spread and (adapted or store_preview):
        what = "adapters" if adapted else "previews"
        raise CatsparseError(
            f"the {what} of a model spread over processes cannot be written; load it in one to save"
        )
    if merge and adapted:
        raise CatsparseError(
            "the model holds PEFT adapters that are not merged; call model.merge_and_unload() first"
        )
    if not merge and (state.config.weight_format or "").startswith(GPTQ):
        raise CatsparseError("weights rounded with data are kept as they are; save with merge=True")
    config = replace(state.config, base_model=_portable_base(state.config, merge))
    check_target(target, merge)
    tensors = {} if state.calibration is None else state.calibration.tensors()
    metadata = {} if state.calibration is None else state.calibration.metadata()
    metadata["catsparse.digest"] = _digest(config)
    for name, t in state.thresholds.items():
        tensors[f"{name}.threshold"] = t.threshold.contiguous()
        if t.mean is not None:
            tensors[f"{name}.mean"] = t.mean.contiguous()
        if t.product is not None:
            tensors[f"{name}.product_threshold"] = t.product.contiguous()
    target.mkdir(parents=True, exist_ok=True)
    try:
        # Everything is written beside the old files before the first of them is replaced.
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as name:
            staging = Path(name)
            if merge:
                write_weights(model, staging, **save_pretrained_kwargs)
            if spread and torch.distributed.get_rank():
                return  # its files are those of the first rank
            if store_preview:
                write_previews(sparse_modules(model), staging / PREVIEWS_NAME)
            if adapted:
                assert config.base_model is not None  # else it would have to be merged
                write_adapter(model, staging, config.base_model.name_or_path)
            save_file(tensors, staging / CALIBRATION_NAME, metadata)
            card = model_card(config, merge, adapted)
            (staging / "README.md").write_text(card, encoding="utf-8")
            (staging / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
            _replace(staging, target, merge)
    finally:
        if spread:
            torch.distributed.barrier()  # whoever reads the files next finds them


def _replace(staging: Path, target: Path, merge: bool) -> None:
    """Move the files of ``staging`` to ``target``, and remove there what they make stale."""
    old = [target / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREVIEWS_NAME)]
    old += target.glob("model*.safetensors*") if merge else []
    # The tensors first: until catsparse.json follows, its digest says that they do not fit it.
    move_files(staging, target, CALIBRATION_NAME, ("config.json", CONFIG_NAME), old)


def load(
    directory: str | Path,
    base_model: str | None = None,
    merge_adapter: bool = False,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load a sparse model from an artifact directory or a Hub repository of that form.

    Args:
        directory: written by :func:`save`, merged or not.
        base_model: take the weights from here instead of the recorded base model.
        merge_adapter: fold the PEFT adapter that a fine-tuned model's directory holds into the
            weights, so that kernels can read them; else its layers stay, frozen.
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
    if sparse_layers(model):  # the given base was itself a merged directory
        densify(model)
    if config.weight_format is not None and weights_of_model(model) is None:
        quantize_again(model, config.weight_format)
    apply_thresholds(model, config, thresholds, calibration)
    if (adapter := _find(str(directory), ADAPTER_CONFIG)) is not None:
        weights = _find(str(directory), ADAPTER_WEIGHTS)
        if weights is None:
            raise CatsparseError(f"{directory} holds no {ADAPTER_WEIGHTS}; save it again")
        attach_adapter(model, adapter, weights)
        if merge_adapter:
            fold_adapters(model)
            _forget_base(model)
    return model


def _forget_base(model: Any) -> None:
    """The weights are no longer those of the base that an artifact could refer to."""
    state = state_of(model)
    if state.config.base_model is not None:
        base = replace(state.config.base_model, name_or_path="")
        model.catsparse = replace(state, config=replace(state.config, base_model=base))


def load_dense_model(name: str, **from_pretrained_kwargs: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained`` in evaluation mode; ``default`` is the bundled one.

    Raises:
        CatsparseError: there is no such model, or not in safetensors, or what it needs (the library
            of a quantized one) is missing.
    """
    from_pretrained_kwargs.setdefault("use_safetensors", True)
    # Said outright, or transformers asks on the terminal whether to run the repository's code.
    from_pretrained_kwargs.setdefault("trust_remote_code", False)
    _check_path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name), **from_pretrained_kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, CatsparseError):
            raise
        raise CatsparseError(
            f"cannot load the model {shorten(name)}: {first_sentence(error)}"
        ) from error
    return model.eval()


def load_skeleton(name: str) -> Any:
    """The model's modules without its weights (on the meta device).

    Raises:
        CatsparseError: there is no such model.
    """
    try:
        _check_path(name)
        config = AutoConfig.from_pretrained(model_path(name), trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise CatsparseError(
            f"cannot read the model {shorten(name)}: {first_sentence(error)}"
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, or of the model that an artifact directory refers to."""
    if (Path(name) / CONFIG_NAME).is_file() and not (Path(name) / "tokenizer_config.json").exists():
        base = SparsityConfig.from_file(Path(name) / CONFIG_NAME).base_model
        name = (base.name_or_path if base else "") or name
    try:
        return AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CatsparseError(
            f"cannot load the tokenizer of {shorten(name)}: {first_sentence(error)}"
        ) from error


def _check_path(name: str) -> None:
    """Refuse what can only be a path and is no folder, before a Hub is asked for it."""
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise CatsparseError(f"there is no folder {shorten(name)}; check the path")


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
                name: read_threshold(config, name, names, file.get_tensor)
                for name in (*config.sites, *config.inputs)
            }
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        reason = first_sentence(error)
        raise CatsparseError(f"{tensor_path} is damaged ({reason}); save it again") from error
    if metadata.get("catsparse.digest") != _digest(config):
        raise CatsparseError(
            f"{CONFIG_NAME} and {CALIBRATION_NAME} in {directory} do not belong together; "
            "save it again"
        )
    if "catsparse.sites" not in metadata:
        return config, thresholds, None
    calibration = Calibration.load(tensor_path)
    if calibration.preview_of(config.method) != config.preview:
        raise CatsparseError(
            f"the statistics in {CALIBRATION_NAME} are not those of the preview in {CONFIG_NAME}; "
            "calibrate again"
        )
    for name, site in config.sites.items():
        _check_statistics(name, site, calibration)
    for name, part in config.inputs.items():
        seen = calibration.inputs.get(name)
        if seen is None or (seen.linears, seen.in_features) != (part.linears, part.in_features):
            raise _other_statistics(name)
    return config, thresholds, calibration


def stored_previews(
    directory: str, config: SparsityConfig, revision: str | None = None
) -> StoredPreviews | None:
    """What a merged directory holds of previews; None if its model has none."""
    if config.preview is None:
        return None
    find = functools.cache(lambda: _find(directory, PREVIEWS_NAME, revision))
    return StoredPreviews(config, config.method == PRODUCT, find)


def _check_statistics(name: str, site: SiteConfig, calibration: Calibration) -> None:
    seen = calibration.sites.get(name)
    same = seen is not None and (seen.act, seen.hidden_size, seen.intermediate_size) == (
        site.act,
        site.hidden_size,
        site.intermediate_size,
    )
    if not same:
        raise _other_statistics(name)


def _other_statistics(name: str) -> CatsparseError:
    return CatsparseError(
        f"the statistics of {shorten(name)} are those of another model; calibrate again"
    )


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
            "the model's weights are not those of a name or path, so an adapter directory cannot "
            "refer to them; save it with merge=True"
        )
    if base is None or not name:  # built from a config: Path("") would be the current folder
        return base
    if name == str(_BUNDLED):
        return replace(base, name_or_path=DEFAULT_MODEL)
    # A relative path would depend on where the program is started.
    return replace(base, name_or_path=str(Path(name).resolve())) if Path(name).is_dir() else base


def _digest(config: SparsityConfig) -> str:
    """Ties the two files together: what of ``catsparse.json`` the tensors belong to."""
    sites = {
        name: {k: v for k, v in asdict(site).items() if v is not None}
        for name, site in config.sites.items()
    }
    # What version 1 did not know is left out where it is null: its digests stay right.
    parts = [config.method, config.compensate, sites]
    parts += [] if config.preview is None else [config.preview]
    if config.inputs:
        parts.append({name: asdict(part) for name, part in config.inputs.items()})
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
