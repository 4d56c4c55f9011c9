"""Tokens to text as they come: a piece is shown as soon as its characters are whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Tokens decoded again with each new one: enough to know its spaces and to complete a character.
_WINDOW = 6


class TextStream:
    """The text of the tokens added after ``prompt``, in pieces."""

    def __init__(self, tokenizer: Any, prompt: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt)
        # Text up to _read is shown; from _from on it is decoded again, as context.
        self._from, self._read = max(len(self.ids) - _WINDOW, 0), len(self.ids)

    def add(self, ids: Iterable[int]) -> str:
        """What can be shown now that ``ids`` have come; empty in the middle of a character."""
        self.ids += ids
        return self._advance(whole=True)

    def rest(self) -> str:
        """What is left, even half a character."""
        return self._advance(whole=False)

    def _advance(self, whole: bool) -> str:
        before = self._decode(self.ids[self._from : self._read])
        after = self._decode(self.ids[self._from :])
        piece = after[len(before) :]
        if not piece or (whole and after.endswith("\ufffd")):
            return ""
        self._from, self._read = max(len(self.ids) - _WINDOW, self._from), len(self.ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
