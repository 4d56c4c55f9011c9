"""cpu.c as other compilers and processors see it: correct there too, in bounds, and vector code."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import (
    KERNEL_TOLERANCE,
    check_layouts,
    check_reading,
    check_rounding,
    odd_cases,
    preview_cases,
)
from catsparse.kernels import cpu, gated_mlp, make_preview
from catsparse.kernels.build import FLAGS, Library

X86 = platform.machine().lower() in ("x86_64", "amd64")
PLAIN = [flag for flag in FLAGS if flag != "-fopenmp"]

# Work space full of NaN: whatever is read before it is written shows in the result.
POISONED = """
#include <stdlib.h>
#include <string.h>
static void *poisoned(size_t alignment, size_t bytes) {{
    void *memory = aligned_alloc(alignment, bytes);
    return memory ? memset(memory, 0xff, bytes) : memory;
}}
#define aligned_alloc poisoned
#include "{source}"
"""

# Imports the kernels without the rest of catsparse, which would take seconds.
IN_BOUNDS = """
import ctypes, sys, types
package = types.ModuleType("catsparse")
package.__path__ = [sys.argv[1]]
sys.modules["catsparse"] = package
sys.path.insert(0, sys.argv[2])
import torch
from cases import KERNEL_TOLERANCE, check_layouts, odd_cases, preview_cases
from catsparse.kernels import cpu, gated_mlp, make_preview
from catsparse.kernels.build import Library

torch.set_num_threads(2)
cpu.gated_mlp_reference = None
library = Library(ctypes.CDLL(sys.argv[3]), "")
cpu.cpu_library = lambda: library
for dtype in KERNEL_TOLERANCE:
    for case in (*odd_cases(dtype), *preview_cases(dtype, make_preview)):
        check_layouts(case, gated_mlp)
print("in bounds")
"""


def need(compiler: str) -> str:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    return compiler


def compile_c(command: list[str], source: Path, target: Path) -> Path:
    done = subprocess.run([*command, str(source), "-o", str(target), "-lm"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return target


def processor_has(*flags: str) -> bool:
    try:
        found = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return set(flags) <= set(found)


# Correct


BUILDS = {
    "native": ["gcc", *FLAGS, "-march=native"],
    "AVX-512": ["gcc", *FLAGS, "-march=x86-64-v4"],  # products of bf16 pairs are not in it
    "AVX2": ["gcc", *FLAGS, "-mavx2", "-mfma", "-mf16c"],
    "AVX": ["gcc", *FLAGS, "-mavx"],
    "SSE2": ["gcc", *FLAGS, "-msse2"],
    "unoptimized": ["gcc", *PLAIN, "-O0"],
    "clang": ["clang", *PLAIN, "-march=native"],
    "clang SSE2": ["clang", *PLAIN, "-msse2"],
}


@pytest.mark.parametrize("build", BUILDS)
def test_every_build_is_right(build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = BUILDS[build]
    need(command[0])
    if not X86 and any(flag.startswith("-m") for flag in command):
        pytest.skip("not an x86 machine")
    if "-march=x86-64-v4" in command and not processor_has("avx512f", "avx512vl", "avx512bw"):
        pytest.skip("no AVX-512 here")
    if "-mavx2" in command and not processor_has("avx2", "fma", "f16c"):
        pytest.skip("no AVX2 here")
    if "-mavx" in command and not processor_has("avx"):
        pytest.skip("no AVX here")
    source = tmp_path / "poisoned.c"
    source.write_text(POISONED.format(source=cpu.SOURCE))
    path = compile_c([*command, "-shared", "-fPIC"], source, tmp_path / "kernel.so")
    library = Library(ctypes.CDLL(str(path)), "")
    monkeypatch.setattr(cpu, "cpu_library", lambda: library)
    monkeypatch.setattr(cpu, "gated_mlp_reference", None)
    for dtype in KERNEL_TOLERANCE:
        for case in (*odd_cases(dtype), *preview_cases(dtype, make_preview)):
            check_layouts(case, gated_mlp)
        if dtype != torch.float32:
            check_reading(dtype, gated_mlp)
            check_rounding(dtype, gated_mlp)


def test_no_warnings(tmp_path: Path) -> None:
    flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-c"]
    compile_c([need("gcc"), *FLAGS, *flags], cpu.SOURCE, tmp_path / "kernel.o")


# In bounds


@pytest.mark.parametrize("vectors", ["-march=native", "-msse2"])
def test_sanitizers(vectors: str, tmp_path: Path) -> None:
    """No access beyond a tensor or the work space, no undefined behaviour, at odd sizes."""
    compiler = need("gcc")
    if not X86:
        pytest.skip("not an x86 machine")
    runtimes = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second for torch's exceptions
        asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True)
        runtimes.append(asked.stdout.decode().strip())
        if not os.path.isabs(runtimes[-1]):
            pytest.skip(f"gcc has no {name}")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", vectors]
    flags += [flag for flag in FLAGS if flag != "-O3"]
    path = compile_c([compiler, *flags, "-shared", "-fPIC"], cpu.SOURCE, tmp_path / "kernel.so")
    package, tests = Path(cpu.__file__).parents[1], Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", IN_BOUNDS, str(package), str(tests), str(path)],
        capture_output=True,
        text=True,
        # The allocator fills fresh memory, the kernel's work space too, with NaN.
        env=os.environ
        | {
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=10000000:malloc_fill_byte=255",
        },
    )
    assert done.stdout == "in bounds\n", done.stderr[:3000]


# Vector code


def functions(assembly: str) -> dict[str, list[str]]:
    """The instructions of each function, clones (``.constprop.0``) counted to their origin."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"([A-Za-z_]\w*)[\w.]*:", line)
        if label:
            lines = found.setdefault(label[1], [])
        elif re.match(r"\s+[a-z]", line):
            lines.append(" ".join(line.split()))
    return found


# What a fused multiply-add of vectors, and the conversions of bf16 and fp16, look like.
TARGETS: dict[str, tuple[list[str], str, str, str]] = {
    "AVX2": (
        ["gcc", "-march=haswell"],
        r"vfmadd\d+ps .*%ymm",
        r"vpslld \$16, %ymm",
        r"vcvtph2ps .*%ymm",
    ),
    "AVX-512": (
        ["gcc", "-march=x86-64-v4"],
        r"vfmadd\d+ps .*%zmm",
        r"vpslld \$16, %zmm",
        r"vcvtph2ps .*%zmm",
    ),
    "NEON": (
        ["aarch64-linux-gnu-gcc"],
        r"fmla v\d+\.4s",
        r"shll? v\d+\.4s, v\d+\.4[sh], 16",
        r"fcvtl v\d+\.4s",
    ),
}
SCALAR = r"vfn?m(add|sub)\d+ss |[a-z]*mulss |fmadd s|fmul s|vcvtph2ps .*%xmm\d+, %xmm|fcvt s"


@pytest.mark.parametrize("target", TARGETS)
def test_hot_loops_are_vector_code(target: str, tmp_path: Path) -> None:
    command, multiply_add, bf16, f16 = TARGETS[target]
    if target == "NEON":
        command = ["gcc"] if platform.machine() == "aarch64" else command
    elif not X86:
        pytest.skip("not an x86 machine")
    need(command[0])
    path = compile_c([*command, *FLAGS, "-fPIC", "-S"], cpu.SOURCE, tmp_path / "kernel.s")
    code = functions(path.read_text())

    def count(pattern: str, name: str) -> int:
        return sum(bool(re.match(pattern, line)) for line in code[name])

    for dtype in ("f32", "bf16", "f16"):
        for loop in ("dot_one", "dot_group", "columns"):
            name = f"{dtype}_{loop}"
            assert count(multiply_add, name) >= 4, name  # ROWS of them
            assert count(SCALAR, name) == 0, name
            assert count("prefetch|prfm", name) >= 4, name
            if dtype == "bf16":
                assert count(bf16, name) >= 4, name
            elif dtype == "f16":
                assert count(f16, name) >= 4, name
            assert not any(re.search("__extendhfsf2|gather", line) for line in code[name]), name
    for name in ("int8_dot_one", "int8_columns", "fp8_dot_one", "fp8_columns", "int4_columns"):
        assert count(multiply_add, name) >= 4, name
        assert count(SCALAR, name) == 0, name
        assert count("prefetch|prfm", name) >= 4, name
    for loop in ("4_dot_one", "4_dot_group", "8_dot_one", "8_dot_group"):
        name = f"preview_{loop}"
        assert count(multiply_add, name) >= 4, name
        assert count(SCALAR, name) == 0, name
        assert count("prefetch|prfm", name) >= 4, name
        assert not any(re.search("pinsr|pextr|gather|cvtsi2ss", line) for line in code[name]), name


def test_half_precision_previews_multiply_bytes(tmp_path: Path) -> None:
    """Where the machine can: the kernel's speed in bf16 and fp16 rests on it."""
    if not X86:
        pytest.skip("not an x86 machine")
    command = [need("gcc"), "-march=cooperlake", *FLAGS, "-fPIC", "-S"]
    code = functions(compile_c(command, cpu.SOURCE, tmp_path / "kernel.s").read_text())
    for loop in ("4_dot_one", "4_dot_group", "8_dot_one", "8_dot_group"):
        lines = code[f"digits_{loop}"]
        products = sum(line.startswith("vpdpbusd") for line in lines)
        assert products >= 4 * 2 * (8 // int(loop[0]))  # ROWS by digits by fields
        assert not any(re.match(SCALAR, line) for line in lines)
