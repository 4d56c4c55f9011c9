"""What every benchmark shares: rows and their file, order statistics, the machine's limits."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import CatsparseError
from ..kernels.nvrtc import why_not_nvrtc
from .gpu import ReadKernel, gpu_seconds

PROBE_BYTES = 256 * 2**20
GPU_PROBE_BYTES = 2**32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference to the reference over its largest value; reduced precision also moves
# activations that lie next to the threshold across it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Row:
    """One measured figure, as a line of rows.jsonl.

    Attributes:
        what: ``op`` (times in microseconds) or ``decode`` (tokens/s).
        name: shape, config or model; of scope ``all`` with ``, all linears`` behind it. Dense is
            then of the same weights, attention's by input, which our own step reads slower.
        impl: ``dense``: torch; in ``decode`` rows from a GPU, our step. ``dense_compiled``, on GPUs
            only: gate and up in one matrix, torch.compile; in ``decode`` rows the compiled step.
            ``transformers``: dense in its own loop, for ``decode`` on GPUs. ``catsparse``: at
            sparsity 0 it keeps every neuron, by our kernel where the backend chose it.
            ``catsparse_preview4`` or ``8``: a gate preview of so many bits decides;
            ``catsparse_product4`` or ``8``: a preview of gate and up, on the product.
            ``catsparse_int8``, ``fp8`` or ``int4``: on packed weights. Or a peer's name.
        device: the product's name. threads: CPU threads used, 0 on a GPU.
        dtype: of activations. weights: fp32, bf16, fp16, or the format of packed ones: int8, fp8,
            int4.
        tokens: tokens a call, or sequences of a decode step.
        context: tokens of the prompt before a decode step; 0 for ``op``.
        sparsity: fraction of neurons dropped.
        bytes_skipped: fraction of the MLP's (or all linears') weight bytes that is not read; 0
            where torch's dense matmuls serve the call. For a peer: what it might have skipped.
        p20, p50, p80: order statistics over the rounds.
        limit: what reading the bytes alone would take at the bandwidth probed in the run.
        of_limit: time over limit (op) or rate over limit (decode).
        vs_dense: speedup over the best dense of the run, torch or our own kernel; in ``op`` rows
            of weights that are not packed.
        max_err: largest error against the reference, over its largest value.
    """

    what: str
    name: str
    impl: str
    device: str
    threads: int
    dtype: str
    weights: str
    tokens: int
    context: int
    sparsity: float
    bytes_skipped: float
    p20: float
    p50: float
    p80: float
    limit: float
    of_limit: float
    vs_dense: float
    max_err: float
    versions: dict[str, str]
    commit: str | None


def append_rows(path: Path, rows: Sequence[Any]) -> None:
    """Add rows (:class:`Row` or another dataclass) to a jsonl file; those there stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise CatsparseError(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Probe:
    """Read bandwidth in bytes/s: a pass over data far larger than any cache.

    On a GPU a kernel that only reads; on a CPU, and where none can be compiled, torch's sum. On a
    GPU the fastest pass counts, as it stands for a limit; on a CPU, whose clock changes with
    neighbours' work, the median.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: list[float] = []
        on_gpu = self.on_gpu = device.type == "cuda"
        self.size = PROBE_BYTES
        if on_gpu:
            memory = torch.cuda.get_device_properties(device).total_memory
            self.size = min(GPU_PROBE_BYTES, memory // 8 // 4096 * 4096)
        read: Callable[[], object]
        if on_gpu and why_not_nvrtc() is None:
            read = ReadKernel(device, self.size)
        else:
            data = torch.ones(self.size // 4, device=device)
            read = data.sum
        self._take: Callable[[], float]
        if on_gpu:
            self._take = lambda: gpu_seconds(read)
        else:
            self._take = lambda: seconds(read, device)

    def measure(self) -> None:
        self._seconds.append(self._take())

    @property
    def bandwidth(self) -> float:
        return self.size / (min if self.on_gpu else statistics.median)(self._seconds)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache that a benchmark has to get past."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 2**10, "M": 2**20, "G": 2**30}
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def device_name(device: torch.device) -> str:
    """The product's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("catsparse", "torch", "transformers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The source tree's commit, with a + if files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":
            return None
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
