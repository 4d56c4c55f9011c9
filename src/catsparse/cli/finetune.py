"""``catsparse finetune``: win quality back, keep the sparsity."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import DEFAULT_METHOD, METHODS, PRODUCT, check_choice, check_method, check_preview
from ..errors import CatsparseError
from ..files import check_target
from .common import (
    Column,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    SeqLen,
    err,
    load,
    load_dense,
    make_folder,
    refuse_options,
)

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..finetune import Examples, FinetuneOptions, Row

_HELD_OUT = 20  # of so many sequences one, where there is no text to measure on
_OF_DENSE = ("sparsity", "bytes_skipped", "method", "compensate", "preview")


def finetune(
    context: typer.Context,
    model: Model = "default",
    data: Data = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; an interrupted run goes on.")
    ] = Path("out/finetune"),
    heldout: Annotated[
        str | None,
        typer.Option(help="Text to measure on; else a part of --data that is not trained on."),
    ] = None,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens of it, at most.", min=2)] = 10_000,
    column: Column = "text",
    seq_len: SeqLen = 512,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Sequences a forward pass and device.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Forward passes a step.")] = 1,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="Highest, after the warm-up.")
    ] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 64,
    alpha: Annotated[float, typer.Option(help="Of LoRA: it adds alpha/rank B A.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Of LoRA.")] = 0.0,
    targets: Annotated[
        str,
        typer.Option(help="attention (query and value), mlp, all, or names of layers; commas."),
    ] = "attention,mlp",
    full: Annotated[bool, typer.Option("--full", help="Train all weights, no adapter.")] = False,
    distill: Annotated[
        bool,
        typer.Option("--distill", help="Towards the dense model's predictions, not the text."),
    ] = False,
    thresholds: Annotated[
        str, typer.Option(help="At the end recalibrate them to the sparsity asked, or hold them.")
    ] = "recalibrate",
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines", help="The same run on the dense model and with ReLU for comparison."
        ),
    ] = False,
    log_every: Annotated[int, typer.Option(help="Steps.")] = 10,
    eval_every: Annotated[int, typer.Option(help="Steps; 0: before and after only.")] = 50,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: none.")] = 100,
    early_stop: Annotated[
        int | None, typer.Option(help="End after so many evaluations without a lower loss.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16, train in fp32.")] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time."),
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter in; write all.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Leave them in the output folder.")
    ] = False,
    sparsity: Annotated[
        float | None, typer.Option(help="Of a dense MODEL, as in sparsify; else 0.5.")
    ] = None,
    bytes_skipped: Annotated[
        float | None, typer.Option(help="Of a dense MODEL, instead of --sparsity.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Of a dense MODEL: {', '.join(METHODS)}.")
    ] = None,
    compensate: Annotated[bool, typer.Option(help="Of a dense MODEL: means for the dropped.")] = (
        True
    ),
    preview: Annotated[
        int | None, typer.Option(help="Of a dense MODEL: bits of what decides, 4 or 8.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter, dropout and order of data.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Train MODEL, a folder of sparsify's or a dense model that is then made sparse first, through
    its sparse forward, and write it with a PEFT adapter.

    Several GPUs: accelerate launch -m catsparse.cli finetune ...
    """
    from .. import hub
    from ..adapters import ADAPTER_CONFIG
    from ..finetune import (
        FinetuneOptions,
        check_context,
        is_main_process,
        remove_checkpoints,
        require_packages,
    )
    from ..finetune import finetune as train
    from .finetune_report import report

    require_packages()
    options = FinetuneOptions(
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=learning_rate,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        full=full,
        distill=distill,
        thresholds=thresholds,
        log_every=log_every,
        eval_every=eval_every,
        save_every=save_every,
        early_stop=early_stop,
        bf16=bf16,
        seed=seed,
        checkpointing=gradient_checkpointing,
    )
    given = hub.is_artifact(model)
    if given:
        refuse_options(context, _OF_DENSE, f"{model} is sparse already")
        if (Path(model) / ADAPTER_CONFIG).exists():
            raise CatsparseError(
                f"{model} holds an adapter already; fine-tune it with --merge first, then the "
                "merged folder"
            )
        loaded, tokenizer = load(model, device, dtype)
    else:
        _check_dense(sparsity, bytes_skipped, method, preview)
        loaded, tokenizer = load_dense(model, device, dtype)
    examples, measured = _texts(data, heldout, heldout_tokens, tokenizer, seq_len, column, options)
    for texts in (examples, measured):
        check_context(loaded, texts)
    make_folder(output)
    check_target(output, merge or full)
    stored = loaded.dtype
    if dtype == "auto" and loaded.device.type == "cpu":
        loaded.float()  # half precision is slow there
    show = is_main_process()
    try:
        if not given:
            wanted = sparsity, bytes_skipped, method, compensate, preview
            _make_sparse(loaded, examples, options, stored, wanted)
        before = _measure(loaded, measured) if show else None
        result = train(
            *(loaded, tokenizer, examples, measured, options, output),
            dtype=stored,
            merge=merge,
            keep_checkpoints=keep_checkpoints or baselines,  # interrupted there, it is not lost
        )
        after = _measure(result.model, measured, before) if show else None
        rows = list(result.rows)
        if baselines:
            where = output / "baselines"
            rows += _baselines(model, device, dtype, examples, measured, options, where)
            if show and not keep_checkpoints:
                for folder in (output, *where.iterdir()):
                    remove_checkpoints(folder)
    except KeyboardInterrupt:
        err.print("interrupted; the same command goes on from the last checkpoint, if one was made")
        raise typer.Exit(130) from None
    if show:
        report(result, rows, before, after, examples, output, json)


def _check_dense(
    sparsity: float | None, bytes_skipped: float | None, method: str | None, preview: int | None
) -> None:
    check_preview(preview)
    if method is not None:
        check_choice("method", method, METHODS)
        check_method(method, preview, None)
    from ..allocation import check_budget

    check_budget(sparsity, bytes_skipped, "uniform", None)


def _texts(
    data: str | None,
    heldout: str | None,
    heldout_tokens: int,
    tokenizer: Any,
    seq_len: int,
    column: str,
    options: FinetuneOptions,
) -> tuple[Examples, Examples]:
    """What to train and to measure on."""
    from .. import hub
    from ..finetune import load_examples, process_count

    read = partial(
        load_examples, tokenizer=tokenizer, seq_len=seq_len, seed=options.seed, column=column
    )
    name = None if data else "the bundled calibration text"
    if data is None and heldout is None:
        heldout = str(hub.bundled_text("heldout"))
    used = options.steps * options.batch_size * options.accumulation * process_count() * seq_len
    more = heldout_tokens if heldout is None else 0
    source = data or str(hub.bundled_text("calibration"))
    examples = read(source, tokens=max(used, seq_len) + more, name=name)
    if heldout is None:
        held = min(max(1, heldout_tokens // seq_len), max(1, len(examples) // _HELD_OUT))
        return examples.split(held)
    return examples, read(heldout, tokens=max(heldout_tokens, seq_len))


def _make_sparse(
    model: Any,
    examples: Examples,
    options: FinetuneOptions,
    stored: Any,
    wanted: tuple[float | None, float | None, str | None, bool, int | None],
) -> None:
    from ..finetune import is_main_process
    from ..observation import calibrate
    from ..surgery import sparsify

    sparsity, bytes_skipped, method, compensate, preview = wanted
    calibration = calibrate(
        model,
        examples.first(options.calibration_tokens).data(options.batch_size),
        batch_size=options.batch_size,
        seed=options.seed,
        data_name=examples.name,
        preview=preview,
        method=DEFAULT_METHOD if method in (None, PRODUCT) else str(method),
        progress=is_main_process(),
    )
    # The bytes are those of the weights as they are stored.
    calibration.provenance = replace(
        calibration.provenance, dtype=str(stored).removeprefix("torch.")
    )
    sparsify(model, calibration, sparsity, method, compensate, bytes_skipped=bytes_skipped)


def _measure(model: Any, texts: Examples, before: Evaluation | None = None) -> Evaluation | None:
    """Perplexity beside that of the dense model before training; None for conversations."""
    from ..evaluate import evaluate

    if texts.table:
        return None
    dense = None if before is None else before.dense_perplexity
    return evaluate(model, texts.windows(), dense=dense)


def _baselines(
    name: str,
    device: str | None,
    dtype: str,
    examples: Examples,
    measured: Examples,
    options: FinetuneOptions,
    folder: Path,
) -> list[Row]:
    """The rows of the same run on the dense model, and with ReLU; checkpoints stay."""
    from ..finetune import BASELINES, run_baseline
    from ..modules import sparse_modules
    from ..surgery import densify

    rows = []
    for kind in BASELINES:
        # Once more: the adapter may be merged into the other, and FSDP leaves a model in shards.
        model, _ = load(name, device, dtype)
        if dtype == "auto" and model.device.type == "cpu":
            model.float()
        if sparse_modules(model):
            densify(model)
        rows += run_baseline(
            *(model, kind, examples, measured, options, folder / kind), keep_checkpoints=True
        )
    return rows
