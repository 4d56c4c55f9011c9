"""Which implementation serves a call: the rules, and what a model says about them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import catsparse
import tiny
from catsparse import CatsparseError, explain, explanation, set_backend, weights
from catsparse.kernels import MAX_OP_TOKENS, Backend, backend, choose_backend, cpu
from catsparse.kernels.backend import AUTO_TOKENS, AUTO_TOKENS_CUDA, Choice, Decisions
from catsparse.kernels.build import Library
from catsparse.kernels.preview import PreviewKind
from catsparse.modules import sparse_modules

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]
START = "sparse, per-neuron thresholds, compensated; decode by "


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "cc failed: no such luck"
    for module in (cpu, backend):
        monkeypatch.setattr(module, "cpu_library", lambda: Library(None, reason))
    return reason


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each call of the C code."""
    seen: list[int] = []
    library: Any = cpu.cpu_library().handle
    if library is None:
        pytest.skip("no C compiler")

    class Watched:
        @staticmethod
        def catsparse_gated_mlp(problem: Any) -> int:
            seen.append(problem._obj.tokens)
            return int(library.catsparse_gated_mlp(problem))

    monkeypatch.setattr(cpu, "cpu_library", lambda: Library(Watched(), ""))  # type: ignore[arg-type]
    return seen


def paths(model: nn.Module) -> list[str]:
    """What ``explain`` says of each layer's decode."""
    lines = explain(model).split("\n")
    assert [line.split(":")[0] for line in lines] == SITES
    return [line.split("decode by ")[1] for line in lines]


# The rules


@pytest.mark.parametrize("dtype", AUTO_TOKENS, ids=str)
def test_auto_takes_the_kernel_for_few_tokens(dtype: torch.dtype, calls: list[int]) -> None:
    choice = choose_backend(Backend.AUTO, CPU, dtype)
    tokens = AUTO_TOKENS[dtype]
    assert choice == Choice(Backend.C, tokens, f"faster than torch up to {tokens} tokens")
    assert 1 <= tokens <= MAX_OP_TOKENS


@pytest.mark.parametrize("dtype", AUTO_TOKENS, ids=str)
def test_what_is_asked_for(dtype: torch.dtype, calls: list[int]) -> None:
    assert choose_backend(Backend.C, CPU, dtype) == Choice(Backend.C, MAX_OP_TOKENS, "asked for")
    assert choose_backend(Backend.TORCH, CPU, dtype) == Choice(Backend.TORCH, 0, "asked for")


def test_every_dtype_of_the_kernel_has_a_crossover() -> None:
    assert set(AUTO_TOKENS) == set(cpu.DTYPES)


@pytest.mark.parametrize("asked", [Backend.AUTO, Backend.C])
def test_where_there_is_no_kernel(asked: Backend) -> None:
    for device, dtype, why in (
        ("meta", torch.bfloat16, "no kernel for meta"),
        ("cpu", torch.float64, "no kernel for float64"),
        ("cpu", torch.float8_e4m3fn, "no kernel for float8_e4m3fn"),
    ):
        choice = choose_backend(asked, torch.device(device), dtype)
        assert choice == Choice(Backend.TORCH, 0, why)


def test_triton_runs_on_gpus_only_and_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(Backend.TRITON, CPU, torch.float32) == Choice(
        Backend.TORCH, 0, "no kernel for cpu"
    )
    for name in ("why_not_triton", "why_not_cuda"):
        monkeypatch.setattr(backend, name, lambda device: None)
    assert choose_backend(Backend.TRITON, CUDA, torch.bfloat16) == Choice(
        Backend.TRITON, MAX_OP_TOKENS, "asked for"
    )
    assert choose_backend(Backend.AUTO, CUDA, torch.bfloat16).backend is Backend.CUDA


def test_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend(Backend.CUDA, CPU, torch.float32) == Choice(
        Backend.TORCH, 0, "no kernel for cpu"
    )
    monkeypatch.setattr(backend, "why_not_cuda", lambda device: None)
    assert choose_backend(Backend.CUDA, CUDA, torch.float16) == Choice(
        Backend.CUDA, MAX_OP_TOKENS, "asked for"
    )
    for dtype, tokens in AUTO_TOKENS_CUDA.items():
        reason = f"faster than torch up to {tokens} tokens"
        assert choose_backend(Backend.AUTO, CUDA, dtype) == Choice(Backend.CUDA, tokens, reason)
    for asked in (Backend.AUTO, Backend.CUDA):
        choice = choose_backend(asked, CUDA, torch.float64)
        assert choice == Choice(Backend.TORCH, 0, "no kernel for float64")
    assert choose_backend(Backend.C, CUDA, torch.float32) == Choice(
        Backend.TORCH, 0, "no kernel for cuda"
    )


def test_sizes_that_the_cuda_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_not_cuda", lambda device: None)
    seen = []
    monkeypatch.setattr(backend, "why_not_sizes", lambda *sizes: seen.append(sizes) or "too odd")
    for asked in (Backend.AUTO, Backend.CUDA):
        choice = choose_backend(asked, CUDA, torch.bfloat16, (9, 5, 9))
        assert choice == Choice(Backend.TORCH, 0, "too odd")
    assert seen == [(CUDA, torch.bfloat16, 9, 5, 9, None, None)] * 2
    choose_backend(Backend.CUDA, CUDA, torch.bfloat16, (9, 5, 9), packed="int8")
    assert seen[-1] == (CUDA, torch.bfloat16, 9, 5, 9, None, "int8")


PREVIEWED = Decisions(PreviewKind(4, products=False))


def test_triton_serves_decisions_that_cuda_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an older GPU, and for weights that cuda.cu does not take."""
    monkeypatch.setattr(backend, "why_not_triton", lambda device: None)
    rest = CUDA, torch.bfloat16, (63, 5, 63)
    for why, names in (("too old", ["why_not_cuda"]), ("too odd", ["why_not_sizes"])):
        monkeypatch.setattr(backend, "why_not_cuda", lambda device: None)
        for name in names:
            monkeypatch.setattr(backend, name, lambda *_, why=why: why)
        for decisions in (PREVIEWED, Decisions(second=True)):
            choice = choose_backend(Backend.AUTO, *rest, decisions)
            words = f"{why}; torch would read all for a preview or a second decision"
            assert choice == Choice(Backend.TRITON, 4, words)
            assert choice.op_tokens == 4  # more are torch's
        choice = choose_backend(Backend.AUTO, *rest, packed="int8")
        words = f"{why}; torch would make floats of packed weights"
        assert choice == Choice(Backend.TRITON, MAX_OP_TOKENS, words)
        assert choose_backend(Backend.AUTO, *rest) == Choice(Backend.TORCH, 0, why)
        assert choose_backend(Backend.CUDA, *rest, PREVIEWED) == Choice(Backend.TORCH, 0, why)
        for dtype, sizes in ((torch.float64, (63, 5, 63)), (torch.bfloat16, (8200, 5, 63))):
            choice = choose_backend(Backend.AUTO, CUDA, dtype, sizes, PREVIEWED)
            assert choice.backend is Backend.TORCH


def test_triton_that_is_asked_for_must_take_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "why_not_triton", lambda device: None)
    rest = CUDA, torch.bfloat16
    choice = choose_backend(Backend.TRITON, *rest, (8192, 9, 8192), PREVIEWED)
    assert choice == Choice(Backend.TRITON, MAX_OP_TOKENS, "asked for")
    choice = choose_backend(Backend.TRITON, *rest, (8192, 9, 8193))
    reason = "rows of 8193 elements do not fit in the registers"
    assert choice == Choice(Backend.TORCH, 0, reason)


def test_a_preview_that_cuda_does_not_take_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Triton would take it: the rest runs faster."""
    for name in ("why_not_cuda", "why_not_triton"):
        monkeypatch.setattr(backend, name, lambda device: None)
    monkeypatch.setattr(
        backend, "why_not_sizes", lambda *a: "no room" if a[5] == PREVIEWED.preview else None
    )
    rest = CUDA, torch.bfloat16, (64, 5, 64)
    for asked, tokens in ((Backend.AUTO, 4), (Backend.CUDA, MAX_OP_TOKENS)):
        choice = choose_backend(asked, *rest, PREVIEWED)
        assert (choice.backend, choice.kernel_tokens) == (Backend.CUDA, tokens)
        assert choice.without_preview == "no room"
        assert choose_backend(asked, *rest, Decisions(second=True)).without_preview is None
    for asked in (Backend.TORCH, Backend.TRITON):
        assert choose_backend(asked, *rest, PREVIEWED).without_preview is None


def test_what_a_layer_decides_by_is_asked_about(
    llama: Any, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def choose(
        asked: Backend,
        device: Any,
        dtype: Any,
        sizes: Any,
        decisions: Decisions,
        packed: str | None,
    ) -> Choice:
        assert packed is None
        seen.append(decisions)
        return Choice(Backend.TORCH, 0, "as on a GPU")

    monkeypatch.setattr(weights, "choose_backend", choose)
    plain = catsparse.calibrate(llama, windows, progress=False)
    previewed = catsparse.calibrate(llama, windows, preview=8, progress=False)
    kinds = {products: PreviewKind(8, products) for products in (False, True)}
    for calibration, method, decisions in (
        (plain, "energy", Decisions()),
        (previewed, "energy", Decisions(kinds[False])),
        (previewed, "product", Decisions(kinds[True], second=True)),
    ):
        catsparse.sparsify(llama, calibration, 0.5, method)
        assert seen[-1] == decisions
        mlp = llama.model.layers[0].mlp
        if method == "energy":
            mlp.set_threshold(mlp.catsparse_threshold, None, torch.tensor(0.5))
            assert seen[-1] == replace(decisions, second=True)
        catsparse.densify(llama)


def test_a_gpu_without_the_kernel_decodes_in_torch() -> None:
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("torch was built with CUDA")
    for asked in (Backend.AUTO, Backend.CUDA, Backend.TRITON):
        choice = choose_backend(asked, CUDA, torch.bfloat16)
        assert choice == Choice(Backend.TORCH, 0, "torch was built without CUDA")


@pytest.mark.parametrize("asked", [Backend.AUTO, Backend.C, Backend.TORCH])
def test_without_a_compiler(asked: Backend, no_compiler: str) -> None:
    reason = "asked for" if asked is Backend.TORCH else no_compiler
    assert choose_backend(asked, CPU, torch.float32) == Choice(Backend.TORCH, 0, reason)


def test_torch_and_other_devices_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cpu_library", None)  # calling it would fail
    choose_backend(Backend.TORCH, CPU, torch.float32)
    choose_backend(Backend.AUTO, torch.device("cuda"), torch.float32)
    choose_backend(Backend.C, CPU, torch.float64)


# A model


def test_set_backend_decides_what_runs(sparse_llama: Any, calls: list[int]) -> None:
    expected = tiny.logits(sparse_llama, tiny.SHORT)
    assert calls == [tiny.SHORT] * 2
    for name, count in (("torch", 0), ("c", 2), ("auto", 2)):
        set_backend(sparse_llama, name)
        calls.clear()
        assert tiny.close(tiny.logits(sparse_llama, tiny.SHORT), expected)
        tiny.logits(sparse_llama, tiny.LONG)  # never more than MAX_OP_TOKENS
        assert len(calls) == count


def test_set_backend_counts_tokens_not_positions(sparse_llama: Any, calls: list[int]) -> None:
    ids = tiny.tokens(4, 4)
    with torch.no_grad():
        sparse_llama(input_ids=ids, use_cache=False)
        assert calls == [16, 16]
        sparse_llama(input_ids=torch.cat([ids, ids[:1]]), use_cache=False)
    assert calls == [16, 16]


def test_auto_in_bf16_leaves_batches_to_torch(sparse_llama: Any, calls: list[int]) -> None:
    model = sparse_llama.bfloat16()
    crossover = AUTO_TOKENS[torch.bfloat16]
    tiny.logits(model, crossover)
    assert calls == [crossover] * 2
    calls.clear()
    tiny.logits(model, crossover + 1)
    assert calls == []
    set_backend(model, "c")
    tiny.logits(model, MAX_OP_TOKENS)
    assert calls == [MAX_OP_TOKENS] * 2


@pytest.mark.parametrize("down_copy", [True, False])
def test_set_backend_with_and_without_a_copy(
    sparse_llama: Any, calls: list[int], down_copy: bool
) -> None:
    expected = tiny.logits(sparse_llama, tiny.SHORT)
    set_backend(sparse_llama, "c", down_copy)
    modules = sparse_modules(sparse_llama).values()
    assert all(m._catsparse_down_t is None for m in modules)  # not before it is needed
    assert tiny.close(tiny.logits(sparse_llama, tiny.SHORT), expected)
    assert all((m._catsparse_down_t is not None) == down_copy for m in modules)
    set_backend(sparse_llama, "torch")
    assert all(m._catsparse_down_t is None for m in modules)


def test_set_backend_survives_a_deepcopy(sparse_llama: Any, calls: list[int]) -> None:
    set_backend(sparse_llama, "torch", down_copy=False)
    other = copy.deepcopy(sparse_llama)
    tiny.logits(other, tiny.SHORT)
    assert calls == []
    set_backend(other, "c")
    tiny.logits(other, tiny.SHORT)
    assert len(calls) == 2
    assert paths(sparse_llama) == ["torch, dense matmuls (asked for)"] * 2


def test_torch_is_dense_bit_for_bit_at_sparsity_0(llama: Any, calibration: Any) -> None:
    for length in (1, tiny.SHORT, MAX_OP_TOKENS, tiny.LONG):
        dense = tiny.logits(llama, length)
        catsparse.sparsify(llama, calibration, 0.0)
        set_backend(llama, "torch")
        assert torch.equal(tiny.logits(llama, length), dense)
        catsparse.densify(llama)


def test_nothing_changes_if_the_backend_cannot_run(sparse_llama: Any, no_compiler: str) -> None:
    set_backend(sparse_llama, "torch", down_copy=False)
    with pytest.raises(CatsparseError) as caught:
        set_backend(sparse_llama, "c")
    assert str(caught.value) == (
        f"model.layers.0.mlp cannot run the backend c: {no_compiler}; use auto"
    )
    for module in sparse_modules(sparse_llama).values():
        assert module.catsparse_backend is Backend.TORCH
        assert not module.catsparse_down_copy
    set_backend(sparse_llama, "auto")  # goes, in torch
    dense = tiny.logits(sparse_llama, tiny.SHORT)
    set_backend(sparse_llama, "torch")
    assert torch.equal(tiny.logits(sparse_llama, tiny.SHORT), dense)


def test_one_layer_that_cannot_run_it(sparse_llama: Any) -> None:
    """The second layer is in fp64: the first is left alone."""
    sparse_llama.model.layers[1].mlp.double()
    with pytest.raises(CatsparseError, match=r"layers\.1\.mlp .* no kernel for float64; use auto"):
        set_backend(sparse_llama, "c")
    assert sparse_llama.model.layers[0].mlp.catsparse_backend is Backend.AUTO


@pytest.mark.parametrize("name", ["gpu", "", "C", "cpu"])
def test_unknown_backend(sparse_llama: Any, name: str) -> None:
    with pytest.raises(CatsparseError, match="auto, torch, c") as caught:
        set_backend(sparse_llama, name)
    assert "\n" not in str(caught.value)


def test_dense_model(llama: Any) -> None:
    with pytest.raises(CatsparseError, match=r"not sparse; call catsparse\.sparsify"):
        set_backend(llama, "torch")


def test_densify_forgets_the_backend(sparse_llama: Any, calibration: Any) -> None:
    set_backend(sparse_llama, "torch", down_copy=False)
    catsparse.densify(sparse_llama)
    catsparse.sparsify(sparse_llama, calibration)
    for module in sparse_modules(sparse_llama).values():
        assert (module.catsparse_backend, module.catsparse_down_copy) == (Backend.AUTO, True)


# What explain says


def test_explain_each_backend(sparse_llama: Any, calls: list[int]) -> None:
    auto = f"the c kernel (faster than torch up to {AUTO_TOKENS[torch.float32]} tokens)"
    both = "reading kept rows of up and down"
    up = "reading kept rows of up, all of down (no copy)"
    assert paths(sparse_llama) == [f"{auto}, {both}"] * 2
    set_backend(sparse_llama, "auto", down_copy=False)
    assert paths(sparse_llama) == [f"{auto}, {up}"] * 2
    set_backend(sparse_llama, "c")
    assert paths(sparse_llama) == [f"the c kernel (asked for), {both}"] * 2
    set_backend(sparse_llama, "torch")
    assert paths(sparse_llama) == ["torch, dense matmuls (asked for)"] * 2
    set_backend(sparse_llama, "auto")
    tokens = AUTO_TOKENS[torch.bfloat16]
    sparse_llama.bfloat16()
    assert f"faster than torch up to {tokens} tokens" in paths(sparse_llama)[0]
    sparse_llama.double()
    assert paths(sparse_llama) == ["torch, dense matmuls (no kernel for float64)"] * 2


def test_info_asks_for_what_is_in_the_file(
    llama: Any, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def choose(*asked: Any) -> Choice:
        seen.append(asked[3:])
        left_out = "no room" if asked[4].preview else None
        return Choice(Backend.CUDA, 4, "as on a GPU", left_out)

    calibration = catsparse.calibrate(llama, windows, preview=8, progress=False)
    config = catsparse.sparsify(llama, calibration, 0.5).catsparse.config
    monkeypatch.setattr(explanation, "choose_backend", choose)
    found = explanation.decode_paths(config)
    words = "the cuda kernel (as on a GPU), without the preview (no room)"
    assert found == dict.fromkeys(("float32", "bfloat16", "float16"), words)
    site = config.sites[SITES[0]]
    sizes = (site.hidden_size, site.intermediate_size, site.hidden_size)
    assert seen == [(sizes, Decisions(PreviewKind(8, products=True), second=True), None)] * 3
    assert "without" not in explanation.decode_paths()["float32"]


def test_explain_without_a_compiler(sparse_llama: Any, no_compiler: str) -> None:
    assert paths(sparse_llama) == [f"torch, dense matmuls ({no_compiler})"] * 2


def test_explain_layers_that_differ(sparse_llama: Any) -> None:
    sparse_llama.model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: None)
    set_backend(sparse_llama, "torch")
    assert paths(sparse_llama) == [
        "torch, dense matmuls (asked for)",
        "masked children (down_proj is hooked)",
    ]


def test_on_a_gpu_no_kernel_runs_without_the_copy(
    sparse_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel would run, as far as a machine without a GPU can tell."""

    def as_on_a_gpu(asked: Backend, *_: Any) -> Choice:
        found = Backend.CUDA if asked is Backend.AUTO else asked
        return Choice(found, 4, "as on a GPU")

    monkeypatch.setattr(weights, "choose_backend", as_on_a_gpu)
    mlp = sparse_llama.model.layers[0].mlp
    assert mlp.choose_backend(Backend.AUTO, True) == Choice(Backend.CUDA, 4, "as on a GPU")
    for asked, name in ((Backend.AUTO, "cuda"), (Backend.CUDA, "cuda"), (Backend.TRITON, "triton")):
        reason = f"the {name} kernel needs the copy of the down projection"
        assert mlp.choose_backend(asked, False) == Choice(Backend.TORCH, 0, reason)
    set_backend(sparse_llama, "auto", down_copy=False)
    assert "needs the copy" in paths(sparse_llama)[0]
    with pytest.raises(CatsparseError, match="cannot run the backend cuda: the cuda kernel needs"):
        set_backend(sparse_llama, "cuda", down_copy=False)


@pytest.mark.parametrize("weights", ["int8", "fp8", "int4"])
def test_packed_weights_run_the_kernel_for_all_few_tokens(weights: str) -> None:
    choice = choose_backend(Backend.AUTO, CPU, torch.bfloat16, (64, 5, 64), packed=weights)
    if choice.backend is Backend.C:  # a compiler is there
        assert choice.kernel_tokens == MAX_OP_TOKENS
    previewed = choose_backend(
        *(Backend.AUTO, CPU, torch.bfloat16, (64, 5, 64), PREVIEWED), packed=weights
    )
    assert (previewed.without_preview is not None) == (weights == "int4")
