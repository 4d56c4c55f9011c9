"""What the subcommands share: option types, loading models and text, printing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..config import CONFIG_NAME, check_choice, check_sparsity
from ..errors import CatsparseError
from ..strict_json import shorten

err = Console(stderr=True)
out = Console()

Model = Annotated[
    str, typer.Argument(help="Folder or Hub name of a model; 'default' is the bundled one.")
]
Directory = Annotated[str, typer.Argument(help="A folder written by 'catsparse sparsify'.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Data = Annotated[
    str | None,
    typer.Option(help="Text file (.txt/.xz/.gz/.jsonl/.parquet) or dataset; default: bundled."),
]
Column = Annotated[str, typer.Option(help="Text column of .jsonl, .parquet and datasets.")]
Tokens = Annotated[int, typer.Option(help="Number of tokens.", min=2)]
SeqLen = Annotated[int, typer.Option("--seq-len", help="Window length in tokens.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Windows a forward pass.", min=1)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")
]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: as the checkpoint says.")
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the model's own forward, for a minute, instead of our kernels."
    ),
]
Scope = Annotated[
    str,
    typer.Option(
        help="mlp, or all linear layers of the MLPs' blocks: attention's drop inputs, by teal."
    ),
]
TasksData = Annotated[
    Path | None,
    typer.Option(help="Folder of the tasks' .jsonl files; else they come from lm-eval."),
]
Limit = Annotated[int | None, typer.Option(help="Examples a task, at most.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def load_dense(name: str, device: str | None, dtype: str) -> tuple[Any, Any]:
    from .. import hub

    return _placed(hub.load_dense_model(name, **_dtype_option(dtype)), device), hub.load_tokenizer(
        name
    )


def load(name: str, device: str | None, dtype: str, merge_adapter: bool = True) -> tuple[Any, Any]:
    """A sparse folder or a dense model, with its tokenizer; an adapter is folded in, or stays."""
    from .. import hub

    if not hub.is_artifact(name):
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise CatsparseError(f"{name} holds neither {CONFIG_NAME} nor a model's config.json")
        return load_dense(name, device, dtype)
    model = hub.load(name, merge_adapter=merge_adapter, **_dtype_option(dtype))
    return _placed(model, device), hub.load_tokenizer(name)


def _dtype_option(dtype: str) -> dict[str, Any]:
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    _quiet_transformers()
    return {"dtype": dtype}


def _placed(model: Any, device: str | None) -> Any:
    import torch

    local = os.environ.get("LOCAL_RANK")  # of a process that accelerate launch started
    gpu = "cuda" if local is None else f"cuda:{local}"
    name = device or (gpu if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CatsparseError(f"cannot use the device {name}: {reason}") from error


def refuse_options(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Say so where an option was given that would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise CatsparseError(f"--{name.replace('_', '-')} does nothing here: {why}")


def token_windows(
    data: str | None,
    bundled: str,
    tokenizer: Any,
    tokens: int,
    seq_len: int,
    seed: int | None,
    column: str,
) -> tuple[Any, str]:
    from .. import hub
    from ..data import load_windows

    source = data or str(hub.bundled_text(bundled))
    windows = load_windows(
        source, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed, column=column
    )
    if data is not None and windows.numel() < tokens // seq_len * seq_len:
        err.print(f"{data} holds only {windows.numel():,} tokens of the {tokens:,} asked for")
    return windows, data or f"the bundled {bundled} text"


def sparsities(text: str) -> list[float]:
    """The fractions of ``--sparsity``."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise CatsparseError(
            f"--sparsity takes fractions as 0.5,0.7, not {shorten(repr(text))}"
        ) from None
    for value in values:
        check_sparsity(value)
    return values


def whole_numbers(text: str, option: str, least: int, most: int | None = None) -> list[int]:
    """Numbers by commas, from ``least`` to ``most``."""
    parts = text.split(",")
    plain = all(part.isascii() and part.isdigit() and len(part) < 12 for part in parts)
    if not plain or not all(least <= int(part) <= (most or int(part)) for part in parts):
        ends = f"from {least} on" if most is None else f"from {least} to {most}"
        raise CatsparseError(f"{option} takes whole numbers {ends}, not {shorten(repr(text))}")
    return [int(part) for part in parts]


def make_folder(path: Path) -> None:
    """Before anything is measured, not after."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatsparseError(f"cannot make the folder {path}: {error.strerror}") from error


def summarize_paths(paths: dict[str, Any]) -> str:
    """The words of :func:`catsparse.explanation.model_paths`, once where all layers agree."""
    counts: Counter[str] = Counter(path.words for path in paths.values())
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{words} in {n} of {len(paths)} layers" for words, n in counts.items())


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
