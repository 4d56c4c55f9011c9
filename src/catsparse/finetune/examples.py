"""What a model is trained on: windows of text, or conversations of which the answers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batches import Batch
from ..data import is_table, load_windows, read_rows
from ..errors import CatsparseError
from ..strict_json import first_sentence, shorten

MESSAGES = "messages"
IGNORED = -100  # a label that no loss is taken of


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        ids: ``[L]`` int64 tokens.
        labels: ``[L]`` int64, the same, or -100 where predicting the token does not count.
    """

    ids: Tensor
    labels: Tensor


class Examples(Sequence[Example]):
    """Sequences to train on, in a form that transformers' Trainer takes.

    Args:
        examples: in order.
        name: of where they came from.
        table: whether they are rows of a table, each by itself, and no windows of running text.
    """

    def __init__(self, examples: Sequence[Example], name: str, table: bool = False) -> None:
        self.examples, self.name, self.table = list(examples), name, table

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def split(self, held_out: int) -> tuple[Examples, Examples]:
        """All but the last ``held_out``, and these.

        Raises:
            CatsparseError: nothing would be left to train on.
        """
        if held_out >= len(self):
            raise CatsparseError(
                f"{self.name} holds {len(self)} sequences, too few to hold {held_out} of them out; "
                "give more text, or other text to measure on (--heldout)"
            )
        cut = len(self) - held_out
        parts = self.examples[:cut], self.examples[cut:]
        return Examples(parts[0], self.name, self.table), Examples(parts[1], self.name, self.table)

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    def first(self, tokens: int) -> Examples:
        """As many from the start as hold so many tokens."""
        seen, count = 0, 0
        while count < len(self) and seen < tokens:
            seen += len(self.examples[count].ids)
            count += 1
        return Examples(self.examples[:count], self.name, self.table)

    def windows(self) -> Tensor:
        """``[N, L]`` token ids; the sequences must be alike in length, as text's are."""
        return torch.stack([example.ids for example in self.examples])

    def data(self, size: int) -> Tensor | list[Batch]:
        """What :func:`catsparse.calibrate` takes: windows of text, padded batches of others."""
        return self.batches(size) if self.table else self.windows()

    def batches(self, size: int) -> list[Batch]:
        """In order, padded; for a model's forward."""
        parts = [self.examples[start : start + size] for start in range(0, len(self), size)]
        batches = [collate(part) for part in parts]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def windows_as_examples(windows: Tensor, name: str) -> Examples:
    """Each row of ``[N, L]`` token ids, every token of which counts."""
    return Examples([Example(row, row) for row in windows], name)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch ``[B, L]``, padded at the end of shorter sequences; neither padding nor the first
    token, which nothing foretells, has a label."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n], labels[row, 1:n], mask[row, :n] = example.ids, example.labels[1:], 1
    batch = {"input_ids": ids, "labels": labels}
    # Without padding there is no mask: attention is then plainly causal.
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


def load_examples(
    source: str | Path,
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    column: str = "text",
    name: str | None = None,
) -> Examples:
    """Read ``source``: conversations where its rows have ``messages`` and no ``column``, else text.

    Args:
        source: what :func:`catsparse.data.load_windows` takes.
        tokenizer: of the model; conversations need its chat template.
        tokens: how many to take at most; a conversation is taken whole.
        seq_len: length of text windows, and the most tokens of a conversation.
        seed: of the order of documents of text; conversations come in order.
        column: the text column of tables.
        name: what the text is called in the artifact; None for ``source``.

    Raises:
        CatsparseError: the source cannot be read or holds too little, a conversation is longer than
            ``seq_len``, or it is not one.
    """
    if is_table(source):
        first = next(iter(read_rows(source)), None)
        if first is None:
            raise CatsparseError(f"{source} holds no row; give a file with text")
        if column == MESSAGES or (MESSAGES in first[0] and column not in first[0]):
            found = _conversations(source, tokenizer, tokens, seq_len)
            return Examples(found, name or str(source), table=True)
    windows = load_windows(
        source, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed, column=column
    )
    return windows_as_examples(windows, name or str(source))


def _conversations(source: str | Path, tokenizer: Any, tokens: int, seq_len: int) -> list[Example]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CatsparseError(
            f"{source} holds conversations, and the model's tokenizer has no chat template; take "
            "the model's chat version, or data with a text column"
        )
    found: list[Example] = []
    total = 0
    for row, where in read_rows(source):
        if MESSAGES not in row:
            raise CatsparseError(
                f"{where} has no column {MESSAGES!r} (it has {shorten(', '.join(sorted(row)))}); "
                "every row must be a conversation"
            )
        example = chat_example(tokenizer, row[MESSAGES], where)
        if len(example.ids) > seq_len:
            raise CatsparseError(
                f"{where} has {len(example.ids):,} tokens, more than the {seq_len:,} that a "
                "sequence may have; shorten or leave out the row, or raise --seq-len up to the "
                "model's context"
            )
        found.append(example)
        total += len(example.ids)
        if total >= tokens:
            break
    return found


def chat_example(tokenizer: Any, messages: object, where: str) -> Example:
    """A conversation through the tokenizer's chat template; only what the assistant says counts.

    A template that marks its ``{% generation %}`` tells that by itself; of others the turns are
    found by writing the conversation up to each.

    Args:
        tokenizer: with a chat template.
        messages: objects with ``role`` and ``content``.
        where: for errors.

    Raises:
        CatsparseError: these are no messages, the template refuses them, or no answer is found.
    """
    turns = _checked(messages, where)
    try:
        if (
            "{% generation" in tokenizer.chat_template
            or "{%- generation" in tokenizer.chat_template
        ):
            written = tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, counts = list(written["input_ids"]), list(written["assistant_masks"])
        else:
            ids, counts = _by_turns(tokenizer, turns, where)
    except CatsparseError:
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise CatsparseError(
            f"{where}: the chat template refuses the conversation ({first_sentence(error)}); "
            "leave out the row"
        ) from error
    if not any(counts[1:]):  # nothing foretells the first token
        raise CatsparseError(f"{where} holds no answer of the assistant; leave out the row")
    tokens = torch.tensor(ids)
    return Example(tokens, torch.where(torch.tensor(counts) > 0, tokens, IGNORED))


def _by_turns(
    tokenizer: Any, turns: list[dict[str, str]], where: str
) -> tuple[list[int], list[int]]:
    def write(part: list[dict[str, str]], prompt: bool = False) -> list[int]:
        written = tokenizer.apply_chat_template(
            part, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        return list(written["input_ids"])

    ids = write(turns)
    counts = [0] * len(ids)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = write(turns[:i], prompt=True) if i else []
        upto = write(turns[: i + 1])
        if ids[: len(upto)] != upto or upto[: len(start)] != start:
            raise CatsparseError(
                f"{where}: the chat template writes turn {i + 1} otherwise once others follow, so "
                "answers cannot be told apart; mark them in the template with {% generation %}, or "
                "split the conversation"
            )
        counts[len(start) : len(upto)] = [1] * (len(upto) - len(start))
    return ids, counts


def _checked(messages: object, where: str) -> list[dict[str, str]]:
    turns = list(messages) if isinstance(messages, list | tuple) else []
    for turn in turns:
        parts = [turn.get(key) for key in ("role", "content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            turns = []
            break
    if not turns:
        raise CatsparseError(
            f"{where}: {MESSAGES!r} must be a list of objects with 'role' and 'content' as text"
        )
    return turns
