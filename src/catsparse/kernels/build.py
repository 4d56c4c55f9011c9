"""Compile a C source of this package on first use, for this machine, into the user's cache.

Nothing is compiled when the package is installed. The cache is ``$CATSPARSE_CACHE``, else
``$XDG_CACHE_HOME/catsparse``, else ``~/.cache/catsparse``; where none can be written to, the
library lives in a private temporary folder until the process ends. The name of the file holds a
hash of sources, compiler, options and processor, so a cache shared between machines is safe.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger("catsparse")

# gnu11, as c11 turns fused multiply-add off. Neither flag reorders a sum: results stay the same
# on every machine that rounds alike.
FLAGS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
_TIMEOUT = 120.0
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_SECTION_HEADERS = ((40, 48), (58, 60), (60, 62))  # e_shoff, e_shentsize, e_shnum of an ELF header


@dataclass(frozen=True)
class Library:
    """A loaded library (``handle``), or None and why there is none (``reason``)."""

    handle: ctypes.CDLL | None
    reason: str


@functools.cache
def load_library(source: Path) -> Library:
    """Compile ``source`` unless a cached library serves, and load it; at most once a process.

    Never raises for a machine that cannot: it logs one line and says why.
    """
    reasons = []
    for compiler in find_compilers():
        try:
            key = _key(source, compiler)
            for folder in cache_folders():
                path = folder / f"{source.stem}-{key}.so"
                try:
                    handle = _load(path) if path.exists() else None
                    if handle is None:
                        _compile(source, compiler, path)
                        handle = _load(path)
                except OSError as error:  # a full disk, say: the next folder may be another one
                    reasons.append(str(error))
                    continue
                if handle is not None:
                    return Library(handle, f"{path}, built by {compiler[0]}")
                reasons.append(f"{path} does not load")
        except _CannotBuildError as error:
            reasons.append(str(error))
    reason = "; ".join(reasons) or "no C compiler: install gcc or clang"
    log.warning("no CPU kernel (%s); sparse layers run as dense torch matmuls", reason)
    return Library(None, reason)


class _CannotBuildError(Exception):
    """Why there is no library, in words."""


def find_compilers() -> list[list[str]]:
    """``$CC`` if set, else those of cc, gcc and clang that are there; each starts a command."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return [named]
    return [[name] for name in ("cc", "gcc", "clang") if shutil.which(name)]


def target_flags() -> tuple[str, ...]:
    """What makes the compiler use everything this processor has."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return ("-mcpu=native",) if arm else ("-march=native",)


def cache_folders() -> Iterator[Path]:
    """Where the library may live, best first; the last is made for this process only.

    A folder that cannot be written to, or whose file system forbids execution, leads to the next.
    """
    named = os.environ.get("CATSPARSE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = (Path(named) if named else Path(base) / "catsparse").expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            yield folder
    except (OSError, RuntimeError):  # a read-only or unknown home
        pass
    private = tempfile.mkdtemp(prefix="catsparse-")  # mode 0700
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    yield Path(private)


def with_headers(source: Path) -> list[Path]:
    """A C file and the files that it includes in quotes, and those that they include."""
    found = [source]
    for path in found:  # grows on the way
        named = (path.with_name(name) for name in _INCLUDE.findall(path.read_text()))
        found += [header for header in dict.fromkeys(named) if header not in found]
    return found


def _key(source: Path, compiler: list[str]) -> str:
    version = _run([*compiler, "--version"])
    texts = (path.read_text() for path in with_headers(source))
    parts = (*texts, shlex.join(compiler), version, *FLAGS, *target_flags(), _cpu())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """What identifies the processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found = [line for line in lines if line.startswith(names)]
    return "\n".join([platform.system(), platform.machine(), platform.processor(), *found])


def _compile(source: Path, compiler: list[str], path: Path) -> None:
    """Write ``path`` in one step: processes that compile at once do not see each other's half."""
    log.info("compiling %s, once, into %s", source.name, path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, *target_flags(), "-shared", "-fPIC"]
        _run([*command, str(source), "-o", name, "-lm"])
        with open(name, "rb") as written:
            os.fsync(written.fileno())  # or a crash may leave the name without the content
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CannotBuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise _CannotBuildError(f"{command[0]} failed: {lines[0].strip()[:200]}")
    return done.stdout


def _load(path: Path) -> ctypes.CDLL | None:
    _load_openmp_of_torch()
    try:
        if _is_cut_short(path):
            raise OSError("it is cut short")
        return ctypes.CDLL(str(path))
    except OSError as error:
        log.info("%s does not load (%s); compiling it again", path, error)
        return None


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its section headers, which stand last: the loader would map
    it all the same, and the first touch of what is missing ends the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # 64 bits, little-endian
        return False
    start, size, number = (int.from_bytes(head[a:b], "little") for a, b in _SECTION_HEADERS)
    return path.stat().st_size < start + size * number


@functools.cache
def _load_openmp_of_torch() -> None:
    """Share torch's thread pool: a second OpenMP runtime would fight it for the cores."""
    root = Path(torch.__file__).parent
    for folder in (root / "lib", root.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return
