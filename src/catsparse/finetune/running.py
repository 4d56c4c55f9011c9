"""One training run of any model: adapter, Trainer, checkpoints that it goes on from, rows."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from ..errors import CatsparseError
from ..files import write_atomic
from ..judge import progress_bar
from ..modules import sparse_modules
from ..rows import key_of, tokens_digest, weights_digest
from ..strict_json import shorten
from ..surgery import threshold_every_token
from .counting import SparsityLog
from .examples import Examples, collate
from .options import FinetuneOptions
from .sharded import gather, without_weights
from .trainer import (
    TRAINER_STATE_NAME,
    LogWithCheckpoints,
    ProgressCallback,
    SparseTrainer,
    last_checkpoint,
)

LOG_NAME = "training.jsonl"
_CHECKPOINTS, _RUN = "checkpoints", "run.json"
Row = dict[str, Any]
# Makes the model dense inside a ``with`` block, its adapter apart.
Undo = Callable[[], AbstractContextManager[None]]


def train(
    model: nn.Module,
    targets: list[str],
    train: Examples,
    heldout: Examples | None,
    options: FinetuneOptions,
    folder: Path,
    variant: str,
    *,
    dense: Undo = nullcontext,
    progress: bool = True,
) -> tuple[Any, list[Row]]:
    """Train ``model``, or go on with the run that ``folder`` holds a checkpoint of.

    Args:
        model: sparse or dense, without adapters; its sparse modules threshold every token.
        targets: full names of the modules an adapter is put on; nothing for full fine-tuning.
        train, heldout: what to train on, and to measure the loss on.
        options: of the run.
        folder: for the log, and checkpoints in a folder of it; they stay until what follows is
            done: see :func:`remove_checkpoints`.
        variant: names the run in its rows.
        dense: makes the model, but for the adapter, what it is to be distilled from.
        progress: show a progress bar on stderr.

    Returns:
        The PEFT model around ``model`` (for full fine-tuning ``model``), and the log's rows. FSDP
        leaves ``model`` in shards; it is then one around a copy.

    Raises:
        CatsparseError: the loss is not finite, or the checkpoint is of another run.
    """
    checkpoints = folder / _CHECKPOINTS
    arguments = _arguments(options, checkpoints, heldout is not None, _is_cpu(model))
    key = key_of(
        *(asdict(options), variant, sorted(targets), arguments.world_size),
        *(weights_digest(model), _thresholds_digest(model), _digest(train)),
        None if heldout is None else _digest(heldout),
    )
    resume = _resumable(checkpoints, key)
    arguments.eval_on_start = resume is None and heldout is not None
    if arguments.process_index == 0 and resume is None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(checkpoints / _RUN, lambda path: _write_text(path, json.dumps({"key": key})))
    set_seed(options.seed)
    trained = model if options.full else _with_adapter(model, targets, options)
    modules = sparse_modules(model)
    sparsity = SparsityLog(modules) if modules else None

    @contextmanager
    def teacher() -> Iterator[None]:
        with dense(), _adapters_off(trained):
            yield

    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar(progress and arguments.process_index == 0))
        trainer = SparseTrainer(
            model=trained,
            args=arguments,
            train_dataset=train,
            eval_dataset=heldout,
            data_collator=collate,
            callbacks=[
                ProgressCallback(bar, f"training {variant}"),
                LogWithCheckpoints(),
                _LogWriter(folder / LOG_NAME, variant),
            ],
            sparsity=sparsity,
            teacher=teacher if options.distill else None,
        )
        trainer.remove_callback(PrinterCallback)
        if options.early_stop is not None:
            trainer.add_callback(EarlyStoppingCallback(options.early_stop))
        over = resume is not None and _is_over(resume, options)
        empty = without_weights(trained) if trainer.is_fsdp_enabled and not over else None
        if sparsity is not None:
            stack.enter_context(threshold_every_token(model))
            stack.enter_context(sparsity.counting())
        if resume is not None and over:
            trainer.take(resume)  # it was interrupted after its last step
        else:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.refuse_broken()
        trainer.refuse_broken_weights()
        history = trainer.state.log_history
        done = any("eval_loss" in r and r["step"] == trainer.state.global_step for r in history)
        if heldout is not None and not done:
            trainer.evaluate()
    trainer.accelerator.wait_for_everyone()
    # Where accelerate wrapped forwards (bf16), the model goes on without.
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if empty is not None:
        trained = gather(trainer.model, empty)
    trained.eval()
    return trained, _rows(trainer.state.log_history, variant)


def _with_adapter(model: Any, targets: list[str], options: FinetuneOptions) -> Any:
    import peft

    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # of names that PEFT still calls
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model, config)


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """As PEFT's ``disable_adapter``, which also turns gradients off and on, past DDP and FSDP."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters")]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _arguments(
    options: FinetuneOptions, folder: Path, measured: bool, cpu: bool
) -> TrainingArguments:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    # The second name is the older one.
    again = "activation_checkpointing"
    again = again if again in names else "gradient_checkpointing"
    evaluated = measured and options.eval_every > 0
    stopping = options.early_stop is not None
    if stopping and not measured:
        raise CatsparseError("early_stop needs text to measure on; give some (--heldout)")
    save_every = options.eval_every if stopping else options.save_every
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "average_tokens_across_devices": True,  # a step's labels are counted on all
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[options.schedule],
        "warmup_steps": options.warmup,  # a share below 1
        "weight_decay": options.weight_decay,
        "logging_strategy": "steps",
        "logging_steps": options.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it waits for every step; the trainer looks by itself
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": options.eval_every or None,
        "prediction_loss_only": True,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 1,
        "save_total_limit": 2,
        "load_best_model_at_end": stopping,
        "restore_callback_states_from_checkpoint": stopping,  # how often in vain
        "metric_for_best_model": "eval_loss" if stopping else None,
        "greater_is_better": False if stopping else None,
        "bf16": options.bf16,
        again: options.checkpointing,
        f"{again}_kwargs": {"use_reentrant": False} if options.checkpointing else None,
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        # Buffers are thresholds, alike everywhere; every adapted matrix is used in each pass.
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
    }
    try:
        arguments = TrainingArguments(**given)
    except (ValueError, ImportError, RuntimeError) as error:
        raise CatsparseError(f"this run is not possible here: {shorten(error, 200)}") from error
    # Several GPUs of one process would mean torch's DataParallel; accelerate launch has processes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def _is_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _digest(examples: Examples) -> str:
    return key_of(*(tokens_digest(torch.stack([e.ids, e.labels])) for e in examples.examples))


def _thresholds_digest(model: nn.Module) -> str:
    def total(value: Tensor | None) -> float | None:
        # A GPU adds up what they are made of in any order: not to the last digit.
        return None if value is None else float(f"{float(value.double().sum()):.6g}")

    return key_of(
        *(
            [
                *(name, module.catsparse_preview_bits, total(module.catsparse_threshold)),
                *(total(module.catsparse_product_threshold), total(module.catsparse_mean)),
            ]
            for name, module in sparse_modules(model).items()
        )
    )


def _resumable(folder: Path, key: str) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        CatsparseError: there is one of another run.
    """
    last = last_checkpoint(folder)
    if last is None:
        return None
    try:
        there = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if not isinstance(there, dict) or there.get("key") != key:
        raise CatsparseError(
            f"{folder} holds checkpoints of a run with other settings, data or weights; delete it, "
            "or name another output folder"
        )
    return last


def _is_over(checkpoint: Path, options: FinetuneOptions) -> bool:
    """Whether the run made its last step there, or stopped early."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    stopper = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    vain = stopper.get("attributes", {}).get("early_stopping_patience_counter", 0)
    stopped = options.early_stop is not None and vain >= options.early_stop
    return stopped or int(state.global_step) >= options.steps


def remove_checkpoints(folder: Path) -> None:
    """Those of :func:`train` in ``folder``, once nothing would be lost with them."""
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)


class _LogWriter(TrainerCallback):  # type: ignore[misc]
    """Keeps the log file up to date, one process for all."""

    def __init__(self, path: Path, variant: str) -> None:
        self.path, self.variant = path, variant

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_rows(self.path, _rows(state.log_history, self.variant))


def _rows(history: list[dict[str, Any]], variant: str) -> list[Row]:
    """Of the Trainer's history what was measured at a step: a loss in training or on held-out
    text."""
    rows = []
    for entry in history:
        if not {"loss", "eval_loss"} & entry.keys():
            continue
        row: Row = {"variant": variant, "step": entry["step"]}
        for name in (
            *("loss", "eval_loss", "learning_rate", "grad_norm"),
            *("sparsity", "down_sparsity", "sites", "down_sites"),
        ):
            if name in entry:
                value = entry[name]
                bad = isinstance(value, float) and not math.isfinite(value)
                row[name] = None if bad else value
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """A JSON object a line; the file is replaced as a whole."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
