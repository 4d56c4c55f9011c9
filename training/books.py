"""Reading the books: plain prose out of a text file of many Markdown books."""

import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"^# Title: *(.*)\n+## Author: *(.*)\n(?:.*\n){0,4}?-{5,}\s*", re.MULTILINE)
# Heading and quotation signs at the start of a line, emphasis, escapes, invisible characters.
_MARKUP = re.compile(r"^(?:#+|>+)[ \t]*|[*_\\\ufeff\u2060]", re.MULTILINE)


@dataclass(frozen=True)
class Book:
    title: str
    author: str
    text: str


def clean(text: str) -> str:
    """Drop Markdown signs and surplus white space; paragraphs stay apart by one empty line."""
    text = _MARKUP.sub("", text.replace("<|endofbook|>", "").replace("\r\n", "\n"))
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_books(path: Path) -> Iterator[Book]:
    """The books of a .txt or .xz file, without their title pages; a plain text is one book."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8")
    headers = list(_HEADER.finditer(text))
    if not headers:
        yield Book(path.stem, "", clean(text))
    for header, after in zip(headers, [*headers[1:], None], strict=True):
        body = text[header.end() : after.start() if after else len(text)]
        yield Book(header[1].strip(), header[2].strip(), clean(body))
