"""Compile CUDA C at run time with NVRTC, which comes with torch, and launch it by the driver.

Needs no compiler, no headers and no other package. A kernel takes one struct by value.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .build import cache_folders

# Numbers of the driver's API.
_LAUNCH_EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DIGEST = 32  # bytes


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and its block size.

    Attributes:
        threads: threads a block. shared: bytes of dynamic shared memory a block.
    """

    function: ctypes.c_void_p
    threads: int
    shared: int

    def launch(
        self, blocks: int, argument: ctypes.Structure, stream: int, early: bool = False
    ) -> None:
        """Launch on a stream's handle.

        Args:
            early: start before what is ahead has ended. From Hopper on, and only for a kernel that
                waits for that by itself (griddepcontrol.wait) before it touches memory.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        attribute = _Attribute(_LAUNCH_EARLY, 0)
        attribute.value[0] = 1
        config = _Config(
            *(blocks, 1, 1, self.threads, 1, 1, self.shared, stream),
            ctypes.pointer(attribute),
            int(early),
        )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.function, arguments, None))


@functools.cache
def why_not_nvrtc() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    try:
        _compiler()
        _driver()
    except OSError as error:
        return f"{str(error).split(':')[0]} cannot be loaded"
    return None


@functools.cache
def compile_source(
    sources: tuple[Path, ...], defines: tuple[tuple[str, str], ...], arch: str
) -> bytes:
    """The machine code of ``sources``, in order, with ``defines``, for ``arch`` (as ``sm_90``).

    It is kept in the user's cache (see :mod:`catsparse.kernels.build`), as compiling takes half a
    second.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    text = "".join(f'#line 1 "{p.name}"\n{p.read_text(encoding="utf-8")}' for p in sources)
    name = sources[-1].name
    options = [f"-arch={arch}", "-std=c++17", "-lineinfo"]
    options += [f"-D{define}={value}" for define, value in defines]
    parts = (text, *options, _version())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = _cache() / f"{sources[-1].stem}-{key}.cubin"
    code = _read(path)
    if code is None:
        code = _compile(text, name, options)
        _write(path, code)
    return code


@functools.cache
def _cache() -> Path:
    return next(cache_folders())


def _read(path: Path) -> bytes | None:
    """Code that was kept; None if there is none, or it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """In one step, for those who read at the same time."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError:  # a full disk, say: compiled again the next time
        return


def _compile(text: str, name: str, options: list[str]) -> bytes:
    nvrtc = _compiler()
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None):
        raise RuntimeError("NVRTC cannot make a program")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"{name}: {log.decode(errors='replace').rstrip(chr(0))}")
        return _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def load_module(code: bytes, device: torch.device) -> ctypes.c_void_p:
    """Load machine code on ``device``; it stays loaded. Safe while a CUDA graph is captured."""
    driver, module = _driver(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context, if nothing has yet
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
        try:
            _check(driver.cuModuleLoadData(ctypes.byref(module), code))
        finally:
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    return module


def find_kernel(module: ctypes.c_void_p, name: str, threads: int, shared: int = 0) -> Kernel:
    """A kernel of a loaded module, for blocks of ``threads`` with ``shared`` dynamic bytes."""
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    if shared:
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared))
    return Kernel(function, threads, shared)


def _fetch(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC of the CUDA that torch was built with: from its wheel, else wherever the loader looks.

    Raises:
        OSError: there is none.
    """
    major = str(torch.version.cuda).split(".")[0]
    if sys.platform == "win32":
        return ctypes.CDLL(f"nvrtc64_{major}0_0.dll")
    name = f"libnvrtc.so.{major}"
    for package in (f"nvidia.cu{major}", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # no package nvidia at all
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            library = Path(folder, "lib", name)
            if library.exists():
                # It looks for these by name, and so must find them loaded.
                for builtins in library.parent.glob("libnvrtc-builtins.so*"):
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                return ctypes.CDLL(str(library))
    return ctypes.CDLL(name)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(result: int) -> None:
    if result:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(message))
        text = message.value.decode() if message.value else f"error {result}"
        raise RuntimeError(f"the CUDA driver says: {text}")
