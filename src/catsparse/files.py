"""Files that appear whole or not at all, and folders that they may be put into."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import CatsparseError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary)`` beside ``path``, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(default_mode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def default_mode() -> int:
    """Permissions of an ordinary new file: a temporary file's 0600 would hide a shared one."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def check_target(target: Path, merge: bool) -> None:
    """
    Raises:
        CatsparseError: nothing can be saved there, or ``catsparse.load`` would then read other
            weights.
    """
    if target.exists() and not target.is_dir():
        raise CatsparseError(f"{target} is a file; name a folder")
    if not merge and (target / "config.json").exists():
        raise CatsparseError(
            f"{target} holds a whole model, whose weights would be read instead of the base "
            "model's; name another folder, or save with merge=True (--merge)"
        )


def move_files(
    staging: Path, target: Path, first: str, last: Sequence[str], old: Iterable[Path]
) -> None:
    """Move the files of ``staging`` to ``target``, ``first`` before and ``last`` after the others,
    and remove those of ``old`` that were not written again."""
    written = {path.name for path in staging.iterdir()}
    order = {name: place for place, name in enumerate(last, 1)}
    for file in sorted(written, key=lambda name: (name != first, order.get(name, 0), name)):
        (staging / file).chmod(default_mode())
        os.replace(staging / file, target / file)
    for stale in old:
        if stale.name not in written:
            stale.unlink(missing_ok=True)
