"""Token windows from text files, tables and Hugging Face datasets.

Text is cut into documents, documents are shuffled with a seed (or kept in order), tokenized until
there are enough tokens, and packed into windows of equal length, so nothing is padding.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from .errors import CatsparseError
from .strict_json import shorten

# Documents held for shuffling, in characters: bounds memory on data sets of any size.
_MAX_CHARACTERS = 2**28
# Plain text has no documents: it is cut at a blank line about every so many characters.
_DOCUMENT_CHARACTERS = 2**14
_TEXT_SUFFIXES = (".txt", ".md", ".xz", ".gz")
_TABLE_SUFFIXES = (".jsonl", ".parquet")


def load_windows(
    source: str | Path,
    tokenizer: Any,
    *,
    tokens: int = 100_000,
    seq_len: int = 512,
    seed: int | None = 0,
    column: str = "text",
) -> Tensor:
    """Read ``source`` and pack it into windows.

    Args:
        source: ``.txt``/``.md`` (also ``.xz``, ``.gz``), ``.jsonl`` or ``.parquet`` with a text
            column, or the name of a Hugging Face dataset (``name`` or ``name:config``).
        tokenizer: a transformers tokenizer.
        tokens: how many tokens to take at most.
        seq_len: window length.
        seed: shuffles the documents; None takes them in order from the start.
        column: the text column of tables and datasets.

    Returns:
        ``[N, seq_len]`` int64 token ids, N = tokens // seq_len unless the text is shorter.

    Raises:
        CatsparseError: the source cannot be read or holds less than one window.
    """
    return pack_texts(
        _documents(str(source), column),
        tokenizer,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        name=str(source),
    )


def pack_texts(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int | None,
    name: str = "the data",
) -> Tensor:
    """Pack ``texts`` into ``[N, seq_len]`` windows; see :func:`load_windows`."""
    if seq_len < 2 or tokens < seq_len:
        raise CatsparseError(
            f"tokens ({tokens}) must be at least the window length ({seq_len}), and that at least 2"
        )
    documents: Iterable[str] = texts
    if seed is not None:
        held = list(_up_to(texts, _MAX_CHARACTERS))
        random.Random(seed).shuffle(held)
        documents = held
    separator = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    wanted = tokens // seq_len * seq_len
    for text in documents:
        piece = tokenizer(text, verbose=False)["input_ids"]
        if separator is not None and (not piece or piece[-1] != separator):
            piece = [*piece, separator]
        ids += piece
        if len(ids) >= wanted:
            break
    windows = min(len(ids), wanted) // seq_len
    if windows == 0:
        raise CatsparseError(
            f"{name} holds {len(ids)} tokens, less than one window of {seq_len}; "
            "give more text or a shorter window"
        )
    return torch.tensor(ids[: windows * seq_len]).view(windows, seq_len)


def _up_to(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _documents(source: str, column: str) -> Iterator[str]:
    path = Path(source)
    if not _exists(path):
        if path.suffix in _TEXT_SUFFIXES + _TABLE_SUFFIXES or source.startswith((".", "/", "~")):
            raise CatsparseError(f"there is no file {source}; check the path")
        yield from _dataset(source, column)
        return
    if path.is_dir():
        raise CatsparseError(f"{source} is a folder; name one file of it")
    suffixes = [s for s in path.suffixes if s not in (".xz", ".gz")]
    kind = suffixes[-1] if suffixes else ".txt"
    try:
        if kind == ".parquet":
            yield from _parquet(path, column)
            return
        with _open(path) as file:
            yield from _jsonl(file, source, column) if kind == ".jsonl" else _plain(file)
    except UnicodeDecodeError as error:
        raise CatsparseError(f"{source} is not UTF-8 text; convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CatsparseError(f"cannot read {source}: {shorten(error, 200)}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a file system takes, or with a null byte
        return False


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _plain(file: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in file:
        lines.append(line)
        size += len(line)
        if size >= _DOCUMENT_CHARACTERS and not line.strip():
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _jsonl(file: IO[str], source: str, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CatsparseError(f"{source}, line {number}: not JSON") from error
        yield _cell(row, column, f"{source}, line {number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CatsparseError("reading .parquet needs pip install 'catsparse[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            _cell(dict.fromkeys(file.schema_arrow.names), column, str(path))
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _cell({column: value}, column, str(path))
    except pyarrow.ArrowException as error:
        raise CatsparseError(f"cannot read {path}: {shorten(error)}") from error


def _dataset(name: str, column: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise CatsparseError(
            f"there is no file {name}; to read a Hugging Face dataset of that name, "
            "pip install 'catsparse[data]'"
        ) from error
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        for row in rows:
            yield _cell(row, column, name)
    except CatsparseError:
        raise
    except Exception as error:  # datasets raises many kinds: network, parsing, unknown names
        raise CatsparseError(
            f"there is no file or dataset {shorten(name)} to be read ({shorten(error, 200)})"
        ) from error


def _cell(row: object, column: str, where: str) -> str:
    names = sorted(row) if isinstance(row, dict) else []
    if column not in names:
        raise CatsparseError(
            f"{where} has no column {column!r} (it has {', '.join(names[:8]) or 'none'}); "
            "name one with --column"
        )
    value = cast("dict[str, Any]", row)[column]
    if not isinstance(value, str):
        raise CatsparseError(f"{where}: column {column!r} holds no text")
    return value
