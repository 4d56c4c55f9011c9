"""``catsparse serve``: an OpenAI-compatible endpoint."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CatsparseError
from .common import Device, Dtype, Model, err, load

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def serve(
    model: Model = "default",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CATSPARSE_API_KEY", help="What clients must send.", show_envvar=True),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the API; default: MODEL, or its folder.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens an answer, at most.", min=1)] = 1024,
    max_body: Annotated[str, typer.Option(help="Bytes a request, at most (K, M).")] = "1M",
    max_requests: Annotated[
        int, typer.Option(help="Requests at a time; more are refused with 429.", min=1)
    ] = 256,
    max_batch: Annotated[
        int | None,
        typer.Option(help="Answers written at a time; default: 16, on a GPU 64.", min=1),
    ] = None,
    continuous_batching: Annotated[
        bool | None,
        typer.Option(
            "--continuous-batching/--no-continuous-batching",
            help="Write answers together, or one after the other; default: together, where "
            "transformers can.",
            show_default=False,
        ),
    ] = None,
    stall_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without a token or step after which the worker counts as stalled: its "
            "answers fail, /health is 503. 0: never.",
            min=0,
        ),
    ] = 300.0,
    dense: Annotated[bool, typer.Option("--dense", help="Run the dense model.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line once it is ready.")
    ] = False,
) -> None:
    """Serve a model: chat completions, completions, models, metrics, and a page to try it.

    SIGTERM and Ctrl-C end it once the answers under way are complete.
    """
    from ..surgery import sparse_layers

    server_module = _server_module()
    from ..serve import Settings

    settings = Settings(
        name=_name(model) if name is None else name,
        host=host,
        port=port,
        api_key=api_key,
        max_tokens=max_tokens,
        max_body=_bytes(max_body),
        max_requests=max_requests,
        max_batch=max_batch,
        batching=continuous_batching,
        dense=dense,
        stall_timeout=stall_timeout,
    )
    bound = server_module.listen(settings)
    if not settings.is_local and api_key is None:
        _note(
            f"warning: {host} can be reached from other machines and there is no --api-key: "
            "anyone there can use this server"
        )
    loaded, tokenizer = load(model, device, dtype)
    is_sparse = bool(sparse_layers(loaded)) and not dense

    def ready(url: str) -> None:
        if json:
            facts = {"url": url, "model": settings.name, "sparse": is_sparse, "pid": os.getpid()}
            print(json_module.dumps(facts), flush=True)
        else:
            kind = "sparse" if is_sparse else "dense"
            _note(f"{settings.name} ({kind}) at {url}, the API at {url}/v1; Ctrl-C ends it")

    server = server_module.Server(loaded, tokenizer, settings, ready, _note)
    try:
        server_module.run(server, bound)
    except server_module.ServerFailed as failure:
        _note(f"error: {failure}")
        raise typer.Exit(1) from None


def _server_module() -> Any:
    try:
        from ..serve import server
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {"fastapi", "starlette", "uvicorn", "openai", "prometheus_client"}:
            raise
        raise CatsparseError(
            f"serving needs {missing}, which is not installed; pip install 'catsparse[serve]'"
        ) from error
    return server


def _name(model: str) -> str:
    """Of the model in the API: no path of this machine."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _bytes(text: str) -> int:
    number = text.strip().upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in ("K", "M", "G") else ""
    digits = number.removesuffix(unit) if unit else number
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise CatsparseError(f"--max-body must be a number of bytes, as 500K or 1M, not {text}")
    return int(digits) * _SIZES[unit]


def _note(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)
