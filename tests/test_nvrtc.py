"""The CUDA sources compile, for every kind of call, where there is no GPU; needs NVRTC's wheel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from catsparse.bench import gpu
from catsparse.kernels import attention, cuda, linear, nvrtc, stream
from catsparse.kernels.formats import FORMATS
from catsparse.kernels.preview import PreviewKind
from catsparse.kernels.sparse_linear_cuda import compile_sparse_linear
from catsparse.kernels.tiles import find_tiles


@pytest.fixture(autouse=True)
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had CUDA, which its CPU build has not."""
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    try:
        nvrtc._compiler()
    except OSError:
        pytest.skip("nvidia-cuda-nvrtc is not installed")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cubins")
        patch.setattr(nvrtc, "_cache", lambda: folder)
        yield


def defines(
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    act: str,
    second: bool = False,
    kind: PreviewKind | None = None,
    weights: str | None = None,
) -> tuple[tuple[str, str], ...]:
    storage = stream.Storage(dtype, weights)
    pieces = -(-hidden * dtype.itemsize // 16)
    plan = stream.find_plan(hidden * dtype.itemsize, tokens, weights)
    columns = -(-pieces // plan.threads)
    even = pieces == plan.threads * columns
    stage = plan.rows * storage.staged_bytes(hidden)
    tiles = None if kind is None else find_tiles(hidden, kind, stage)
    return cuda._defines(storage, act, tokens, plan, columns, even, second, tiles)


@pytest.mark.parametrize("hidden", [4096, 576])
@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
def test_the_kernel_compiles(dtype: torch.dtype, hidden: int) -> None:
    for tokens, act in ((1, "silu"), (2, "gelu_tanh"), (4, "gelu"), (4, "relu")):
        code = cuda._compile(defines(tokens, hidden, dtype, act), "sm_90")
        assert code[:4] == b"\x7fELF"
        assert b"sum_partials" in code


@pytest.mark.parametrize("hidden", [8192, 584])
@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
def test_it_compiles_with_a_preview_and_a_second_decision(dtype: torch.dtype, hidden: int) -> None:
    eight, products = PreviewKind(8, products=False), PreviewKind(4, products=True)
    for tokens, second, kind in ((1, True, None), (2, False, eight), (4, True, products)):
        assert cuda._compile(defines(tokens, hidden, dtype, "silu", second, kind), "sm_90")


@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
def test_it_compiles_for_packed_weights(weights: str, dtype: torch.dtype) -> None:
    own, products = PreviewKind(4, products=False), PreviewKind(4, products=True)
    for tokens, hidden, second, kind in ((1, 4096, False, None), (4, 576, True, products)):
        kind = own if weights == "int4" else kind
        constants = defines(tokens, hidden, dtype, "silu", second, kind, weights)
        assert cuda._compile(constants, "sm_90")


@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("columns", [6144, 24])
def test_the_sparse_linear_kernel_compiles(dtype: torch.dtype, tokens: int, columns: int) -> None:
    row = columns * dtype.itemsize
    plan = stream.find_plan(row, tokens)
    code = compile_sparse_linear(dtype, tokens, row, plan, "sm_90")
    assert b"sparse_linear" in code
    assert b"sum_partials" in code


@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
@pytest.mark.parametrize("weights", [None, *FORMATS])
def test_the_linear_kernel_compiles(weights: str | None, dtype: torch.dtype) -> None:
    for tokens, hidden in ((1, 4096), (4, 2112)):
        storage = stream.Storage(dtype, weights)
        plan = stream.find_plan(hidden * dtype.itemsize, tokens, weights)
        code = linear.compile_linear(storage, tokens, hidden, plan, "sm_90")
        assert b"linear" in code


@pytest.mark.parametrize("dtype", stream.DTYPES, ids=str)
@pytest.mark.parametrize("head", attention.HEAD_SIZES)
def test_the_attention_kernel_compiles(dtype: torch.dtype, head: int) -> None:
    for group in (1, 3, attention.MOST_GROUP):
        if attention.why_not_attention(dtype, group, 1, head) is None:
            cluster = 8 if group == 3 else group
            code = attention.compile_attention(dtype, head, group, cluster, "sm_90")
            assert b"attention" in code


def test_later_architectures() -> None:
    for arch in ("sm_100", "sm_120"):
        assert cuda._compile(defines(1, 512, torch.bfloat16, "relu"), arch)


def test_a_gpu_that_the_compiler_does_not_know() -> None:
    assert cuda._why_not_compiled("sm_90") is None
    reason = cuda._why_not_compiled("sm_999")
    assert reason is not None
    assert "does not compile for sm_999" in reason
    assert "\n" not in reason


def test_the_probe_compiles() -> None:
    for arch in ("sm_80", "sm_90"):
        assert b"read_once" in nvrtc.compile_source((gpu._SOURCE,), (), arch)


def test_what_does_not_compile_says_where(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void f() { nonsense(); }\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r'wrong\.cu.*identifier "nonsense" is undefined'):
        nvrtc.compile_source((source,), (), "sm_90")


def test_code_is_kept_and_what_is_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "_cache", lambda: tmp_path)
    made: list[str] = []
    real = nvrtc._compile

    def compile_(text: str, name: str, options: list[str]) -> bytes:
        made.append(name)
        return real(text, name, options)

    monkeypatch.setattr(nvrtc, "_compile", compile_)

    def compiled(*defines: tuple[str, str]) -> bytes:
        nvrtc.compile_source.cache_clear()
        return nvrtc.compile_source((gpu._SOURCE,), defines, "sm_90")

    code = compiled()
    assert compiled() == code
    assert len(made) == 1
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damage in (whole[:-9], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damage)
        assert compiled() == code
    assert len(made) == 5
    assert path.read_bytes() == whole
    compiled(("SOMETHING", "1"))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(nvrtc, "_cache", lambda: tmp_path / "probe.cu" / "no folder")
    (tmp_path / "probe.cu").write_text("")
    assert compiled() == code


class Argument(ctypes.Structure):
    _fields_ = [("value", ctypes.c_int)]


@pytest.mark.parametrize("early", [False, True])
def test_what_the_driver_is_told(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``early`` no attribute: an older GPU would not know it."""
    told: list[tuple[int, ...]] = []

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config: Any, function: Any, arguments: Any, extra: Any) -> int:
            c = config._obj
            told.append((c.grid_x, c.grid_y, c.block_x, c.block_z, c.shared, c.stream, c.count))
            told.append((c.attributes[0].id, c.attributes[0].value[0]))
            told.append((ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0],))
            return 0

    monkeypatch.setattr(nvrtc, "_driver", Driver)
    nvrtc.Kernel(ctypes.c_void_p(1), 288, 1000).launch(5, Argument(42), 7, early=early)
    assert told == [(5, 1, 288, 1, 1000, 7, int(early)), (6, 1), (42,)]
