"""Rows of results: their jsonl file, and what tells one result from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CatsparseError
from .files import write_atomic
from .strict_json import parse_json, shorten
from .surgery import base_model_of


def read_lines(path: Path) -> Iterator[tuple[object, str]]:
    """Each line's JSON value, and where it stands; nothing if there is no such file.

    Raises:
        CatsparseError: the file cannot be read, or a line is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CatsparseError(f"cannot read {path}: {shorten(error, 200)}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield parse_json(line, where), where


def add_row(path: Path, row: Any) -> None:
    """Put ``row``, a dataclass, at the end of the file, which is replaced as a whole.

    Raises:
        CatsparseError: it cannot be written.
    """
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        text = old + ("" if not old or old.endswith("\n") else "\n") + json.dumps(asdict(row))
        write_atomic(path, lambda temporary: _write(temporary, text + "\n"))
    except OSError as error:
        raise CatsparseError(f"cannot write {path}: {shorten(error, 200)}") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def key_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Of the names, shapes, dtypes and up to 256 values of each parameter: enough to tell a
    fine-tuned model from what it was. Values that cannot be read here are left out."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        data = parameter.data
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        if type(data) is Tensor and data.device.type != "meta" and data.numel():
            flat = data.reshape(-1)
            digest.update(
                flat[:: max(1, flat.numel() // 256)][:256].double().cpu().numpy().tobytes()
            )
    return digest.hexdigest()


def tokens_digest(windows: Tensor) -> str:
    """Of token ids ``[N, L]`` and their arrangement in windows."""
    digest = hashlib.sha256(repr(tuple(windows.shape)).encode())
    digest.update(windows.long().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_name(model: Any) -> str:
    """A hub's name as it is, of a folder its last part: rows are for other machines, too."""
    base = base_model_of(model)
    name = "" if base is None else base.name_or_path
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__
