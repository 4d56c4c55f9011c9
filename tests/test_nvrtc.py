"""The CUDA sources compile, for every kind of call, where there is no GPU; needs NVRTC's wheel."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from catsparse.bench import gpu
from catsparse.kernels import cuda, nvrtc


@pytest.fixture(autouse=True)
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had CUDA, which its CPU build has not."""
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    try:
        nvrtc._compiler()
    except OSError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")


def defines(tokens: int, hidden: int, dtype: torch.dtype, act: str) -> tuple[tuple[str, str], ...]:
    plan = cuda.find_plan(hidden * dtype.itemsize, tokens)
    columns = -(-hidden * dtype.itemsize // 16 // plan.threads)
    constants: dict[str, Any] = {
        "TOKENS": tokens,
        "THREADS": plan.threads,
        "COLUMNS": columns,
        "ROWS": plan.rows,
        "CHUNKS": plan.chunks,
        "EVEN": int(hidden * dtype.itemsize == plan.threads * columns * 16),
    }
    return cuda._number_defines(dtype, act) + tuple((k, str(v)) for k, v in constants.items())


@pytest.mark.parametrize("hidden", [4096, 576])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_the_kernel_compiles(dtype: torch.dtype, hidden: int) -> None:
    for tokens, act in ((1, "silu"), (4, "gelu")):
        code = nvrtc.compile_source(cuda.SOURCE, defines(tokens, hidden, dtype, act), "sm_90")
        assert code[:4] == b"\x7fELF"
        assert b"gated_mlp_sum" in code


def test_later_architectures() -> None:
    for arch in ("sm_100", "sm_120"):
        assert nvrtc.compile_source(cuda.SOURCE, defines(1, 512, torch.bfloat16, "relu"), arch)


def test_the_mask_compiles() -> None:
    for dtype, act in itertools.product(cuda.DTYPES, ("silu", "gelu_tanh", "gelu", "relu")):
        for arch in ("sm_80", "sm_90"):
            code = nvrtc.compile_source(cuda.MASK_SOURCE, cuda._number_defines(dtype, act), arch)
            assert b"masked_hidden" in code


def test_the_probe_compiles() -> None:
    for arch in ("sm_80", "sm_90"):
        assert b"read_once" in nvrtc.compile_source(gpu._SOURCE, (), arch)


def test_what_does_not_compile_says_where(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { nonsense(); }\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r'wrong\.cu.*identifier "nonsense" is undefined'):
        nvrtc.compile_source(source, (), "sm_90")


def test_the_package_holds_what_is_compiled() -> None:
    for source in (cuda.SOURCE, cuda.MASK_SOURCE, gpu._SOURCE):
        assert source.is_file()
        included = [line for line in source.read_text().splitlines() if "#include" in line]
        assert all((source.parent / line.split('"')[1]).is_file() for line in included)
