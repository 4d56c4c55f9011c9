"""The documentation: its Python blocks run, and its relative links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from catsparse import hub
from catsparse.page import render

ROOT = Path(__file__).parents[1]
WITH_CODE = ("README.md", "docs/quickstart.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
)
FENCED = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1`*[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")
SKIP = "<!-- not run -->"


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, code) of each Python block that is to be run."""
    return [
        (text.count("\n", 0, block.start(3)) + 1, block[3])
        for block in FENCED.finditer(text)
        if block[2] == "python" and not text[: block.start()].rstrip().endswith(SKIP)
    ]


def relative_links(text: str) -> list[str]:
    """Targets outside code that are neither addresses nor anchors of the page itself."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    return [
        target for target in LINK.findall(prose) if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target)
    ]


@pytest.fixture
def short_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled texts, cut to about 6,000 tokens, for speed."""
    cut = {}
    for which in ("calibration", "heldout"):
        cut[which] = tmp_path / f"{which}.txt"
        whole = hub.bundled_text(which).read_text(encoding="utf-8")
        cut[which].write_text(whole[:24_000], encoding="utf-8")
    monkeypatch.setattr(hub, "bundled_text", cut.__getitem__)


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks_run(
    page: str, short_texts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in python_blocks((ROOT / page).read_text(encoding="utf-8")):
        # Leading newlines make a traceback name the page's own lines.
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)


def test_quickstart_has_python_blocks() -> None:
    assert len(python_blocks((ROOT / "docs/quickstart.md").read_text(encoding="utf-8"))) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page: str) -> None:
    path = ROOT / page
    missing = [
        target
        for target in relative_links(path.read_text(encoding="utf-8"))
        if not (path.parent / target.partition("#")[0]).exists()
    ]
    assert not missing


def test_blocks_and_links_are_found() -> None:
    text = (
        "[a](b.md#c) [d](https://e.org) [f](#g) `[h](i.md)`\n\n"
        "```python\nx = '[j](k.md)'\n```\n\n"
        f"{SKIP}\n```python\nnever\n```\n\n```text\n[l](m.md)\n```\n[n](o.md)\n"
    )
    assert python_blocks(text) == [(4, "x = '[j](k.md)'\n")]
    assert relative_links(text) == ["b.md#c", "o.md"]


def test_the_report_page_is_that_of_today() -> None:
    """The bundled model's page as today's style and script show its data: else ``make report``."""
    page = (ROOT / "docs" / "report-default.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert render(json.loads(data[1])) == page
