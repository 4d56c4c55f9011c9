"""A conversation with a model: its turns, the prompt they make, and how each answer went."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor

from .dropped import Dropped, measure
from .errors import CatsparseError
from .prompts import Turn, encode_turns, has_template
from .strict_json import first_sentence
from .surgery import run_dense, sparse_layers
from .text import Show, TextGenerator, Written


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: as it is kept in the conversation.
        written: its tokens and times.
        dropped: what the whole conversation drops (see :func:`catsparse.dropped.measure`); None if
            the model ran dense or Ctrl-C stopped the count.
        forgotten: how many old messages made room for this one.
    """

    text: str
    written: Written
    dropped: Dropped | None
    forgotten: int


class Chat:
    """A conversation, in the model's chat template or, where it has none, as plain text.

    When the context is full the oldest question and answer are forgotten, never the system text.
    """

    def __init__(self, writer: TextGenerator, system: str | None = None) -> None:
        self.writer, self.system = writer, system
        self.dense = False
        self.turns: list[Turn] = []
        self.context = 0
        self.is_sparse = bool(sparse_layers(writer.model))
        self.has_template = has_template(writer.tokenizer)
        config = writer.model.config.get_text_config()
        self.limit: int | None = getattr(config, "max_position_embeddings", None)
        if self.limit is not None and writer.tokens >= self.limit:
            raise CatsparseError(
                f"answers of {writer.tokens} tokens do not fit into the model's context of "
                f"{self.limit}; give fewer with --tokens"
            )
        if system is not None:
            self._fit([_turn("user", "?")])  # whatever is wrong with it, now and not later

    @property
    def messages(self) -> list[Turn]:
        """The system text, if there is one, and the turns."""
        return self._with_system(self.turns)

    def clear(self) -> None:
        """Forget the conversation; the system text stays."""
        self.turns, self.context = [], 0

    def say(self, message: str, show: Show | None = None) -> Answer:
        """Answer ``message``; ``show`` gets the text as it comes.

        Ctrl-C ends the answer and what came of it is kept; if nothing came, neither is the
        message. What was dropped is measured afterwards, by running the conversation once more,
        so that counting does not slow the answer.

        Raises:
            CatsparseError: the message is empty or does not fit into the context.
        """
        if not message.strip():
            raise CatsparseError("the message is empty; give some text")
        turns, ids = self._fit([*self.turns, _turn("user", message)])
        room = None if self.limit is None else self.limit - ids.shape[1]
        tokens = self.writer.tokens if room is None else min(room, self.writer.tokens)
        with run_dense(self.writer.model) if self.dense else nullcontext():
            written = self.writer.write_ids(ids, show, tokens, keep_partial=True)
        text = written.text.strip() if self.has_template else written.text
        if not written.tokens:
            return Answer(text, written, None, 0)
        forgotten = len(self.turns) + 1 - len(turns)
        self.turns = [*turns, _turn("assistant", text)]
        self.context = len(written.ids)
        return Answer(text, written, self._measure(written.ids), forgotten)

    def _measure(self, ids: Tensor) -> Dropped | None:
        if self.dense or not self.is_sparse:
            return None
        try:
            return measure(self.writer.model, ids)
        except KeyboardInterrupt:  # the answer is complete, only its count is given up
            return None

    def _fit(self, turns: list[Turn]) -> tuple[list[Turn], Tensor]:
        """The latest turns that leave room for an answer, and their tokens ``[1, T]``."""
        while True:
            ids = self._encode(turns)
            if self.limit is None or ids.shape[1] + self.writer.tokens <= self.limit:
                return turns, ids
            if len(turns) == 1:
                break
            turns = turns[2:]
        if ids.shape[1] >= self.limit:
            raise CatsparseError(
                f"the message makes a prompt of {ids.shape[1]} tokens, the model's context has "
                f"{self.limit}; send less text"
            )
        return turns, ids  # a shorter answer fits

    def _encode(self, turns: list[Turn]) -> Tensor:
        try:
            ids = encode_turns(self.writer.tokenizer, self._with_system(turns))
        except TemplateError as error:
            reason = first_sentence(error)
            remedy = "start again with /clear" if self.system is None else "leave out --system"
            raise CatsparseError(
                f"the model's chat template refuses the conversation ({reason}); {remedy}"
            ) from error
        return torch.tensor([ids])

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        return turns if self.system is None else [_turn("system", self.system), *turns]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
