"""Strict JSON: what a file holds is what its dataclass says, or one sentence says why not."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import fields
from typing import Any

from .errors import CatsparseError


def shorten(value: object, limit: int = 80) -> str:
    """``value`` as one short printable line: what a file or a caller gave may be anything."""
    text = " ".join(str(value)[: 4 * limit].split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def first_sentence(error: Exception) -> str:
    """What another library says, cut to its first sentence and to one printable line."""
    sentence = re.split(r"[.!?]\s", str(error).strip() + " ", maxsplit=1)[0]
    return shorten(sentence, 200) or type(error).__name__


def parse_json(text: str, source: str) -> object:
    """Strict JSON: no NaN, no infinity.

    Raises:
        CatsparseError: it is not JSON, or nested too deeply.
    """
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CatsparseError(
            f"{source} is not readable JSON ({shorten(error)}); save it again"
        ) from error
    return value


def build(cls: type, raw: object, where: str) -> Any:
    """Build dataclass ``cls`` from parsed JSON, refusing unknown, missing and ill-typed keys.

    Fields may be primitives, dataclasses, lists of primitives, dicts of dataclasses by name, and
    each of them or None.

    Raises:
        CatsparseError: the JSON is something else.
    """
    if not isinstance(raw, dict):
        raise CatsparseError(f"{where} must be a JSON object, not {type(raw).__name__}")
    known = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(set(raw) - set(known)):
        shown = ", ".join(repr(key[:40]) for key in unknown[:3])
        raise CatsparseError(
            f"{where} has unknown keys ({shown}{', ...' if len(unknown) > 3 else ''}); "
            "remove them or upgrade catsparse"
        )
    if missing := sorted(set(known) - set(raw)):
        raise CatsparseError(f"{where} lacks {', '.join(missing)}; save it again")
    hints = typing.get_type_hints(cls)
    values = {
        name: _value(hints[name], value, f"{where}: {name}", known[name])
        for name, value in raw.items()
    }
    return cls(**values)


def _value(hint: Any, value: object, where: str, shown: str) -> Any:
    """``value`` as a field of type ``hint``, which is written ``shown``."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        (hint,) = (part for part in hint.__args__ if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type", hint), value, where)
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise CatsparseError(f"{where} must be a JSON object")
        part = typing.get_args(hint)[1]
        return {key: build(part, v, f"{where}: {shorten(key)}") for key, v in value.items()}
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise CatsparseError(f"{where} must be a list, not {shorten(value)!r}")
        part = typing.get_args(hint)[0]
        return tuple(_value(part, v, where, part.__name__) for v in value)
    kinds = (int, float) if hint is float else (hint,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and hint is not bool):
        raise CatsparseError(f"{where} must be {shown}, not {shorten(value)!r}")
    return _number(value, where) if hint is float else value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise CatsparseError(f"{where} is not a finite number; save it again")
    return number
