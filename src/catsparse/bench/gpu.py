"""Timing on a GPU: CUDA graphs, so that no launch is waited for, and a probe that only reads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import CatsparseError
from ..kernels.nvrtc import Kernel, compile_source, find_kernel, load_module

_SOURCE = Path(__file__).with_name("probe.cu")
_THREADS = 512  # probe.cu's
_BLOCKS = 4  # a multiprocessor
_HEAD_START = 300_000  # clocks, 150 to 200 µs: else the host's time to launch counts, too


def capture(work: Callable[[], None], name: str) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``work``, which must have run once before.

    Raises:
        CatsparseError: ``work`` waits for the GPU, or does something else no graph can hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        raise CatsparseError(
            f"{name} cannot be captured in a CUDA graph, which is how calls are timed on a GPU: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return graph


def gpu_seconds(work: Callable[[], object]) -> float:
    """Time on the current stream, by events; the GPU is kept busy until ``work`` is queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


class _Read(ctypes.Structure):
    """``Read`` of probe.cu."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("pieces", ctypes.c_longlong),
    ]


class ReadKernel:
    """Reads a whole buffer of ``size`` bytes once, and does nothing else; needs NVRTC."""

    def __init__(self, device: torch.device, size: int) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.data = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
        self.blocks = properties.multi_processor_count * _BLOCKS
        self.out = torch.empty(self.blocks, dtype=torch.int32, device=device)
        arch = f"sm_{properties.major}{properties.minor}"
        module = load_module(compile_source((_SOURCE,), (), arch), device)
        self.kernel: Kernel = find_kernel(module, "read_once", _THREADS)

    def __call__(self) -> None:
        argument = _Read(self.data.data_ptr(), self.out.data_ptr(), self.data.numel() // 4)
        self.kernel.launch(self.blocks, argument, torch.cuda.current_stream().cuda_stream)
