"""The CUDA sources compile, for every kind of call, where there is no GPU; needs NVRTC's wheel."""

from __future__ import annotations

from pathlib import Path

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
    pieces = -(-hidden * dtype.itemsize // 16)
    plan = cuda.find_plan(hidden * dtype.itemsize, tokens)
    columns = -(-pieces // plan.threads)
    return cuda._defines(dtype, act, tokens, plan, columns, pieces == plan.threads * columns)


@pytest.mark.parametrize("hidden", [4096, 576])
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_the_kernel_compiles(dtype: torch.dtype, hidden: int) -> None:
    for tokens, act in ((1, "silu"), (2, "gelu_tanh"), (4, "gelu"), (4, "relu")):
        code = nvrtc.compile_source(cuda.SOURCE, defines(tokens, hidden, dtype, act), "sm_90")
        assert code[:4] == b"\x7fELF"
        assert b"gated_mlp_sum" in code


def test_later_architectures() -> None:
    for arch in ("sm_100", "sm_120"):
        assert nvrtc.compile_source(cuda.SOURCE, defines(1, 512, torch.bfloat16, "relu"), arch)


def test_a_gpu_that_the_compiler_does_not_know() -> None:
    assert cuda._why_not_compiled("sm_90") is None
    reason = cuda._why_not_compiled("sm_999")
    assert reason is not None
    assert "does not compile for sm_999" in reason
    assert "\n" not in reason


def test_the_probe_compiles() -> None:
    for arch in ("sm_80", "sm_90"):
        assert b"read_once" in nvrtc.compile_source(gpu._SOURCE, (), arch)


def test_what_does_not_compile_says_where(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { nonsense(); }\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r'wrong\.cu.*identifier "nonsense" is undefined'):
        nvrtc.compile_source(source, (), "sm_90")
