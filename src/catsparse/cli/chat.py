"""``catsparse chat``: a conversation in the terminal, or one message a line from a pipe."""

from __future__ import annotations

import importlib
import json as json_module
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CatsparseError
from ..files import write_atomic
from ..strict_json import shorten
from .common import Compile, Device, Dtype, Json, Model, Seed, err, load, summarize_paths

if TYPE_CHECKING:  # these bring torch, which --help does not need
    from ..chat import Answer, Chat

HELP = """\
/help         this list
/clear        forget the conversation (the system text stays)
/dense        answer with the dense model from now on
/sparse       answer with the sparse model again
/stats        what was written so far, how fast, and what was dropped
/save FILE    the conversation as JSON
/exit         leave, as does Ctrl-D
Ctrl-C stops an answer; what came of it is kept. A space before / makes it a message."""


def chat(
    model: Model = "default",
    system: Annotated[str | None, typer.Option(help="System text, never forgotten.")] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", help="New tokens at most, each answer.", min=1)
    ] = 256,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: Seed = 0,
    compile: Compile = False,
    device: Device = None,
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Talk to a model; --json prints an object a line for each answer.

    tokens/s are those of decode alone. What was dropped is counted after each answer, by running
    the conversation once more, so that counting does not slow it.
    """
    from ..chat import Chat
    from ..text import TextGenerator

    loaded, tokenizer = load(model, device, dtype)
    writer = TextGenerator(
        loaded,
        tokenizer,
        tokens,
        greedy=greedy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        compile=compile,
    )
    _Session(model, Chat(writer, system), json).run()


class _Session:
    """The loop: reads messages and commands, prints answers to stdout and all else to stderr."""

    def __init__(self, name: str, chat: Chat, json: bool) -> None:
        self.name, self.chat, self.json = name, chat, json
        self.interactive = not json and _is_terminal()
        self.answers: list[Answer] = []
        self.told_forgetting = False
        self.commands = {
            "/help": lambda: _note(HELP),
            "/clear": self.clear,
            "/dense": lambda: self.switch(dense=True),
            "/sparse": lambda: self.switch(dense=False),
            "/stats": self.stats,
        }

    def run(self) -> None:
        if self.interactive:
            kind = "sparse" if self.chat.is_sparse else "dense"
            _note(f"{self.name} ({kind}); /help lists the commands, Ctrl-D leaves")
        if not self.chat.has_template:
            _note("the model has no chat template: it goes on from the plain text")
        for line in _terminal() if self.interactive else _pipe():
            try:
                if line.strip() == "/exit":
                    return
                if line.startswith("/"):
                    self.command(line)
                elif line.strip():
                    self.answer(line.strip() if self.chat.has_template else line)
            except CatsparseError as error:
                if not self.interactive:
                    raise
                err.print(f"error: {error}", style="red", highlight=False, markup=False)
            except KeyboardInterrupt:  # between the parts that take it in their own way
                if not self.interactive:
                    raise typer.Exit(130) from None
                print()

    def answer(self, message: str) -> None:
        answer = self.chat.say(message, None if self.json else _show)
        written, dropped = answer.written, answer.dropped
        if self.json:
            result = {
                "text": answer.text,
                "tokens": written.tokens,
                "tokens_per_second": written.decode_tokens_per_second,
                "seconds_to_first_token": written.seconds_to_first_token,
                "sparsity": None if dropped is None else dropped.sparsity,
                "bytes_skipped": None if dropped is None else dropped.bytes_skipped,
                "context": self.chat.context,
                "context_limit": self.chat.limit,
            }
            print(json_module.dumps(result), flush=True)
        else:
            print(flush=True)
            _note(self.status(answer))
        if written.tokens:
            self.answers.append(answer)
        if answer.forgotten and not self.told_forgetting:
            self.told_forgetting = True
            _note("the context is full: the oldest messages are forgotten from now on")
        if written.interrupted and not self.interactive:
            raise typer.Exit(130)

    def status(self, answer: Answer) -> str:
        written = answer.written
        if not written.tokens:
            return "stopped before the first token; the message is not kept"
        rate = written.decode_tokens_per_second
        return ", ".join(
            [
                f"{written.tokens} tokens" + (" (stopped)" if written.interrupted else ""),
                *([] if rate is None else [f"{rate:.1f} tokens/s"]),
                f"the first after {written.seconds_to_first_token:.2f} s",
                self.context(),
                self.dropped(answer),
            ]
        )

    def context(self) -> str:
        limit = self.chat.limit
        return f"context {self.chat.context}" + (f" of {limit}" if limit else "")

    def dropped(self, answer: Answer) -> str:
        if answer.dropped is None:
            return "dense" if self.chat.dense or not self.chat.is_sparse else "not counted"
        d = answer.dropped
        return f"{d.sparsity:.1%} dropped, {d.bytes_skipped:.1%} of the layers' bytes skipped"

    def command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if name == "/save":
            self.save(rest.strip())
        elif name in self.commands and not rest:
            self.commands[name]()
        else:
            raise CatsparseError(
                f"there is no command {shorten(line)}; /help lists them, and a space before / "
                "makes it a message"
            )

    def clear(self) -> None:
        self.chat.clear()
        _note("the conversation is forgotten")

    def switch(self, dense: bool) -> None:
        if not self.chat.is_sparse:
            raise CatsparseError(
                f"{self.name} is dense; /dense and /sparse need a folder made by sparsify"
            )
        self.chat.dense = dense
        _note(f"answers are {'dense' if dense else 'sparse'} from now on")

    def stats(self) -> None:
        from ..explanation import model_paths

        tokens = sum(a.written.tokens for a in self.answers)
        rates = [a.written.decode_tokens_per_second for a in self.answers]
        known = [rate for rate in rates if rate is not None]
        lines = [f"{len(self.answers)} answers, {tokens} tokens, {self.context()}"]
        if known:
            lines.append(f"decode {min(known):.1f} to {max(known):.1f} tokens/s")
        counted = [a for a in self.answers if a.dropped is not None]
        if counted and (last := counted[-1].dropped) is not None:
            lines.append(
                f"last counted: {self.dropped(counted[-1])} "
                f"(neurons {last.lowest:.1%} to {last.highest:.1%} by MLP)"
            )
        running = "dense" if self.chat.dense or not self.chat.is_sparse else "sparse"
        paths = summarize_paths(model_paths(self.chat.writer.model))
        lines.append(f"answers are {running}" + ("" if running == "dense" else f", by {paths}"))
        _note("\n".join(lines))

    def save(self, file: str) -> None:
        if not file:
            raise CatsparseError("/save needs a file, as in /save talk.json")
        content: dict[str, Any] = {"model": self.name, "messages": self.chat.messages}
        text = json_module.dumps(content, indent=2, ensure_ascii=False) + "\n"
        path = Path(file).expanduser()
        try:
            write_atomic(path, lambda temporary: _write(temporary, text))
        except OSError as error:
            raise CatsparseError(
                f"cannot write {shorten(file)} ({error.strerror}); name another file"
            ) from error
        _note(f"{len(self.chat.messages)} messages in {path}")


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _terminal() -> Iterator[str]:
    with suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _note("Ctrl-D or /exit leaves")
            continue
        yield line


def _pipe() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    err.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
