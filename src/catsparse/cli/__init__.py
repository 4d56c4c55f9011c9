"""The ``catsparse`` command: each subcommand imports only what it needs.

Results go to stdout (one JSON object with --json), everything else to stderr. Exit codes: 0 done,
2 the input is at fault (one sentence, no traceback), 1 anything else.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from .._version import __version__
from ..errors import CatsparseError
from .bench import bench
from .chat import chat
from .common import err
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .finetune import finetune
from .generate import generate
from .info import info
from .plot import plot
from .report import report
from .serve import serve
from .sparsify import sparsify

app = typer.Typer(
    name="catsparse",
    help="Make a gated-MLP language model activation-sparse, and measure what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


COMMANDS = (sparsify, finetune, evaluate, compare, generate, chat, serve, info, plot, report, demo)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> NoReturn:
    """Entry point: turns exceptions into one sentence and an exit code."""
    try:
        app()
    except Exception as error:
        if _debug:
            raise
        known = isinstance(error, CatsparseError)
        hint = " (catsparse --debug ... shows the traceback)"
        text = f"error: {error}" if known else f"{type(error).__name__}: {error}{hint}"
        err.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2 if known else 1)
    sys.exit(0)
