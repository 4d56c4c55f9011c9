"""Zero-shot tasks from jsonl files: the prompts, choices and metrics of lm-evaluation-harness.

docs/quality.md describes the files; no network and no other package is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CatsparseError
from ..judge import standard_error
from ..strict_json import parse_json, shorten
from .rows import Outcome
from .scoring import Pair, Score


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        pairs: a context and a continuation for each choice.
        gold: index of the right choice; None where greedy decoding must write the continuation.
        lengths: characters of each choice, by which ``acc_norm`` divides; None where it is not
            reported.
    """

    pairs: tuple[Pair, ...]
    gold: int | None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LocalTask:
    """A task's examples and the digest of the file that they come from."""

    name: str
    examples: list[Example]
    digest: str


Row = dict[str, Any]
Reader = Callable[[Row, str], Example]


def _choices(suffix: str = "", prefix: str = "", normalized: bool = True) -> Reader:
    """A reader of ``context``, ``choices``, ``gold``: each choice after the context and a space.

    ``suffix`` is added to the context, ``prefix`` taken off it.
    """

    def read(row: Row, where: str) -> Example:
        context = _text(row, "context", where).removeprefix(prefix) + suffix
        choices = _texts(row, "choices", where)
        pairs = tuple((context, f" {choice}") for choice in choices)
        lengths = tuple(map(len, choices)) if normalized else None
        return Example(pairs, _gold(row, len(choices), where), lengths)

    return read


def _winogrande(row: Row, where: str) -> Example:
    """Partial scoring: one continuation after the sentence's beginning with each option."""
    contexts = _texts(row, "context_options", where)
    continuation = _text(row, "continuation", where)
    pairs = tuple((context, f" {continuation}") for context in contexts)
    return Example(pairs, _gold(row, len(contexts), where))


def _lambada(row: Row, where: str) -> Example:
    context, word = _text(row, "context", where), _text(row, "continuation", where)
    return Example(((context, f" {word}"),), None)


def _blimp(row: Row, where: str) -> Example:
    """Which of two sentences is likelier from its start."""
    sentences = [_text(row, key, where) for key in ("good", "bad")]
    _text(row, "task", where)
    return Example(tuple(("", f" {sentence}") for sentence in sentences), 0)


_ANSWER = "\nAnswer:"
# Task -> names its file may have, reader. In the order of the paper, then the others.
_FORMS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "winogrande": (("winogrande",), _winogrande),
    "piqa": (("piqa",), _choices(_ANSWER)),
    "sciq": (("sciq",), _choices(_ANSWER)),
    "openbookqa": (("openbookqa", "openbook_qa"), _choices()),
    "hellaswag": (("hellaswag",), _choices()),
    "boolq": (("boolq",), _choices(_ANSWER, "Passage: ", normalized=False)),
    "arc_easy": (("arc_easy",), _choices(_ANSWER)),
    "arc_challenge": (("arc_challenge",), _choices(_ANSWER)),
    "lambada": (("lambada", "lambada_openai"), _lambada),
    "blimp": (("blimp",), _blimp),
}
LOCAL_TASKS = tuple(_FORMS)


def find_file(name: str, folder: Path) -> Path | None:
    """The file of task ``name`` in ``folder``; None if there is none or no such task."""
    stems = _FORMS[name][0] if name in _FORMS else ()
    paths = [folder / f"{stem}.jsonl" for stem in stems]
    return next((path for path in paths if path.is_file()), None)


def read_task(name: str, path: Path, limit: int | None = None) -> LocalTask:
    """Read at most ``limit`` examples of task ``name``.

    They are the first of the file; of ``blimp`` as many of each of its parts as there can be.

    Raises:
        CatsparseError: the file cannot be read, holds no example, or a line of it is not of the
            task's form.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CatsparseError(f"{path} is not UTF-8 text; convert it first") from error
    except OSError as error:
        raise CatsparseError(f"cannot read {path}: {shorten(error, 200)}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut inside strings
        if line.strip():
            where = f"{path}, line {number}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise CatsparseError(f"{where} must hold a JSON object")
            rows.append((row, _FORMS[name][1](row, where)))
    if not rows:
        raise CatsparseError(f"{path} holds no example; give another file")
    examples = _in_turn(rows) if name == "blimp" else [example for _, example in rows]
    return LocalTask(name, examples[:limit], hashlib.sha256(raw).hexdigest())


def _in_turn(rows: list[tuple[Row, Example]]) -> list[Example]:
    """The first example of each part, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for row, example in rows:
        turns.append((seen[row["task"]], example))
        seen[row["task"]] += 1
    return [example for _, example in sorted(turns, key=lambda turn: turn[0])]


def judge_task(task: LocalTask, scores: Sequence[Score], truncated: int) -> Outcome:
    """Accuracy of ``task`` from the scores of all its pairs, in order."""
    rest = iter(scores)
    answered = [(example, [next(rest) for _ in example.pairs]) for example in task.examples]
    right = [_right(example, found) for example, found in answered]
    metrics = _mean("acc", right)
    if all(example.lengths is not None for example in task.examples):
        metrics |= _mean("acc_norm", [_right_by_length(e, found) for e, found in answered])
    if all(example.gold is None for example in task.examples):
        losses = torch.tensor([-found[0].logprob for _, found in answered], dtype=torch.float64)
        perplexity = math.exp(min(float(losses.mean()), 700.0))
        metrics |= {"perplexity": perplexity}
        metrics |= _finite("perplexity_stderr", perplexity * standard_error(losses))
    return Outcome("acc", metrics, right, len(right), truncated)


def _right(example: Example, scores: list[Score]) -> float:
    if example.gold is None:
        return float(scores[0].greedy)
    return float(_largest(score.logprob for score in scores) == example.gold)


def _right_by_length(example: Example, scores: list[Score]) -> float:
    assert example.lengths is not None
    pairs = zip(scores, example.lengths, strict=True)
    return float(_largest(score.logprob / length for score, length in pairs) == example.gold)


def _largest(values: Iterable[float]) -> int:
    """Index of the first largest value."""
    listed = list(values)
    return listed.index(max(listed))


def _mean(name: str, values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {name: float(tensor.mean())} | _finite(f"{name}_stderr", standard_error(tensor))


def _finite(name: str, value: float) -> dict[str, float]:
    return {name: value} if math.isfinite(value) else {}


def _text(row: Row, key: str, where: str) -> str:
    value = _field(row, key, where)
    if not isinstance(value, str) or not value.strip():
        raise CatsparseError(f"{where}: {key!r} must be a text that is not empty")
    return value


def _texts(row: Row, key: str, where: str) -> list[str]:
    values = _field(row, key, where)
    if (
        not isinstance(values, list)
        or len(values) < 2
        or not all(isinstance(value, str) and value.strip() for value in values)
    ):
        raise CatsparseError(f"{where}: {key!r} must list at least two texts, none of them empty")
    return values


def _gold(row: Row, choices: int, where: str) -> int:
    value = _field(row, "gold", where)
    if type(value) is not int or not 0 <= value < choices:
        raise CatsparseError(
            f"{where}: 'gold' must be the index of a choice, 0 to {choices - 1}, not "
            f"{shorten(value)!r}"
        )
    return value


def _field(row: Row, key: str, where: str) -> object:
    if key not in row:
        has = shorten(", ".join(sorted(map(str, row)))) or "none"
        raise CatsparseError(f"{where} has no {key!r} (it has {has}); see docs/quality.md")
    value: object = row[key]
    return value
