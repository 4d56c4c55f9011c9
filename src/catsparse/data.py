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
from contextlib import contextmanager
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


def read_rows(source: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row of a table or dataset with all its columns, and where it stands.

    Args:
        source: ``.jsonl`` (also ``.xz``, ``.gz``), ``.parquet``, or the name of a Hugging Face
            dataset.

    Raises:
        CatsparseError: the source cannot be read, or a row is no object.
    """
    path, name = Path(source), str(source)
    suffixes = [s for s in path.suffixes if s not in (".xz", ".gz")]
    if not _exists(path) and suffixes[-1:] not in ([s] for s in _TABLE_SUFFIXES):
        rows: Iterable[tuple[object, str]] = _dataset_rows(name)
    elif not path.is_file():
        raise CatsparseError(f"there is no file {source}; check the path")
    elif suffixes[-1:] == [".parquet"]:
        rows = _parquet_rows(path, None)
    else:
        rows = _json_rows(path)
    for row, where in rows:
        if not isinstance(row, dict):
            raise CatsparseError(f"{where} is no JSON object with columns")
        yield row, where


def is_table(source: str | Path) -> bool:
    """Whether ``source`` has rows with columns, by its name: a table's, or a dataset's."""
    path = Path(source)
    suffixes = [s for s in path.suffixes if s not in (".xz", ".gz")]
    return suffixes[-1:] in ([s] for s in _TABLE_SUFFIXES) or not (
        _exists(path) or path.suffix in _TEXT_SUFFIXES
    )


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
    if kind == ".parquet":
        for row, where in _parquet_rows(path, column):
            yield _cell(row, column, where)
    elif kind == ".jsonl":
        for value, where in _json_rows(path):
            yield _cell(value, column, where)
    else:
        with _opened(path) as file:
            yield from _plain(file)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # longer than a file system takes, or with a null byte
        return False


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Says so in one sentence where reading fails inside the ``with`` block."""
    try:
        with _open(path) as file:
            yield file
    except UnicodeDecodeError as error:
        raise CatsparseError(f"{path} is not UTF-8 text; convert it first") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CatsparseError(f"cannot read {path}: {shorten(error, 200)}") from error


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


def _json_rows(path: Path) -> Iterator[tuple[object, str]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CatsparseError(f"{where}: not JSON") from error
            yield row, where


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    """With one column, or all if that is None."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CatsparseError("reading .parquet needs pip install 'catsparse[data]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column is not None and column not in file.schema_arrow.names:
            _cell(dict.fromkeys(file.schema_arrow.names), column, str(path))
        for batch in file.iter_batches(columns=None if column is None else [column]):
            for row in batch.to_pylist():
                yield row, str(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CatsparseError(f"cannot read {path}: {shorten(error)}") from error


def _dataset(name: str, column: str) -> Iterator[str]:
    for row, where in _dataset_rows(name):
        yield _cell(row, column, where)


def _dataset_rows(name: str) -> Iterator[tuple[object, str]]:
    try:
        import datasets
    except ImportError as error:
        raise CatsparseError(
            f"there is no file {name}; to read a Hugging Face dataset of that name, "
            "pip install 'catsparse[data]'"
        ) from error
    repository, _, config = name.partition(":")
    try:
        rows = iter(
            datasets.load_dataset(repository, config or None, split="train", streaming=True)
        )
    except Exception as error:
        raise _unreadable(name, error) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(name, error) from error
        yield row, name


def _unreadable(name: str, error: Exception) -> CatsparseError:
    """datasets raises many kinds: network, parsing, unknown names."""
    return CatsparseError(
        f"there is no file or dataset {shorten(name)} to be read ({shorten(error, 200)})"
    )


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
