"""A conversation's prompt: by the model's chat template or, where it has none, as plain text."""

from __future__ import annotations

from typing import Any

Turn = dict[str, str]


def has_template(tokenizer: Any) -> bool:
    """Whether the model was taught turns."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_turns(tokenizer: Any, turns: list[Turn]) -> list[int]:
    """The token ids that an answer to ``turns`` (of system, user and assistant) goes on from.

    Raises:
        jinja2.TemplateError: the chat template refuses the conversation.
    """
    if not has_template(tokenizer):
        plain: list[int] = tokenizer(plain_text(turns))["input_ids"]
        return plain
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    ids: list[int] = encoded["input_ids"]
    return ids


def plain_text(turns: list[Turn]) -> str:
    """The turns one after the other; the user's own text as it is, each other on a line."""
    return "".join(t["content"] if t["role"] == "user" else _line(t["content"]) for t in turns)


def _line(text: str) -> str:
    return text.rstrip("\n") + "\n"
