"""Benchmarks: rows, what is timed, what is refused; nothing depends on how fast anything is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import catsparse
import tiny
from catsparse import CatsparseError, bench, modules, weights
from catsparse.bench import checks, decode, op, peers, rows, setup, shapes
from catsparse.bench.peers import Peer
from catsparse.bench.setup import INPUTS, KINDS, Setup
from catsparse.footprint import preview_bytes
from catsparse.kernels import gated_mlp, gated_mlp_reference
from catsparse.modules import sparse_modules
from catsparse.report import measured_figure, plot_speed

CPU = torch.device("cpu")
KEYS = {
    *("what", "name", "impl", "device", "threads", "dtype", "weights", "tokens", "context"),
    *("sparsity", "bytes_skipped", "p20", "p50", "p80", "limit", "of_limit", "vs_dense", "max_err"),
    *("versions", "commit"),
}


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few layers are enough to get past a cache of 32 kB."""
    monkeypatch.setattr(setup, "last_level_cache", lambda device: 2**15)


# Shapes


# Published parameter counts; Qwen3's without its q and k norms, which a Llama has not.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "qwen3-0.6b": 596_049_920 - 28 * 2 * 128,
    "qwen3-8b": 8_190_735_360 - 36 * 2 * 128,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "gemma-7b": 8_537_680_896,
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_named_shapes_have_the_published_number_of_parameters(name: str) -> None:
    model = shapes.random_model(bench.find_shape(name), torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_shape_of_ones_own() -> None:
    assert (bench.find_shape("12,34").hidden, bench.find_shape("12,34").intermediate) == (12, 34)
    assert bench.find_shape("12,34,relu").act == "relu"


@pytest.mark.parametrize("name", ["", "llama", "12", "12,", "0,4", "1,2,tanh", "-1,2", "1.5,2"])
def test_unknown_shapes_are_refused_with_the_names(name: str) -> None:
    with pytest.raises(CatsparseError, match="llama-2-7b"):
        bench.find_shape(name)


def test_an_mlp_alone_is_no_model() -> None:
    with pytest.raises(CatsparseError, match="shape of an MLP"):
        shapes.random_model(bench.find_shape("12,34"), torch.float32, "cpu")


# Rows


def test_quantiles_by_hand() -> None:
    assert rows.quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert rows.quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_rows_are_added_to_the_file(tmp_path: Path) -> None:
    row = bench.Row(
        *("op", "a", "dense", "cpu", 2, "float32", "fp32", 1, 0, 0.0, 0.0, 1.0, 2.0, 3.0),
        *(1.0, 2.0, 1.0, 0.0, {}, None),
    )
    path = tmp_path / "new" / "rows.jsonl"
    bench.append_rows(path, [row])
    bench.append_rows(path, [replace(row, impl="catsparse")])
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["impl"] for r in read] == ["dense", "catsparse"]
    assert set(read[0]) == KEYS


def test_the_machine_has_a_name_and_a_cache() -> None:
    assert rows.device_name(CPU)
    assert rows.last_level_cache(CPU) >= 2**20
    assert {"python", "torch", "catsparse"} <= set(rows.versions())


def test_probe_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PROBE_BYTES", 4096)
    monkeypatch.setattr(rows, "seconds", lambda work, device: 0.5)
    probe = rows.Probe(CPU)
    probe.measure()
    assert probe.bandwidth == 8192


# bench op

SMALL: tuple[Any, ...] = (shapes.find_shape("40,72"), torch.float32, 1, CPU, "auto", True)


def run_op(**options: Any) -> list[bench.Row]:
    settings: dict[str, Any] = {
        "shape": bench.find_shape("40,72"),
        "dtype": torch.float32,
        "sparsities": [0.5, 0.9],
        "tokens": 1,
        "device": CPU,
        "rounds": 3,
    }
    return bench.bench_op(**(settings | options))


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("dtype", rows.TOLERANCE, ids=str)
def test_op_rows(dtype: torch.dtype) -> None:
    found = run_op(dtype=dtype)
    assert [(r.impl, r.sparsity) for r in found] == [
        ("dense", 0.0),
        ("catsparse", 0.0),
        ("catsparse", 0.5),
        ("catsparse", 0.9),
    ]
    weight_bytes = 3 * 40 * 72 * dtype.itemsize
    for row in found:
        assert set(asdict(row)) == KEYS
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.bytes_skipped == pytest.approx(2 / 3 * row.sparsity, abs=0.01)
        assert row.of_limit == pytest.approx(row.p50 / row.limit)
        assert row.limit == pytest.approx(found[0].limit * (1 - row.bytes_skipped))
        assert row.max_err <= rows.TOLERANCE[dtype]
        assert row.limit < weight_bytes / 1e9 * 1e6  # no memory under test is slower than 1 GB/s
    dense = min(found[0].p50, found[1].p50)
    assert [r.vs_dense for r in found] == pytest.approx([dense / r.p50 for r in found])


@pytest.mark.usefixtures("small_cache")
def test_rows_of_packed_weights() -> None:
    floats = run_op(shape=bench.find_shape("64,192"))
    found = run_op(shape=bench.find_shape("64,192"), formats=["int8", "int4"])
    packed = found[len(floats) :]
    assert [(r.impl, r.weights, r.sparsity) for r in packed] == [
        *(("catsparse_int8", "int8", s) for s in (0.0, 0.5, 0.9)),
        *(("catsparse_int4", "int4", s) for s in (0.0, 0.5, 0.9)),
    ]
    assert {r.weights for r in found[: len(floats)]} == {"fp32"}
    dense = found[0]
    for row in packed:
        each = {"int8": 1, "int4": 0.5 + 2 / 64}[row.weights]
        assert row.bytes_skipped == pytest.approx(2 / 3 * row.sparsity, abs=0.01)
        assert row.limit == pytest.approx(dense.limit * each / 4 * (1 - row.bytes_skipped))
        assert row.vs_dense == pytest.approx(min(found[0].p50, found[1].p50) / row.p50)
        assert row.max_err <= rows.TOLERANCE[torch.float32]


@pytest.mark.usefixtures("small_cache")
def test_a_wrong_packed_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "gated_mlp", lambda *a, **k: 1.5 * gated_mlp(*a, **k))
    with pytest.raises(CatsparseError, match="catsparse_int8"):
        run_op(shape=bench.find_shape("64,192"), formats=["int8"])
    with pytest.raises(CatsparseError, match="in int4: rows of 40"):
        run_op(formats=["int4"])


@pytest.mark.usefixtures("small_cache")
def test_several_tokens_skip_what_all_of_them_drop() -> None:
    one, four = run_op(), run_op(tokens=4)
    assert four[3].tokens == 4
    # Independent masks: 0.9 of the neurons dropped by each of four tokens, 0.9^4 by all.
    assert four[3].bytes_skipped == pytest.approx(2 / 3 * 0.9**4, abs=0.05)
    assert four[3].bytes_skipped < one[3].bytes_skipped


@pytest.mark.usefixtures("small_cache")
def test_without_the_copy_half_is_skipped() -> None:
    with_copy, without = run_op(), run_op(down_copy=False)
    assert without[3].bytes_skipped == pytest.approx(with_copy[3].bytes_skipped / 2)


@pytest.mark.usefixtures("small_cache")
def test_every_call_is_timed_and_the_bar_advances(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    assert len(run_op(rounds=4, advance=lambda: calls.append(1))) == 4
    assert len(calls) == 5  # one round warms up


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("sparsities", [[0.5], [0.5, 0.7], [0.5, 0.7, 0.9]], ids=len)
def test_every_variant_meets_every_layer_and_input(
    sparsities: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    met: dict[str, set[tuple[int, int]]] = {"first": set(), "second": set()}
    timing: list[int] = []

    def watcher(name: str) -> Peer:
        def prepare(w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Prepared:
            call = honest(w_gate, w_up, w_down)

            def watched(x: Tensor, t: Tensor, act: str) -> Tensor:
                if timing:
                    met[name].add((w_gate.data_ptr(), x.data_ptr()))
                return call(x, t, act)

            return watched

        return prepare

    clock = op.seconds
    monkeypatch.setattr(op, "seconds", lambda *a: timing.append(1) or clock(*a))
    run_op(sparsities=sparsities, rounds=47, peers={n: watcher(n) for n in met})
    for seen in met.values():
        layers, inputs = ({pair[i] for pair in seen} for i in (0, 1))
        assert len(inputs) == INPUTS
        assert len(layers) == len(Setup(*SMALL).layers)


@pytest.mark.usefixtures("small_cache")
def test_torch_skips_no_bytes() -> None:
    assert [r.bytes_skipped for r in run_op(backend="torch", rounds=1)] == [0, 0, 0, 0]


@pytest.mark.usefixtures("small_cache")
def test_nothing_is_made_while_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed copy is made at a layer's first call: never in a timed one."""
    made: list[bool] = []
    setups: list[Setup] = []
    init, clock = Setup.__init__, op.seconds

    def remember(self: Setup, *arguments: Any) -> None:
        init(self, *arguments)
        setups.append(self)

    def watch(work: Callable[[], object], device: torch.device) -> float:
        made.extend(m._catsparse_down_t is not None for m in setups[0].modules)
        return clock(work, device)

    monkeypatch.setattr(Setup, "__init__", remember)
    monkeypatch.setattr(op, "seconds", watch)
    run_op(rounds=1)
    assert made
    assert all(made)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_every_activation(act: str) -> None:
    assert len(run_op(shape=bench.find_shape(f"24,40,{act}"), rounds=1)) == 4


def test_layers_exceed_the_cache_even_if_only_gates_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "last_level_cache", lambda device: 100_000)
    shape = bench.find_shape("40,72")
    made = Setup(shape, torch.float32, 1, CPU, "auto", True)
    assert len(made.layers) * 40 * 72 * 4 >= 2 * 100_000


@pytest.mark.usefixtures("small_cache")
def test_thresholds_drop_the_share_asked_for() -> None:
    made = Setup(bench.find_shape("40,72"), torch.float32, 2, CPU, "auto", True, 4)
    for s, kind in itertools.product((0.25, 0.5, 0.9), KINDS):
        for values, cut in zip(made.deciding[kind], made.thresholds(s, kind), strict=True):
            assert float((values <= cut).float().mean()) == pytest.approx(s, abs=0.005)


@pytest.mark.usefixtures("small_cache")
def test_the_op_with_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the exact gate, checked and counted; its rows of dropped neurons are skipped, too."""
    calls: list[Any] = []
    run = modules.gated_mlp

    def note(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments[9])
        return run(*arguments, **options)

    monkeypatch.setattr(modules, "gated_mlp", note)
    found = run_op(rounds=1, preview=8, sparsities=[0.0, 0.9], shape=bench.find_shape("128,256"))
    names = [row.impl for row in found]
    assert names == ["dense", "catsparse", "catsparse", "catsparse_preview8", "catsparse_product8"]
    exact, preview, product = found[2:]
    assert {None if c is None else c.shape[0] for c in calls} == {None, 256, 512}
    copies = (128 + 16) / (3 * 128 * 4)
    assert exact.bytes_skipped == pytest.approx(0.6, abs=0.01)
    assert preview.bytes_skipped == pytest.approx(0.9 - copies, abs=0.01)
    assert product.bytes_skipped == pytest.approx(0.9 - 2 * copies, abs=0.01)


Prepared = Callable[[Tensor, Tensor, str], Tensor]


def honest(w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Prepared:
    return lambda x, t, act: gated_mlp_reference(x, w_gate, w_up, w_down.t(), t, act)


def wrong(w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Prepared:
    return lambda x, t, act: 1.01 * gated_mlp_reference(x, w_gate, w_up, w_down.t(), t, act)


@pytest.mark.usefixtures("small_cache")
@pytest.mark.parametrize("tokens", [1, 5])
def test_peers_run_beside(tokens: int) -> None:
    found = run_op(peers={"honest": honest, "index_select": peers.index_select}, tokens=tokens)
    assert [r.impl for r in found[4:]] == ["honest", "honest", "index_select", "index_select"]
    assert [r.sparsity for r in found[4:]] == [0.5, 0.9, 0.5, 0.9]


@pytest.mark.usefixtures("small_cache")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(op, "seconds", lambda *_: timed.append(1) or 1.0)
    with pytest.raises(CatsparseError, match=r"wrong at sparsity 0\.5 differs"):
        run_op(peers={"wrong": wrong})
    with pytest.raises(CatsparseError, match="not timed"):
        run_op(peers={"nan": lambda *_: lambda x, t, act: x * float("nan")})
    assert not timed


def test_peer_files(tmp_path: Path) -> None:
    good = tmp_path / "mine.py"
    good.write_text("def prepare(w_gate, w_up, w_down):\n    return None\n")
    assert peers.load_peer(good)[0] == "mine"
    (tmp_path / "empty.py").write_text("")
    for path in (tmp_path / "missing.py", tmp_path / "empty.py", tmp_path):
        with pytest.raises(CatsparseError, match=r"prepare|Python file"):
            peers.load_peer(path)


# bench decode


@pytest.fixture
def sparse_model() -> Any:
    model = tiny.build(tiny.llama_config())
    ids = torch.randint(3, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    calibration = catsparse.calibrate(model, ids, progress=False)
    return catsparse.sparsify(model, calibration, 0.5, compensate=True)


PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_decode_rows(sparse_model: Any) -> None:
    found = bench.bench_decode(sparse_model, "tiny", [0.5], PROMPT, 4, rounds=2)
    assert [(r.impl, r.sparsity) for r in found] == [
        ("dense", 0.0),
        ("catsparse", 0.0),
        ("catsparse", 0.5),
    ]
    for row in found:
        assert set(asdict(row)) == KEYS
        assert (row.what, row.name, row.tokens, row.context) == ("decode", "tiny", 1, 4)
        assert row.of_limit == pytest.approx(row.p50 / row.limit)
    assert found[1].bytes_skipped == 0
    assert 0.1 < found[2].bytes_skipped < 0.6
    total, mlp = decode.bytes_per_token(sparse_model)
    cache = 2 * 2 * 2 * 8 * 4 * 4  # keys and values, layers, heads, their size, fp32, tokens
    assert decode.cache_bytes(sparse_model, 4) == cache
    bandwidth = found[0].limit * (total + cache)
    read = total + cache - found[2].bytes_skipped * mlp
    assert found[2].limit == pytest.approx(bandwidth / read)
    best = max(found[0].p50, found[1].p50)
    assert found[2].vs_dense == pytest.approx(found[2].p50 / best)


def test_the_model_is_left_as_it_was(sparse_model: Any) -> None:
    catsparse.set_backend(sparse_model, "c", down_copy=False)
    module = sparse_model.model.layers[0].mlp
    before = (module.catsparse_threshold, module.catsparse_mean, catsparse.explain(sparse_model))
    bench.bench_decode(sparse_model, "tiny", [0.9], PROMPT, 2, rounds=1)
    after = (module.catsparse_threshold, module.catsparse_mean, catsparse.explain(sparse_model))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


def test_decode_with_a_preview_and_a_second_decision() -> None:
    """Beside the exact gate; the second decision at its own sparsity only; all put back."""
    model = tiny.build(tiny.llama_config())
    calibration = catsparse.calibrate(
        model, tiny.tokens(8, 32, 7), preview=4, products_at=0.5, progress=False
    )
    catsparse.sparsify(model, calibration, 0.5, down_sparsity=0.8)
    module = model.model.layers[0].mlp
    before = (module.catsparse_product_threshold.clone(), module.catsparse_preview.clone())
    found = bench.bench_decode(model, "tiny", [0.5, 0.7], PROMPT, 4, rounds=1)
    names = [(r.impl, r.sparsity) for r in found]
    assert names == [
        ("dense", 0.0),
        *(("catsparse", s) for s in (0.0, 0.5, 0.7)),
        *(("catsparse_preview4", s) for s in (0.5, 0.7)),
    ]
    skipped = {name: row.bytes_skipped for name, row in zip(names, found, strict=True)}
    assert skipped["catsparse", 0.0] == 0
    # (0.5 + 0.8) / 3 is behind both decisions, 1 / 3 behind the gate's alone.
    assert skipped["catsparse", 0.5] == pytest.approx((0.5 + 0.8) / 3, abs=0.09)
    assert skipped["catsparse", 0.7] == pytest.approx(2 / 3 * 0.7, abs=0.09)
    hidden = model.config.hidden_size
    copies = preview_bytes(hidden, 4) / (3 * 4 * hidden)
    assert skipped["catsparse_preview4", 0.7] == pytest.approx(0.7 - copies, abs=0.09)
    assert torch.equal(module.catsparse_product_threshold, before[0])
    assert torch.equal(module.catsparse_preview, before[1])


def test_decode_of_method_product() -> None:
    """Its preview's variants only: without one it would read all of gate and up."""
    model = tiny.build(tiny.llama_config())
    calibration = catsparse.calibrate(model, tiny.tokens(8, 32, 7), preview=4, progress=False)
    catsparse.sparsify(model, calibration, 0.6)
    module = next(iter(sparse_modules(model).values()))
    before = module.catsparse_threshold.clone(), module.catsparse_preview.clone()
    found = bench.bench_decode(model, "tiny", [0.5, 0.7], tiny.tokens(1, 4), 8, 1)
    assert [(r.impl, r.sparsity) for r in found] == [
        *(("dense", 0.0), ("catsparse", 0.0)),
        *(("catsparse_product4", s) for s in (0.5, 0.7)),
    ]
    copies = 2 * preview_bytes(module.gate_proj.in_features, 4) / (3 * 4 * 32)
    assert found[1].bytes_skipped == 0
    assert found[3].bytes_skipped == pytest.approx(0.7 - copies, abs=0.09)
    assert torch.equal(module.catsparse_threshold, before[0])
    assert torch.equal(module.catsparse_preview, before[1])


def test_decode_of_all_linears_says_so() -> None:
    """Attention's inputs count, too: by hand, the same share of all weights."""
    model = tiny.build(tiny.llama_config())
    calibration = catsparse.calibrate(
        model, tiny.tokens(8, 32, 7), inputs="attention", progress=False
    )
    catsparse.sparsify(model, calibration, 0.5, scope="all")
    found = bench.bench_decode(model, "tiny", [0.6], tiny.tokens(1, 4), 8, 1)
    assert {row.name for row in found} == {"tiny, all linears"}
    layer = model.model.layers[0]
    mlp = sum(p.numel() for p in layer.mlp.parameters())
    attention = sum(p.numel() for p in layer.self_attn.parameters() if p.dim() == 2)
    expected = 0.6 * (2 / 3 * mlp + attention) / (mlp + attention)
    assert found[-1].bytes_skipped == pytest.approx(expected, abs=0.09)


def test_decode_where_the_preview_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model does then: the exact product decides, all of gate and up is read."""
    model = tiny.build(tiny.llama_config())
    calibration = catsparse.calibrate(model, tiny.tokens(8, 32, 7), preview=4, progress=False)
    choose = weights.choose_backend
    monkeypatch.setattr(
        weights, "choose_backend", lambda *a: replace(choose(*a), without_preview="no room")
    )
    catsparse.sparsify(model, calibration, 0.5)
    found = bench.bench_decode(model, "tiny", [0.6], tiny.tokens(1, 4), 8, 1)
    by_impl = {(r.impl, r.sparsity): r.bytes_skipped for r in found}
    assert {impl for impl, _ in by_impl} == {"dense", "catsparse"}
    assert by_impl["catsparse", 0.6] == pytest.approx(0.6 / 3, abs=0.05)


def test_experts_have_no_known_byte_limit(sparse_model: Any) -> None:
    sparse_model.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(CatsparseError, match="expert weights"):
        bench.bench_decode(sparse_model, "tiny", [0.5], PROMPT, 4, rounds=1)


def test_a_batch_reads_what_any_of_its_sequences_keeps(sparse_model: Any) -> None:
    batch = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(2))
    one = bench.bench_decode(sparse_model, "tiny", [0.7], batch[:1], 12, rounds=1)
    four = bench.bench_decode(sparse_model, "tiny", [0.7], batch, 12, rounds=1)
    assert {row.tokens for row in four} == {4}
    assert 0 < four[-1].bytes_skipped < 0.7 * one[-1].bytes_skipped
    assert all(module.catsparse_counter is None for module in sparse_modules(sparse_model).values())


def test_a_batch_needs_a_longer_run_than_the_one_taken_off(sparse_model: Any) -> None:
    batch = torch.full((2, 4), 5)
    with pytest.raises(CatsparseError, match="give 10 or more"):
        bench.bench_decode(sparse_model, "tiny", [0.5], batch, 8, rounds=1)


def test_the_union_of_a_step() -> None:
    union = checks._Union(2)
    for keep in (
        torch.tensor([[[True, False, False, True]], [[True, True, False, False]]]),
        torch.ones(1, 5, 4, dtype=torch.bool),  # a prompt's tokens
    ):
        union(keep, keep)
    assert (int(union.kept), union.total) == (3, 4)
    fewer = torch.tensor([[[True, False, False, False]], [[False] * 4]])
    union(torch.ones(2, 1, 4, dtype=torch.bool), fewer)
    assert (int(union.keep), int(union.kept), union.total) == (7, 4, 8)


def test_intervals_leave_the_prompt_out(sparse_model: Any) -> None:
    variant = decode.Variant("dense", 0.0)
    assert len(decode._generate(sparse_model, variant, PROMPT, 5)) == 4


def test_a_kernel_that_is_wrong_stops_the_benchmark(
    sparse_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sparse_model.model.layers[0].mlp)
    right = module.forward_few
    monkeypatch.setattr(module, "forward_few", lambda self, *a: right(self, *a) * 1.01)
    with pytest.raises(CatsparseError, match="differs from the reference"):
        bench.bench_decode(sparse_model, "tiny", [0.5], PROMPT, 4, rounds=1)


def test_bytes_of_a_token_leave_out_an_embedding_that_is_only_looked_up() -> None:
    def count(tied: bool) -> tuple[int, int]:
        model = tiny.build(tiny.llama_config(tie_word_embeddings=tied))
        ids = torch.randint(3, 60, (2, 16))
        catsparse.sparsify(model, catsparse.calibrate(model, ids, progress=False))
        return decode.bytes_per_token(model)

    tied, untied = count(True), count(False)
    assert tied == untied
    model = tiny.build(tiny.llama_config(tie_word_embeddings=True))
    assert tied[0] == sum(p.numel() * 4 for p in model.parameters())
    mlps = [layer.mlp for layer in model.model.layers]
    assert tied[1] == sum(p.numel() * 4 for mlp in mlps for p in mlp.parameters())


def test_a_graph_meets_every_layer_equally_often() -> None:
    for layers in (1, 2, 5, 7, 24, 25, 100):
        calls = op.graph_calls(layers)
        assert calls % layers == 0
        assert calls >= op.GRAPH_CALLS


# The plots


@pytest.mark.usefixtures("small_cache")
def test_plots_of_several_shapes_and_dtypes(tmp_path: Path) -> None:
    found = run_op(rounds=1) + run_op(rounds=1, dtype=torch.bfloat16, tokens=2)
    found += run_op(rounds=1, shape=bench.find_shape("48,96"), peers={"gather": peers.index_select})
    paths = plot_speed([asdict(row) for row in found], tmp_path)
    names = ("speed", "latency")
    assert {p.name for p in paths} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert all(path.stat().st_size > 5000 for path in paths)


@pytest.mark.usefixtures("small_cache")
def test_latency_shows_what_was_measured() -> None:
    rows = [asdict(row) for row in run_op(rounds=1, peers={"gather": peers.index_select})]
    rows.append(rows[0] | {"impl": "dense_compiled", "p50": 123.0})
    other = [row | {"name": "other", "p50": 2 * row["p50"]} for row in rows]
    figure = measured_figure(rows + other)
    panels = [axis for axis in figure.axes if axis.lines]
    assert [axis.get_title(loc="left").split(",")[0] for axis in panels] == ["40", "other"]
    for axis, times in zip(panels, (1.0, 2.0), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        assert set(lines) == {"byte limit", "dense", "dense_compiled", "catsparse", "gather"}
        own = [row for row in rows if row["impl"] == "catsparse"]
        assert list(lines["catsparse"].get_xdata()) == [0.0, 0.5, 0.9]
        assert list(lines["catsparse"].get_ydata()) == [times * row["p50"] for row in own]
        assert list(lines["byte limit"].get_ydata()) == [row["limit"] for row in own]
        assert list(lines["dense_compiled"].get_ydata()) == [times * 123.0] * 2
        assert list(lines["gather"].get_xdata()) == [0.5, 0.9]


def test_decode_rows_have_a_rate(tmp_path: Path, sparse_model: Any) -> None:
    found = bench.bench_decode(sparse_model, "tiny", [0.5], PROMPT, 3, rounds=1)
    rows = [asdict(row) for row in found]
    paths = plot_speed(rows, tmp_path)
    names = ("speed", "rate")
    assert {p.name for p in paths} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    (axis,) = measured_figure(rows).axes
    assert axis.get_ylabel() == "tokens/s"
    assert axis.get_title(loc="left").endswith("context 4")
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["catsparse"] == [found[1].p50, found[2].p50]
    assert lines["byte limit"] == [found[1].limit, found[2].limit]
