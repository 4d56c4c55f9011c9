"""Token windows: formats, order, and one sentence for whatever cannot be read."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from catsparse import data
from catsparse.data import load_windows, pack_texts
from catsparse.errors import CatsparseError

EOS = 0


class Characters:
    """A tokenizer whose ids are code points."""

    eos_token_id: int | None = EOS

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class NoSeparator(Characters):
    eos_token_id = None


TEXTS = [f"Document {i}: " + "abcdefgh" * (i + 1) for i in range(9)]
PROSE = "".join(f"Line {i} of the text.\n" for i in range(200))


def ids(*texts: str) -> list[int]:
    return [i for text in texts for i in [*map(ord, text), EOS]]


def one_line(error: pytest.ExceptionInfo[CatsparseError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def write_jsonl(path: Path, column: str = "text") -> None:
    rows = [json.dumps({"id": i, column: text}) for i, text in enumerate(TEXTS)]
    path.write_text("\n".join([*rows[:4], "", *rows[4:]]) + "\n")  # a blank line is no row


def write_parquet(path: Path, column: str = "text") -> None:
    table = pyarrow.table({"id": range(len(TEXTS)), column: TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def pack(path: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda target: target.write_bytes(path(target.read_bytes()))


WRITERS: dict[str, tuple[Callable[[Path], Any], Callable[[bytes], bytes]]] = {
    "a.jsonl": (write_jsonl, lambda b: b),
    "a.jsonl.gz": (write_jsonl, gzip.compress),
    "a.jsonl.xz": (write_jsonl, lzma.compress),
    "a.parquet": (write_parquet, lambda b: b),
    "a.txt": (lambda p: p.write_text(PROSE), lambda b: b),
    "a.md": (lambda p: p.write_text(PROSE), lambda b: b),
    "a.txt.gz": (lambda p: p.write_text(PROSE), gzip.compress),
    "a.txt.xz": (lambda p: p.write_text(PROSE), lzma.compress),
    "a.gz": (lambda p: p.write_text(PROSE), gzip.compress),
    "name-without-suffix": (lambda p: p.write_text(PROSE), lambda b: b),
    "v1.5-notes.txt": (lambda p: p.write_text(PROSE), lambda b: b),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_in_order(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write, compress = WRITERS[name]
    write(path)
    path.write_bytes(compress(path.read_bytes()))
    documents = TEXTS if "jsonl" in name or "parquet" in name else [PROSE]
    expected = torch.tensor(ids(*documents)[:320]).view(10, 32)
    for source in (path, str(path)):
        windows = load_windows(source, Characters(), tokens=320, seq_len=32, seed=None)
        assert windows.dtype == torch.int64
        assert torch.equal(windows, expected)


def test_seed_determines_the_documents() -> None:
    def windows(seed: int | None) -> torch.Tensor:
        return pack_texts(TEXTS, Characters(), tokens=96, seq_len=32, seed=seed)

    assert torch.equal(windows(0), windows(0))
    assert not torch.equal(windows(0), windows(1))
    assert not torch.equal(windows(0), windows(None))


def test_shuffling_keeps_every_document_whole() -> None:
    total = sum(len(text) + 1 for text in TEXTS)
    windows = pack_texts(TEXTS, Characters(), tokens=total, seq_len=total, seed=3)
    assert windows.shape == (1, total)
    pieces = "".join(map(chr, windows[0].tolist())).split(chr(EOS))
    assert sorted(pieces[:-1]) == sorted(TEXTS)


def test_seed_does_not_touch_the_global_generator() -> None:
    import random

    before = random.getstate()
    pack_texts(TEXTS, Characters(), tokens=32, seq_len=32, seed=5)
    assert random.getstate() == before


def test_separator_is_not_doubled() -> None:
    texts = ["abc" + chr(EOS), "de", ""]
    windows = pack_texts(texts, Characters(), tokens=8, seq_len=8, seed=None)
    assert windows.tolist() == [[97, 98, 99, EOS, 100, 101, EOS, EOS]]


def test_tokenizer_without_separator() -> None:
    windows = pack_texts(["abc", "de"], NoSeparator(), tokens=5, seq_len=5, seed=None)
    assert windows.tolist() == [[97, 98, 99, 100, 101]]


@pytest.mark.parametrize(
    ("tokens", "seq_len", "shape"),
    [(100, 32, (3, 32)), (96, 32, (3, 32)), (32, 32, (1, 32)), (3, 2, (1, 2)), (10**6, 64, None)],
)
def test_number_of_windows(tokens: int, seq_len: int, shape: tuple[int, int] | None) -> None:
    windows = pack_texts(TEXTS, Characters(), tokens=tokens, seq_len=seq_len, seed=0)
    total = sum(len(text) + 1 for text in TEXTS)
    assert windows.shape == (shape or (total // seq_len, seq_len))


def test_no_more_text_is_read_than_needed() -> None:
    def stream():
        yield from TEXTS[:3]
        pytest.fail("read on")

    pack_texts(stream(), Characters(), tokens=32, seq_len=32, seed=None)


def test_shuffled_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_MAX_CHARACTERS", 100)

    def endless():
        for _ in range(10):
            yield "x" * 50
        pytest.fail("read on")

    windows = pack_texts(endless(), Characters(), tokens=10**6, seq_len=32, seed=0)
    assert windows.numel() <= 102


def test_plain_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "words and words\n" * 2000 + "\n"  # 32,001 characters: over one document
    path = tmp_path / "a.txt"
    path.write_text(paragraph * 2 + "the end")
    total = 2 * (len(paragraph) + 1) + len("the end") + 1
    windows = load_windows(path, Characters(), tokens=total, seq_len=total, seed=None)
    assert windows[0].tolist() == ids(paragraph, paragraph, "the end")


@pytest.mark.parametrize(("tokens", "seq_len"), [(100, 1), (100, 0), (16, 32), (0, 32), (-1, -1)])
def test_impossible_lengths(tokens: int, seq_len: int) -> None:
    with pytest.raises(CatsparseError, match="window length") as caught:
        pack_texts(TEXTS, Characters(), tokens=tokens, seq_len=seq_len, seed=0)
    one_line(caught)


@pytest.mark.parametrize("text", ["", "short"])
def test_text_shorter_than_a_window(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(CatsparseError, match="less than one window of 32") as caught:
        load_windows(path, Characters(), tokens=320, seq_len=32)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.parquet", "./none", "a.txt.xz"])
def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CatsparseError, match="there is no file") as caught:
        load_windows(name, Characters())
    assert name in one_line(caught)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(CatsparseError, match="folder") as caught:
        load_windows(tmp_path, Characters())
    one_line(caught)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_missing_column_names_those_there_are(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    path = tmp_path / ("a.jsonl" if write is write_jsonl else "a.parquet")
    write(path, "content")
    with pytest.raises(CatsparseError, match="no column 'text'") as caught:
        load_windows(path, Characters(), tokens=64, seq_len=32)
    message = one_line(caught)
    assert "content, id" in message
    assert "--column" in message
    windows = load_windows(path, Characters(), tokens=64, seq_len=32, column="content", seed=None)
    assert windows.flatten().tolist() == ids(*TEXTS)[:64]


@pytest.mark.parametrize("column", ["id", "none"])
def test_column_that_holds_no_text(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "none": [None]}), path)
    with pytest.raises(CatsparseError, match="holds no text"):
        load_windows(path, Characters(), column=column)


@pytest.mark.parametrize("line", ["{", "no json", '{"text": "a"} {"text": "b"}'])
def test_bad_json_line_is_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CatsparseError, match="line 2") as caught:
        load_windows(path, Characters())
    one_line(caught)


@pytest.mark.parametrize("line", ["[1]", "3", "null", '{"text": 3}', '{"text": null}'])
def test_json_line_without_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CatsparseError, match="line 1"):
        load_windows(path, Characters())


def test_json_line_nested_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(CatsparseError, match="line 1"):
        load_windows(path, Characters())


def damaged(compressed: bytes) -> bytes:
    return compressed[:30] + b"\xff" * 30 + compressed[60:]


LONG = b"".join(b"Line %d of a long text.\n" % i for i in range(5000))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.xz", lzma.compress(LONG)[:-40]),
        ("a.txt.xz", damaged(lzma.compress(LONG))),
        ("a.txt.xz", b"no xz at all"),
        ("a.txt.gz", gzip.compress(LONG)[:-40]),
        ("a.txt.gz", damaged(gzip.compress(LONG))),
        ("a.txt.gz", b"no gzip at all"),
        ("a.parquet", b"no parquet at all"),
        ("a.parquet", b"PAR1" + b"\0" * 64 + b"PAR1"),
        ("a.parquet", b""),
    ],
    ids=[
        *("xz cut", "xz damaged", "no xz", "gz cut", "gz damaged", "no gz"),
        *("no parquet", "parquet damaged", "parquet empty"),
    ],
)
def test_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CatsparseError, match="cannot read") as caught:
        load_windows(path, Characters(), tokens=10**6, seq_len=32)
    assert str(path) in one_line(caught)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_not_utf8(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = "Überall Ähren\n".encode("latin-1")
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(CatsparseError, match="UTF-8") as caught:
        load_windows(path, Characters())
    one_line(caught)


def test_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return ({"text": text, "label": 0} for text in TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    windows = load_windows("owner/corpus:small", Characters(), tokens=64, seq_len=32, seed=None)
    assert windows.flatten().tolist() == ids(*TEXTS)[:64]
    assert asked == [(("owner/corpus", "small"), {"split": "train", "streaming": True})]
    load_windows("corpus", Characters(), tokens=64, seq_len=32)
    assert asked[1][0] == ("corpus", None)


def test_dataset_without_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"content": "x"}])
    with pytest.raises(CatsparseError, match="corpus has no column 'text' \\(it has content\\)"):
        load_windows("corpus", Characters())


@pytest.mark.parametrize(
    "error", [ConnectionError("offline\nand more"), ValueError("unknown"), KeyError("train")]
)
def test_unknown_dataset_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CatsparseError, match="no file or dataset nonesuch") as caught:
        load_windows("nonesuch", Characters())
    one_line(caught)


def test_dataset_that_breaks_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows():
        yield {"text": "abc"}
        raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(CatsparseError, match="connection lost"):
        load_windows("corpus", Characters())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in ("corpus", tmp_path / "a.parquet"):
        with pytest.raises(CatsparseError, match=r"pip install 'catsparse\[data\]'"):
            load_windows(source, Characters())


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"], ids=["long", "null"])
def test_source_that_no_file_system_takes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [][0])
    with pytest.raises(CatsparseError):
        load_windows(name, Characters())
