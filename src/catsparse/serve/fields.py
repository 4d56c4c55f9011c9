"""Checks of a request's fields, each with an error that names the field."""

from __future__ import annotations

import json
import math
from typing import Any

from .errors import bad_request

Body = dict[str, Any]


def parse_body(raw: bytes) -> Body:
    """The JSON object in ``raw``; strict JSON, so no NaN."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)[:200]
        raise bad_request(f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object", code="invalid_json")
    return body


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def refuse_unknown(body: Body, known: set[str]) -> None:
    for name in body:
        if name not in known:
            shown = name[:80]
            raise bad_request(f"unknown field {shown!r}", shown, "unknown_parameter")


def refuse(body: Body, harmless: dict[str, tuple[Any, ...]]) -> None:
    """Refuse fields that are not served, unless they ask for what comes anyway."""
    for name, values in harmless.items():
        value = body.get(name)
        if value is not None and not any(value is v or value == v for v in values):
            raise bad_request(f"{name} is not supported here", name, "unsupported_parameter")


def boolean(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false", name)
    return value


def whole(body: Body, name: str, low: int, high: int | None = None) -> int | None:
    """An integer, or None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_request(f"{name} must be an integer", name)
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise bad_request(f"{name} must be {limits}", name)
    return value


def number(body: Body, name: str, low: float, high: float, above: bool = False) -> float | None:
    """A finite number from ``low`` (or only above it) to ``high``; None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise bad_request(f"{name} must be a number", name)
    if not (low <= value <= high) or not math.isfinite(value) or (above and value == low):
        limits = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise bad_request(f"{name} must be {limits}", name)
    return float(value)


def text(value: object, name: str) -> str:
    """A string that has a UTF-8 form: half a surrogate pair has none."""
    if not isinstance(value, str):
        raise bad_request(f"{name} must be a string", name)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request(f"{name} holds half a character", name) from None
    return value


def stops(body: Body) -> tuple[str, ...]:
    """The texts that end an answer: none, one or up to four."""
    value = body.get("stop")
    if value is None:
        return ()
    several = value if isinstance(value, list) else [value]
    if len(several) > 4:
        raise bad_request("stop takes up to 4 strings", "stop")
    found = tuple(text(one, "stop") for one in several)
    if any(not one or len(one) > 1000 for one in found):
        raise bad_request("a stop must have from 1 to 1000 characters", "stop")
    return found


def biases(body: Body, vocabulary: int) -> dict[str, float] | None:
    """``logit_bias``: token ids as strings, and numbers."""
    value = body.get("logit_bias")
    if not value:
        return None
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad_request("logit_bias must be an object of up to 1024 tokens", "logit_bias")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise bad_request(f"logit_bias: {key[:40]!r} is no token of this model", "logit_bias")
        number(value, key, -100, 100)
    return {key: float(bias) for key, bias in value.items() if bias is not None}


def messages(body: Body) -> list[dict[str, Any]]:
    """The turns: system (or developer), user and assistant, of text."""
    value = body.get("messages")
    if not isinstance(value, list) or not value:
        raise bad_request("messages must be a list of at least one message", "messages")
    return [_message(one, f"messages[{i}]") for i, one in enumerate(value)]


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"{where} must be an object", where)
    role = value.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise bad_request(f"{where}.role must be system, user or assistant", f"{where}.role")
    if value.get("tool_calls") or value.get("function_call"):
        raise bad_request(f"{where}: tools are not supported here", where, "unsupported_parameter")
    content = value.get("content")
    if isinstance(content, list):
        parts = [_part(one, f"{where}.content[{i}]") for i, one in enumerate(content)]
        return {"role": role, "content": parts}
    return {"role": role, "content": text(content, f"{where}.content")}


def _part(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise bad_request(f"{where} must be of type text", where, "unsupported_content")
    return {"type": "text", "text": text(value.get("text"), f"{where}.text")}


def prompt(body: Body, vocabulary: int) -> str | list[int]:
    """One text, or the token ids of one."""
    value = body.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, list) and value:
        for one in value:
            if isinstance(one, (str, list)):
                raise bad_request("prompt must be one prompt; send several requests", "prompt")
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocabulary:
                raise bad_request("prompt must hold ids of this model's tokens", "prompt")
        return value
    return text(value, "prompt")
