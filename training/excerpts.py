"""Make the calibration and held-out texts that ship beside the bundled model."""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path

from books import Book, read_books


def excerpt(book: Book, size: int, rng: random.Random) -> str | None:
    """About `size` characters of whole paragraphs of prose, or None where the book has none."""
    paragraphs = book.text.split("\n\n")
    # The first and last tenth hold prefaces, contents and notes more often than the rest.
    first, last = len(paragraphs) // 10, len(paragraphs) * 9 // 10
    for _ in range(20):
        start = rng.randrange(first, max(first, last) + 1)
        chosen: list[str] = []
        length = 0
        while length < size and start + len(chosen) < last:
            chosen.append(paragraphs[start + len(chosen)])
            length += len(chosen[-1]) + 2
        # Verse, plays and tables come in short paragraphs.
        if length >= size and length / len(chosen) > 160 and length < 1.3 * size:
            return "\n\n".join(chosen).strip()
    return None


def excerpts(books: Iterable[Book], total: int, size: int, seed: int) -> tuple[str, list[str]]:
    """Excerpts of different books, by different authors while those last; and the titles."""
    rng = random.Random(seed)
    shuffled = list(books)
    rng.shuffle(shuffled)
    seen: set[str] = set()
    fresh: list[Book] = []
    repeated: list[Book] = []
    for book in shuffled:
        (repeated if book.author in seen else fresh).append(book)
        seen.add(book.author)
    parts: list[str] = []
    titles: list[str] = []
    length = 0
    for book in fresh + repeated:
        part = excerpt(book, size, rng)
        if part is not None and length < total:
            parts.append(part)
            titles.append(book.title)
            length += len(part.encode()) + 2
    return "\n\n".join(parts) + "\n", titles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="training books (.txt or .xz)")
    parser.add_argument("--valid", type=Path, required=True, help="held-out books")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two texts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, source, total, size in (
        ("calibration.txt", args.data, 300_000, 10_500),
        ("heldout.txt", args.valid, 100_000, 12_000),
    ):
        text, titles = excerpts(read_books(source), total, size, args.seed)
        (args.out / name).write_bytes(text.encode())
        print(f"{name}: {len(text.encode()):,} bytes of {len(titles)} books: {', '.join(titles)}")


if __name__ == "__main__":
    main()
