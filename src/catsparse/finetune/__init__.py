"""Fine-tuning through the sparse forward: win quality back, keep the sparsity.

The forward of training is that of inference: what the decision drops is masked, so the gradient
passes kept neurons only, as in CATS (arXiv 2404.08763), whose authors' code sets dropped
activations to zero and leaves the rest to autograd. The decision itself has no gradient.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import hub
from ..config import SparsityConfig
from ..errors import CatsparseError
from ..files import check_target
from ..modules import sparse_modules
from ..quantized_linear import weights_of_model
from ..recalibration import (
    hold_thresholds,
    recalibrate,
    refuse_inputs,
    set_thresholds,
    sites_of,
)
from ..surgery import run_dense, state_of, state_owner
from .baselines import run_baseline
from .counting import SparsityLog
from .examples import Example, Examples, chat_example, load_examples, windows_as_examples
from .options import BASELINES, SCHEDULES, THRESHOLDS, FinetuneOptions
from .processes import is_main_process, process_count
from .running import LOG_NAME, Row, remove_checkpoints, train, write_rows
from .targets import adapter_targets

__all__ = [
    "BASELINES",
    "LOG_NAME",
    "SCHEDULES",
    "THRESHOLDS",
    "Example",
    "Examples",
    "FineTuned",
    "FinetuneOptions",
    "Row",
    "adapter_targets",
    "bytes_skipped_at",
    "chat_example",
    "check_context",
    "finetune",
    "is_main_process",
    "load_examples",
    "process_count",
    "remove_checkpoints",
    "require_packages",
    "run_baseline",
    "windows_as_examples",
    "write_rows",
]


@dataclass(frozen=True)
class FineTuned:
    """A finished run.

    Attributes:
        model: the sparse model, with the adapter on it in place, or its weights merged.
        rows: the log, a row for each step at which a loss was measured.
        config: of the fine-tuned model.
        asked: sparsity by site before training, on the calibration text.
        drifted: by site what the same thresholds drop after training, on the training text.
    """

    model: Any
    rows: list[Row]
    config: SparsityConfig
    asked: dict[str, float]
    drifted: dict[str, float]


def finetune(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    heldout: Examples | None,
    options: FinetuneOptions,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    progress: bool = True,
    keep_checkpoints: bool = False,
) -> FineTuned:
    """Train a sparse model and write it to ``output``: ``catsparse.json`` and a PEFT adapter.

    An interrupted run goes on from its last checkpoint when it is called again.

    Args:
        model: a sparse model without adapters; changed in place, but for FSDP, which leaves it in
            shards: go on with the result's.
        tokenizer: of the model; saved beside merged weights.
        examples: to train on, from :func:`load_examples`.
        heldout: to measure the loss on, or None.
        options: of the run.
        output: folder to write; ``catsparse.load`` puts it together.
        dtype: of the weights as they are written with ``merge``, and otherwise loaded later; None
            for the model's own, which may be another for training.
        merge: fold the adapter into the weights and write them. Full fine-tuning always does.
        progress: show a progress bar on stderr.
        keep_checkpoints: leave the Trainer's checkpoints in ``output/checkpoints``; else they go
            once the output is written.

    Raises:
        CatsparseError: PEFT or accelerate are missing, the model is dense, holds adapters or drops
            inputs of linear layers, its weights are packed and to be trained or merged into, a
            sequence is longer than its context, or the loss is not
            finite.
    """
    require_packages()
    output, state, model = Path(output), state_of(model), state_owner(model)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise CatsparseError(
            "the model holds a PEFT adapter already; load it with merge_adapter=True first"
        )
    refuse_inputs(state.config)
    if (merge or options.full) and (packed := weights_of_model(model)) is not None:
        raise CatsparseError(
            f"weights packed in {packed} cannot be trained or merged into; train an adapter beside "
            "them, without full and merge"
        )
    check_target(output, merge or options.full)
    for texts in (examples, *([] if heldout is None else [heldout])):
        check_context(model, texts)
    sites = sites_of(model)
    targets = [] if options.full else adapter_targets(model, sites, options.targets)
    dtype = model.dtype if dtype is None else dtype
    if options.full:
        model.float()  # a step of the optimizer is smaller than bf16 can tell
    trained, rows = train(
        *(model, targets, examples, heldout, options, output, state.config.method),
        dense=lambda: run_dense(model),
        progress=progress,
    )
    model = state_owner(trained)
    asked = {name: site.sparsity for name, site in state.config.sites.items()}
    drifted = _end(model, examples, options, asked, dtype, progress)
    if merge and not options.full:
        model = trained.merge_and_unload()
    if merge or options.full:
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32
            parameter.data = parameter.data.to(dtype)
    if is_main_process():
        hub.save(model, output, merge=merge or options.full)
        if merge or options.full:
            tokenizer.save_pretrained(output)
        write_rows(output / LOG_NAME, rows)
        if not keep_checkpoints:
            remove_checkpoints(output)
    return FineTuned(model, rows, state_of(model).config, asked, drifted)


def _end(
    model: Any,
    examples: Examples,
    options: FinetuneOptions,
    asked: dict[str, float],
    dtype: torch.dtype,
    show: bool,
) -> dict[str, float]:
    """Set or hold the thresholds; the sparsity that those of before have now, by site."""
    measured = examples.first(options.calibration_tokens)
    log = SparsityLog(sparse_modules(model))
    with log.counting():
        calibration = recalibrate(
            model,
            measured.data(options.batch_size),
            batch_size=options.batch_size,
            seed=options.seed,
            data_name=examples.name,
            dtype=str(dtype).removeprefix("torch."),
            progress=show and is_main_process(),
        )
    counts = log.take()
    if counts is None:
        raise CatsparseError(
            f"no token of {examples.name} reached some of the sparse MLPs, so their thresholds "
            "cannot be set anew; give more text"
        )
    kept, kept_down, pairs = counts.cpu().unbind(1)
    now = list(zip((1 - kept / pairs).tolist(), (1 - kept_down / pairs).tolist(), strict=True))
    achieved = dict(zip(log.modules, now, strict=True))
    if options.thresholds == "hold":
        hold_thresholds(model, calibration, achieved)
    else:
        set_thresholds(model, calibration, asked)
    return {name: first for name, (first, _) in achieved.items()}


def bytes_skipped_at(
    config: SparsityConfig, sites: dict[str, float], down_sites: dict[str, float]
) -> float:
    """Fraction of the MLPs' weight bytes that is skipped, of weights as ``config`` says they are
    stored, where these shares of neurons are dropped and of W_down's rows are not read."""
    changed = {
        name: replace(
            site,
            sparsity=sites[name],
            down_sparsity=None if site.down_sparsity is None else down_sites[name],
        )
        for name, site in config.sites.items()
    }
    return replace(config, sites=changed).bytes_skipped


def check_context(model: Any, examples: Examples) -> None:
    """Whether there are sequences, and every one fits into the model's context.

    Raises:
        CatsparseError: there are none, or one does not fit.
    """
    if not len(examples):
        raise CatsparseError(f"{examples.name} holds no sequence; give more text")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(len(example.ids) for example in examples.examples)
    remedy = "shorten or leave out the row" if examples.table else "give a shorter --seq-len"
    if limit is not None and longest > limit:
        raise CatsparseError(
            f"a sequence of {examples.name} has {longest:,} tokens, more than the model's context "
            f"of {limit:,}; {remedy}"
        )


def require_packages() -> None:
    """Whether what fine-tuning needs beyond the package is there.

    Raises:
        CatsparseError: it is not.
    """
    missing = [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CatsparseError(
            f"fine-tuning needs {' and '.join(missing)}: pip install 'catsparse[finetune]'"
        )
