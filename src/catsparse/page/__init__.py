"""The report: one HTML page about a sparse model's folder, complete in itself.

Style, script and data stand in the page; it asks nothing of any network, and its own policy forbids
it to. What comes from files reaches it as data only: as JSON in a block that is not run, shown as
text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CatsparseError
from ..files import write_atomic
from .payload import gather

ASSETS = Path(__file__).parent / "assets"
# In this order they are one script.
SCRIPTS = (
    "base.js",
    "plot.js",
    "controls.js",
    "activations.js",
    "layers.js",
    "quality.js",
    "accuracy.js",
    "speed.js",
    "start.js",
)


def write_page(
    directory: str | Path,
    output: str | Path | None = None,
    rows: Sequence[str | Path] = (),
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Write the page about a sparse model's folder, atomically.

    Args:
        directory: written by ``catsparse sparsify`` or :func:`catsparse.save`.
        output: the file to write; default ``report.html`` in the folder.
        rows: files with rows of ``catsparse compare``, ``evaluate`` (both also with ``--tasks``)
            and ``bench``.
        progress: show a progress bar on stderr.

    Returns:
        The file's path, and the payload that it shows.

    Raises:
        CatsparseError: what :func:`catsparse.page.payload.gather` refuses, or the file cannot be
            written.
    """
    payload = gather(directory, rows, progress)
    path = Path(directory) / "report.html" if output is None else Path(output)
    text = render(payload)
    try:
        write_atomic(path, lambda temporary: _write(temporary, text))
    except OSError as error:
        raise CatsparseError(f"cannot write {path}: {error.strerror}") from error
    return path, payload


def render(payload: dict[str, Any]) -> str:
    """The page, the same text for the same payload."""
    style = _asset("style.css")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src {_hashed(style)}; script-src {_hashed(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    values = {
        "title": html.escape(f"{payload['model']['name']}, {payload['model']['described']}"),
        "policy": html.escape(policy),
        "style": style,
        "data": _inert(payload),
        "script": script,
    }
    # In one pass: a value that looks like a mark of the template stays what it is.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _hashed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _inert(payload: dict[str, Any]) -> str:
    """JSON in which no string can end the script block, or begin a comment or another tag."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
