"""A tokenizer whose tokens are letters, small enough for the models of :mod:`tiny`."""

from __future__ import annotations

from typing import Any


class Letters:
    """One id of 3 to 63 for each character; 1 begins a text if ``begins``. A double letter is one
    token, so that a text's tokens need not be those of its two parts."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    model_max_length = 10**30

    def __init__(self, begins: bool = False) -> None:
        self.begins = begins

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [1] if self.begins and add_special_tokens else []
        at = 0
        if text.startswith("<s>"):
            ids, at = [*ids, 1], 3
        while at < len(text):
            double = text[at : at + 2] == text[at] * 2
            ids.append(3 + (ord(text[at]) * (7 if double else 1)) % 61)
            at += 2 if double else 1
        return ids

    def __call__(self, texts: list[str], verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def decode(self, token: int) -> str:
        return {1: "<s>", 2: "</s>"}[token]
