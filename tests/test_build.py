"""Building a kernel on first use: what is compiled when, where it is kept, what if it cannot."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import tiny
from catsparse.kernels import build
from catsparse.kernels.build import Library, cache_folders, find_compilers

SOURCE = "int catsparse_answer(void) { return 42; }\n"
PACKAGE = Path(build.__file__).parents[1]

# What a second process does; imports the kernels without the rest of catsparse.
PROCESS = """
import sys, types
from pathlib import Path
package = types.ModuleType("catsparse")
package.__path__ = [sys.argv[1]]
sys.modules["catsparse"] = package
from catsparse.kernels.build import load_library
library = load_library(Path(sys.argv[2]))
print(library.handle and library.handle.catsparse_answer(), library.reason)
"""


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; temporary folders lie in ``tmp_path`` too."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CATSPARSE_CACHE", str(folder))
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


class Compiler:
    """A compiler of our own, named by $CC: it writes down how it is called."""

    def __init__(self, folder: Path, body: str) -> None:
        self.path, self.log = folder / "our cc", folder / "calls"
        self.path.write_text(f'#!/bin/sh\necho "$@" >> "{self.log}"\n{body}\n')
        self.path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def compiled(self) -> int:
        return sum("-shared" in call for call in self.calls)


@pytest.fixture
def compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    real = shutil.which("gcc") or shutil.which("clang")
    ours = Compiler(tmp_path, f'exec {real} "$@"')
    monkeypatch.setenv("CC", f"'{ours.path}'")
    return ours


def load(source: Path) -> Library:
    """As a process that has not loaded it yet."""
    return build.load_library.__wrapped__(source)


def answer(library: Library) -> int:
    assert library.handle is not None, library.reason
    return int(library.handle.catsparse_answer())


def process(source: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(PACKAGE), str(source)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Once


def test_the_first_use_compiles_and_the_next_process_does_not(
    source: Path, cache: Path, compiler: Compiler
) -> None:
    first = load(source)
    assert answer(first) == 42
    assert compiler.compiled == 1
    (built,) = cache.iterdir()
    assert re.fullmatch(r"answer-[0-9a-f]{20}\.so", built.name)
    assert first.reason == f"{built}, built by {compiler.path}"
    second = process(source)
    out, err = second.communicate()
    assert out == f"42 {first.reason}\n", err
    assert compiler.compiled == 1
    assert list(cache.iterdir()) == [built]


def test_one_process_asks_once(source: Path, compiler: Compiler) -> None:
    assert build.load_library(source) is build.load_library(source)
    assert len(compiler.calls) == 2  # its version, and the compilation


def test_two_processes_at_once(source: Path, cache: Path, compiler: Compiler) -> None:
    """Neither sees the other's half of a file, and one file is left."""
    body = compiler.path.read_text()  # each waits for the other before it writes
    both_here = f'[ $(grep -c shared "{compiler.log}") -ge 2 ]'
    wait = f'case "$*" in *-shared*) until {both_here}; do sleep 0.05; done;; esac'
    compiler.path.write_text(body.replace("exec ", f"{wait}\nexec ", 1))
    both = [process(source), process(source)]
    for one in both:
        out, err = one.communicate(timeout=60)
        assert out.startswith("42 "), err
    assert compiler.compiled == 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("what", ["source", "version", "name", "flags", "target", "processor"])
def test_the_key_changes_with(
    what: str, source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(compiler.path)]
    before = build._key(source, command)
    assert build._key(source, command) == before
    if what == "source":
        source.write_text(SOURCE + "/* */")
    elif what == "version":
        compiler.path.write_text("#!/bin/sh\necho 99\n")
    elif what == "name":
        other = compiler.path.with_name("other")
        shutil.copy(compiler.path, other)
        command = [str(other)]
    elif what == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    elif what == "target":
        monkeypatch.setattr(build, "target_flags", lambda: ("-msomething",))
    else:
        monkeypatch.setattr(build, "_cpu", lambda: "model name: another")
    assert build._key(source, command) != before


def test_a_changed_source_is_compiled_again(source: Path, cache: Path, compiler: Compiler) -> None:
    assert answer(load(source)) == 42
    source.write_text(SOURCE.replace("42", "43"))
    assert answer(load(source)) == 43
    assert compiler.compiled == 2
    assert len(list(cache.iterdir())) == 2


def test_a_changed_header_is_compiled_again(source: Path, compiler: Compiler) -> None:
    """One that another header includes; system headers do not count."""
    source.write_text('#include <stdlib.h>\n  # include "a.h"\n' + SOURCE.replace("42", "ANSWER"))
    one, two = source.with_name("a.h"), source.with_name("b.h")
    one.write_text('#include "b.h"\n#include "b.h"\n')
    for value in (44, 45):
        two.write_text(f"#undef ANSWER\n#define ANSWER {value}\n")
        assert build.with_headers(source) == [source, one, two]
        assert answer(load(source)) == value
    assert compiler.compiled == 2


@pytest.mark.parametrize("content", [b"", b"junk", b"\x7fELF" + bytes(100)])
def test_a_corrupt_library_is_compiled_again(
    content: bytes, source: Path, cache: Path, compiler: Compiler
) -> None:
    cache.mkdir()
    path = cache / f"answer-{build._key(source, [str(compiler.path)])}.so"
    path.write_bytes(content)
    assert answer(load(source)) == 42
    assert compiler.compiled == 1
    assert path.stat().st_size > len(content)
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_library_cut_short_is_compiled_again(
    share: float, source: Path, cache: Path, compiler: Compiler
) -> None:
    assert answer(load(source)) == 42
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.unlink()  # not in place: this process has it mapped
    path.write_bytes(whole[: int(share * len(whole))])
    out, err = process(source).communicate()
    assert out.startswith("42 "), err
    assert compiler.compiled == 2
    assert path.stat().st_size == len(whole)


# Where


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CATSPARSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert next(cache_folders()) == tmp_path / "home" / ".cache" / "catsparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert next(cache_folders()) == tmp_path / "xdg" / "catsparse"
    monkeypatch.setenv("CATSPARSE_CACHE", "~/own")
    assert next(cache_folders()) == tmp_path / "home" / "own"


def test_only_the_user_may_enter(source: Path, cache: Path, compiler: Compiler) -> None:
    """Whoever can write there can run code as the user."""
    load(source)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    _, private = cache_folders()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize("why", ["no such folder can be", "a file in its place", "read-only"])
def test_where_nothing_can_be_kept(
    why: str, source: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "no such folder can be":
        monkeypatch.delenv("CATSPARSE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/proc/nobody")
    elif why == "a file in its place":
        cache.write_text("")
    else:
        cache.mkdir(mode=0o500)
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache)
    library = load(source)
    assert answer(library) == 42
    temporary = Path(tempfile.gettempdir())
    (private,) = temporary.iterdir()
    assert library.reason.startswith(str(private / "answer-"))
    assert not cache.is_dir() or not any(cache.iterdir())


def test_a_private_folder_is_gone_after_the_process(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CATSPARSE_CACHE", "/proc/nobody")
    out, err = process(source).communicate()
    temporary = tempfile.gettempdir()
    assert out.startswith(f"42 {temporary}/catsparse-"), err
    assert not any(Path(temporary).iterdir())


def test_a_folder_that_forbids_execution(
    source: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted noexec: what was compiled does not load from there."""
    real = ctypes.CDLL

    def dlopen(path: str, *rest: Any, **options: Any) -> Any:
        if path.startswith(str(cache)):
            raise OSError("failed to map segment from shared object")
        return real(path, *rest, **options)

    monkeypatch.setattr(ctypes, "CDLL", dlopen)
    library = load(source)
    assert answer(library) == 42
    assert library.reason.startswith(tempfile.gettempdir())


# Which compiler


def test_a_full_disk_leads_to_the_next_folder(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(old: str, new: Path) -> None:
        if new.parent == cache:
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    library = build.load_library.__wrapped__(source)
    assert library.handle is not None
    assert str(tmp_path / "temporary") in library.reason
    assert not list(cache.iterdir())


def test_cc_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "ccache 'my gcc' -m64")
    assert find_compilers() == [["ccache", "my gcc", "-m64"]]


def test_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name in ("clang", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compilers() == [["gcc"], ["clang"]]
    monkeypatch.setenv("PATH", "")
    assert find_compilers() == []


def test_the_next_compiler_serves_if_one_fails(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    broken = Compiler(folder, 'case "$*" in *-shared*) exit 1;; esac')
    broken.path.rename(folder / "cc")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    library = load(source)
    assert answer(library) == 42
    assert "built by" in library.reason
    assert "built by cc" not in library.reason


FAILURES = {
    "missing": (None, "does not run"),
    "failing": ("exit 1", "failed"),
    "no openmp": ("case \"$*\" in *-shared*) echo 'fatal error: no openmp' >&2; exit 1;; esac",
                  "failed: fatal error: no openmp"),
    "writing junk": ('for a; do case "$a" in *.so) echo junk > "$a";; esac; done', "does not load"),
    "hanging": ("sleep 30", "timed out"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_no_compiler_is_one_line_in_the_log(
    failure: str,
    source: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body, says = FAILURES[failure]
    path = tmp_path / "missing"
    if body is not None:
        path = Compiler(tmp_path, body.replace("sleep", "exec sleep")).path
    monkeypatch.setenv("CC", f"'{path}'")
    monkeypatch.setattr(build, "_TIMEOUT", 0.3)
    with caplog.at_level(logging.WARNING, "catsparse"):
        library = load(source)
    assert library.handle is None
    assert says in library.reason
    assert str(path) in library.reason or failure == "writing junk"
    assert "\n" not in library.reason
    (record,) = caplog.records
    assert library.reason in record.getMessage()
    assert "torch" in record.getMessage()
    left = [] if not cache.exists() else [p for p in cache.iterdir() if p.name.startswith(".")]
    assert left == []


def test_no_compiler_at_all(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING, "catsparse"):
        assert load(source) == Library(None, "no C compiler: install gcc or clang")
    assert len(caplog.records) == 1


# The whole package


WHOLE = """
import logging, sys
sys.path.insert(0, sys.argv[1])
records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("catsparse").addHandler(handler)
from pathlib import Path
import catsparse
print("imported", Path(sys.argv[2]).exists())
import tiny
from catsparse import CatsparseError
model = tiny.build(tiny.llama_config())
calibration = tiny.calibrate(model)
dense = tiny.logits(model, 5)
catsparse.sparsify(model, calibration, 0.0)
print("dense", tiny.logits(model, 5).equal(dense))
print("lines", len(records))
print("explain", catsparse.explain(model).splitlines()[0])
try:
    catsparse.set_backend(model, "c")
except CatsparseError as error:
    print("error", error)
"""


def test_a_model_without_a_compiler(cache: Path, tmp_path: Path) -> None:
    """It runs in torch, says so once, and says why; importing compiles nothing."""
    broken = Compiler(tmp_path, "echo 'error: none today' >&2; exit 1")
    environment = os.environ | {"CC": f"'{broken.path}'"}
    tests = Path(tiny.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, str(tests), str(broken.log)],
        capture_output=True,
        text=True,
        env=environment,
    )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    why = f"{broken.path} failed: error: none today"
    assert found == {
        "imported": "False",
        "dense": "True",
        "lines": "1",
        "explain": "model.layers.0.mlp: sparse, per-neuron thresholds, compensated; "
        f"decode by torch, dense matmuls ({why})",
        "error": f"model.layers.0.mlp cannot run the backend c: {why}; use auto",
    }, done.stderr[-2000:]
