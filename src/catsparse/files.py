"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
