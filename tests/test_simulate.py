"""The simulator: bytes by hand, how they scale, its fit, and its errors on measured rows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from catsparse import CatsparseError
from catsparse.bench import costs, find_shape
from catsparse.bench.costs import Measured, check, fit, fitted_machine, machine, read_measured
from catsparse.bench.shapes import SHAPES, Shape, random_model
from catsparse.bench.simulate import Costs, Machine, simulate, simulated_row, sum_seconds
from catsparse.bench.traffic import (
    Setting,
    layer_bytes,
    memory_bytes,
    row_bytes,
    sparse_tokens,
    union,
    visits,
)
from catsparse.report import plot_simulated, simulated_figure
from command import run

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SMALL = Shape("small", 128, 256, 2, 4, 2, 1000)  # heads of 32
ATTENTION = 2 * 128 * (128 + 2 * 64 + 128)  # bf16: q, k and v, o
MLP = 2 * 3 * 256 * 128
HEAD = 2 * 1000 * 128
PREVIEW = 256 * 80  # two groups of 64 in 4 bits, and 16 bytes of scales
ROUND = Costs(efficiency=0.5, token=0.1, layer=1e-6, cache_efficiency=0.25, preview=2e-6)
MACHINE = Machine("catsparse", 1e12, ROUND, replace(ROUND, layer=5e-6), 1e-5, 1e11)


def setting(**changes: Any) -> Setting:
    return Setting(**({"shape": SMALL} | changes))


def mlp_bytes(**changes: Any) -> float:
    chosen = setting(**changes)
    return layer_bytes(chosen, sparse_tokens(chosen, "catsparse")).mlp


# Bytes


def test_bytes_of_a_layer_by_hand() -> None:
    layer = layer_bytes(setting(context=100), 4)
    assert (layer.attention, layer.mlp, layer.dense_mlp) == (ATTENTION, MLP, MLP)
    assert layer.cache == 100 * 2 * 2 * 32 * 2
    assert layer_bytes(setting(batch=3, context=7), 4).cache == 3 * 7 * 2 * 2 * 32 * 2


@pytest.mark.parametrize("name", SHAPES)
def test_bytes_are_those_of_the_model(name: str) -> None:
    """All weight matrices that a token reads, as torch counts them."""
    shape = find_shape(name)
    model = random_model(shape, torch.bfloat16, "meta")
    matrices = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    embedding = 0 if shape.tied else model.get_input_embeddings().weight.nbytes
    step = simulate(Setting(shape), MACHINE)
    layer = step.layer
    assert shape.layers * (layer.attention + layer.mlp) + step.head == matrices - embedding


def test_what_sparsity_skips_by_hand() -> None:
    assert mlp_bytes(sparsity=0.5) == pytest.approx(MLP * 2 / 3)
    assert mlp_bytes(sparsity=0.5, preview=4) == pytest.approx(MLP / 2 + PREVIEW)
    assert mlp_bytes(sparsity=0.5, preview=4, products=True) == pytest.approx(MLP / 2 + 2 * PREVIEW)
    assert mlp_bytes(sparsity=0.5, batch=2) == pytest.approx(MLP * (1 + 2 * 0.75) / 3)
    assert mlp_bytes(sparsity=0.5, batch=4) == pytest.approx(MLP * (1 + 2 * 0.9375) / 3)
    assert mlp_bytes(sparsity=0.5, batch=5) == MLP  # dense matmuls
    assert mlp_bytes(sparsity=0.5, preview=4, batch=5) == MLP  # which read no preview


def test_rows_of_every_format() -> None:
    assert [row_bytes(4096, name) for name in ("bf16", "int8", "fp8")] == [8192, 4100, 4100]
    assert row_bytes(4096, "int4") == 2048 + 128
    assert mlp_bytes(weights="int8") == 3 * 256 * (128 + 4)
    # Up to sixteen tokens of packed weights, in groups of four that each read their own.
    eight = mlp_bytes(weights="int8", sparsity=0.9, batch=8)
    assert eight == pytest.approx(2 * mlp_bytes(weights="int8", sparsity=0.9, batch=4))


def test_union_by_hand() -> None:
    assert union(0.5, 1, 0.0) == 0.5
    assert union(0.5, 3, 0.0) == 0.125
    assert union(0.5, 3, 1.0) == 0.5
    assert union(0.5, 4, 0.5) == 0.25
    assert union(0.5, 0, 0.0) == 1.0


def test_a_union_of_random_masks_is_the_formula() -> None:
    keep = torch.rand(4, 200_000, generator=torch.Generator().manual_seed(0)) >= 0.7
    assert 1 - float(keep.any(0).float().mean()) == pytest.approx(union(0.7, 4, 0.0), abs=0.003)


def test_ranks_share_weights_but_not_the_last_key_value_head() -> None:
    one, two, four = (layer_bytes(setting(tp=tp, sparsity=0.5), 4) for tp in (1, 2, 4))
    assert (two.attention, two.mlp, two.cache) == (ATTENTION / 2, one.mlp / 2, one.cache / 2)
    assert four.mlp == one.mlp / 4
    assert four.cache == two.cache  # two heads, four ranks
    assert four.attention == 2 * 128 * (32 + 2 * 32 + 32)
    heads = [simulate(setting(tp=tp), MACHINE).head for tp in (1, 2, 4)]
    assert heads == [HEAD, HEAD / 2, HEAD / 4]


def test_visits_are_a_binomial() -> None:
    chances = dict(visits(3, 4, 1))
    assert chances[0] == pytest.approx(0.75**3)
    assert chances[3] == pytest.approx(0.25**3)
    assert sum(chances.values()) == pytest.approx(1)
    assert visits(5, 3, 3) == [(0, 0.0), (5, 1.0)]
    assert sum(chance for _, chance in visits(4096, 256, 8)) == pytest.approx(1)


def test_experts_by_hand() -> None:
    """Of E experts a token visits k: closed forms for the visited ones and for the rows read."""
    router = 2 * 128 * 8
    one = layer_bytes(setting(experts=8, active=2), 4)
    assert one.mlp == pytest.approx(2 * MLP)
    assert one.attention == ATTENTION + router
    batch, s, p = 3, 0.5, 2 / 8
    three = layer_bytes(setting(experts=8, active=2, batch=batch, sparsity=s), 4)
    assert three.dense_mlp == pytest.approx(8 * (1 - (1 - p) ** batch) * MLP)
    gate = 1 - (1 - p) ** batch
    rest = 1 - (1 - p + p * s) ** batch
    assert three.mlp == pytest.approx(8 * MLP / 3 * (gate + 2 * rest))


def test_experts_of_random_routes() -> None:
    """The same by drawing routes and masks; an expert of more than two tokens is dense."""
    rng = torch.Generator().manual_seed(0)
    batch, rounds, read = 4, 2000, 0.0
    for _ in range(rounds):
        routes = [torch.randperm(6, generator=rng)[:2].tolist() for _ in range(batch)]
        for expert in range(6):
            tokens = sum(expert in route for route in routes)
            if tokens > 2:
                read += MLP
            elif tokens:
                keep = torch.rand(tokens, 256, generator=rng) >= 0.7
                read += MLP / 3 * (1 + 2 * float(keep.any(0).float().mean()))
    found = layer_bytes(setting(experts=6, active=2, batch=batch, sparsity=0.7), 2).mlp
    assert found == pytest.approx(read / rounds, rel=0.02)


def test_what_a_gpu_holds() -> None:
    def held(**changes: Any) -> float:
        chosen = setting(context=0, **changes)
        return memory_bytes(chosen, layer_bytes(chosen, 4))

    assert held() == 2 * (ATTENTION + MLP) + 2 * HEAD
    assert held(sparsity=0.5) == pytest.approx(2 * (ATTENTION + MLP * 4 / 3) + 2 * HEAD)
    assert held(pp=2) == ATTENTION + MLP + HEAD
    assert held(experts=4) == 2 * (ATTENTION + 2 * 128 * 4 + 4 * MLP) + 2 * HEAD
    with_preview = held(sparsity=0.5, preview=4, products=True)
    assert with_preview == pytest.approx(held(sparsity=0.5) + 2 * 2 * PREVIEW)
    # Packed by input there is no copy of W_down; scales are four bytes a row, the embedding bf16.
    rows = 2 * (256 + 128 + 3 * 256) + 1000
    packed = (2 * (ATTENTION + MLP) + HEAD) / 2 + 4 * rows
    assert held(sparsity=0.5, weights="int8") == packed + HEAD
    tied = replace(SMALL, tied=True)
    assert held(shape=tied) == 2 * (ATTENTION + MLP) + HEAD
    assert held(shape=tied, weights="int8") == packed + HEAD


@pytest.mark.parametrize(
    ("sparsity", "preview", "products", "most"),
    [(0.5, None, False, 4), (0.2, None, False, 2), (0.5, 4, True, 2), (0.7, 4, True, 4)],
)
def test_vllm_runs_sparse_what_skips_something(
    sparsity: float, preview: int | None, products: bool, most: int
) -> None:
    """s^T of 2/3 above 2%; with a preview of products less the bytes of it."""
    chosen = Setting(find_shape("mistral-7b"), sparsity, preview=preview, products=products)
    assert sparse_tokens(chosen, "vllm") == most
    assert sparse_tokens(chosen, "catsparse") == 4


@pytest.mark.parametrize(
    "changes",
    [{"tp": 3}, {"tp": 8}, {"pp": 3}, {"active": 2}, {"weights": "int4", "preview": 4},
     {"shape": Shape("8,16", 8, 16)}],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(CatsparseError, match=r"give|leave|name"):
        setting(**changes)


# Time


def test_time_of_a_step_by_hand() -> None:
    step = simulate(setting(sparsity=0.5, batch=2, context=50, preview=4), MACHINE)
    mlp = MLP * 0.75 + PREVIEW
    stream = (2 * (ATTENTION + mlp) + HEAD) / 0.5e12 * 1.1
    cache = 2 * 2 * 50 * 2 * 2 * 32 * 2 / 0.25e12
    assert step.latency == pytest.approx(stream + cache + 2 * 3e-6)
    assert step.slowest == pytest.approx(step.latency)
    parts = (step.weights, step.cache, step.fixed, step.links)
    assert sum(parts) == pytest.approx(step.latency)
    assert parts[2:] == (pytest.approx(6e-6), 0)


def test_many_tokens_have_their_own_costs() -> None:
    assert simulate(setting(batch=5), MACHINE).fixed == pytest.approx(2 * 5e-6)
    assert simulate(setting(batch=4), MACHINE).fixed == pytest.approx(2 * 1e-6)
    on = replace(MACHINE, engine="vllm")
    assert simulate(setting(batch=5), on).fixed == pytest.approx(2 * 1e-6)
    with pytest.raises(CatsparseError, match="--engine vllm"):
        simulate(setting(batch=17), MACHINE)


def test_links_by_hand() -> None:
    assert sum_seconds(1e6, 1, MACHINE) == 0
    assert sum_seconds(1e6, 4, MACHINE) == pytest.approx(1e-5 + 1.5 * 1e6 / 1e11)
    two = simulate(setting(tp=2), MACHINE)
    message, logits = 128 * 2, 1000 * 4
    sums = 2 * 2 * (1e-5 + message / 1e11)
    assert two.links == pytest.approx(sums + 1e-5 + logits / 2 / 1e11)


def test_stages_by_hand() -> None:
    """A token passes all of them; with a batch in each, the slowest sets the pace."""
    shape = replace(SMALL, layers=3)
    one, two = (simulate(setting(shape=shape, pp=pp), MACHINE) for pp in (1, 2))
    hop = 1e-5 + 128 * 2 / 1e11
    assert two.latency == pytest.approx(one.latency + hop)
    head = HEAD / 0.5e12
    layer = (one.latency - head) / 3
    assert two.slowest == pytest.approx(max(2 * layer, layer + head))


SETTINGS = st.builds(
    setting,
    sparsity=st.floats(0, 0.99),
    batch=st.integers(1, 16),
    context=st.integers(0, 10_000),
    weights=st.sampled_from(["bf16", "fp8", "int8"]),
    overlap=st.floats(0, 1),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    experts=st.sampled_from([4, 8]),
    active=st.integers(1, 4),
)


@given(SETTINGS, st.sampled_from(["catsparse", "vllm"]))
def test_more_of_anything_takes_longer(chosen: Setting, engine: str) -> None:
    on = replace(MACHINE, engine=engine)
    assume(engine == "catsparse" or chosen.weights == "bf16")
    step = simulate(chosen, on)
    assert 0 < step.slowest <= step.latency
    assert simulate(replace(chosen, context=chosen.context + 1), on).latency > step.latency
    faster = replace(on, bandwidth=2 * on.bandwidth)
    assert simulate(chosen, faster).latency < step.latency
    if chosen.batch < 16 and chosen.weights == "bf16":
        assert simulate(replace(chosen, batch=chosen.batch + 1), on).latency > step.latency


@given(SETTINGS, st.floats(0, 1), st.floats(0, 1))
def test_dropping_more_or_more_alike_reads_less(chosen: Setting, a: float, b: float) -> None:
    most = sparse_tokens(chosen, "catsparse")
    less, more = sorted((a, b))
    for part in ("overlap", "sparsity"):
        low, high = (replace(chosen, **{part: 0.99 * value}) for value in (less, more))
        if part == "sparsity" and (not less or chosen.weights != "bf16"):
            continue  # packed weights are read once if dense, by groups of four tokens if not
        high_bytes, low_bytes = layer_bytes(high, most).mlp, layer_bytes(low, most).mlp
        assert high_bytes <= low_bytes * (1 + 1e-9)


def test_a_row_says_it_all() -> None:
    row = simulated_row(setting(sparsity=0.5, pp=2), MACHINE, "round")
    step, dense = (simulate(setting(sparsity=s, pp=2), MACHINE) for s in (0.5, 0.0))
    assert row.what == "simulated"
    assert row.bytes_skipped == pytest.approx(1 / 3)
    assert row.read_gb == pytest.approx(
        (2 * (ATTENTION + MLP * 2 / 3 + step.layer.cache) + HEAD) / 1e9
    )
    assert row.tokens_per_second == pytest.approx(1 / step.latency)
    assert row.full_tokens_per_second == pytest.approx(1 / step.slowest)
    assert row.vs_dense == pytest.approx(dense.latency / step.latency)
    assert 1 < row.vs_dense < row.bytes_allow
    shares = (row.weights_time, row.cache_time, row.fixed_time, row.links_time)
    assert sum(shares) == pytest.approx(1)


# The fit, and measured rows


def measured(name: str) -> list[Measured]:
    return read_measured([RESULTS / f"{name}.jsonl"])[0]


def dense(rows: Sequence[Measured], least: int, most: int) -> list[Measured]:
    return [r for r in rows if not r.setting.sparsity and least <= r.setting.batch <= most]


def close(found: Costs, table: Costs, preview: float) -> None:
    """The table is rounded to three or four digits."""
    for name, value in asdict(replace(found, preview=preview)).items():
        assert value == pytest.approx(getattr(table, name), rel=0.006, abs=1e-9), name


def test_the_table_is_what_the_committed_rows_give() -> None:
    h200, h100 = measured("decode-cuda-h200"), measured("decode-cuda-h100")
    speed = {"h200": costs.probed(h200), "h100": costs.probed(h100)}
    assert speed == pytest.approx(costs.BANDWIDTH, rel=0.001)
    fast, slow = costs.BANDWIDTH["h200"], costs.BANDWIDTH["h100"]
    start = Costs(1.0, 0.0, 0.0)
    all_free = ("efficiency", "token", "cache_efficiency", "layer")
    few = fit(dense(h200, 1, 4), fast, start, all_free)
    ops = measured("gated-mlp-cuda-h200")
    op_few, op_many = (
        fit(dense(ops, *ends), fast, start, ("efficiency", "token", "layer"))
        for ends in ((1, 4), (5, 16))
    )
    on = Machine("op", fast, op_few, op_many, 0.0, 1.0)
    extra = sorted(r.seconds - costs.predict(r, on) for r in ops if r.setting.preview)
    preview = (extra[len(extra) // 2] + extra[(len(extra) - 1) // 2]) / 2
    usual = costs.COSTS["catsparse"]
    close(few, usual[0], preview)
    close(fit(dense(h200, 5, 16), fast, usual[0], ("token", "layer")), usual[1], preview)
    vllm = fit(dense(measured("vllm-cuda"), 1, 64), slow, usual[0], ("token", "layer"))
    close(vllm, costs.COSTS["vllm"][0], preview)
    close(op_few, costs.COSTS["op"][0], preview)
    close(op_many, costs.COSTS["op"][1], preview)


def test_a_fit_finds_the_constants_behind_exact_times() -> None:
    true = Costs(0.8, 0.03, 7e-6, 0.5)
    on = Machine("catsparse", 2e12, true, true, 0, 1)
    rows = [
        Measured("decode", "a GPU", chosen, simulate(chosen, on).latency, 1.0, None)
        for chosen in (
            Setting(find_shape(name), 0.0, batch, context)
            for name, batch, context in itertools.product(
                ("mistral-7b", "llama-3.2-1b"), (1, 2, 4), (100, 9000)
            )
        )
    ]
    start = Costs(1.0, 0.0, 0.0)
    found = fit(rows, 2e12, start, ("efficiency", "token", "cache_efficiency", "layer"))
    assert asdict(found) == pytest.approx(asdict(true))
    assert fit(rows, 2e12, replace(true, layer=0.0), ("layer",)).layer == pytest.approx(7e-6)


# (rows, sparse ones only; most of the median and of any error): measured errors with some room.
BOUNDS = {
    "decode-cuda-h200": (0.025, 0.11),
    "decode-cuda-h100": (0.025, 0.025),
    "vllm-cuda": (0.03, 0.07),
    "gated-mlp-cuda-h200": (0.035, 0.15),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_sparse_rows_are_predicted(name: str) -> None:
    rows = [row for row in measured(name) if row.setting.sparsity]
    checks = check(rows, lambda row: machine(row.engine, costs.BANDWIDTH[row.gpu or ""]))
    for errors in ([c.error for c in checks], [c.vs_dense_error for c in checks]):
        sizes = sorted(map(abs, errors))
        assert sizes[len(sizes) // 2] <= BOUNDS[name][0]
        assert sizes[-1] <= BOUNDS[name][1]


def test_the_page_shows_what_the_simulator_says() -> None:
    """The cells 'tokens/s (speedup)' of docs/scale.md's table of batches."""
    text = (RESULTS.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    on = machine("vllm", costs.BANDWIDTH["h100"])
    lines = re.findall(r"^\| (exact gate|product preview), (\d\d)% \| (.*)$", text, re.MULTILINE)
    seen = 0
    for kind, share, cells in lines:
        for batch, cell in zip((1, 2, 4), cells.split(" | "), strict=False):
            if match := re.match(r"([\d,]+) \((\d\.\d\d)\)", cell):
                preview = 4 if kind == "product preview" else None
                chosen = Setting(
                    *(find_shape("mistral-7b"), int(share) / 100, batch),
                    preview=preview,
                    products=preview is not None,
                )
                row = simulated_row(chosen, on, "h100")
                assert f"{row.tokens_per_second:,.0f} ({row.vs_dense:.2f})" == match[0]
                seen += 1
    assert seen == 18


def test_rows_that_cannot_be_simulated_are_counted(tmp_path: Path) -> None:
    row = json.loads((RESULTS / "decode-cuda-h200.jsonl").read_text().splitlines()[1])
    others = [
        {"name": "another"}, {"impl": "transformers"}, {"impl": "gpt-fast"}, {"dtype": "float32"},
        {"threads": 2}, {"name": "mistral-7b, all linears"}, {"what": "tune"}, {"device": None},
        {"tokens": 17},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | other) + "\n" for other in [{}, *others]))
    found, left_out = read_measured([path])
    assert (len(found), left_out) == (1, len(others))
    assert found[0].gpu == "h200"
    assert replace(found[0], device="NVIDIA H100 PCIe").gpu is None
    assert found[0].bandwidth == pytest.approx(4.56e12, rel=0.01)


def test_methods_of_rows() -> None:
    rows = [*measured("vllm-cuda"), *measured("engines"), *measured("decode-cuda-h200")]
    kinds = {(r.what, r.setting.preview, r.setting.products) for r in rows if r.setting.sparsity}
    assert kinds == {
        *(("vllm", None, False), ("vllm", 4, True)),
        *(("decode", None, False), ("decode", 4, False), ("decode", 4, True)),
    }


# The command


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("bench", "simulate", "-o", tmp_path, "--tp", "1,2", "--pp", "2", "--sparsity", "0.5")
    code, text, _ = run(capsys, *args)
    assert code == 0
    for part in ("simulated mistral-7b", "pipeline", "links", "1.29x", "simulated.jsonl"):
        assert part in text
    code, text, _ = run(capsys, *args, "--json")
    rows = json.loads(text)["rows"]
    assert code == 0
    assert [(r["tp"], r["sparsity"]) for r in rows] == [(1, 0), (1, 0.5), (2, 0), (2, 0.5)]
    on = machine("catsparse", costs.BANDWIDTH["h200"])
    chosen = Setting(find_shape("mistral-7b"), 0.5, tp=2, pp=2)
    assert rows[3] == asdict(simulated_row(chosen, on, "h200"))
    lines = (tmp_path / "simulated.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows  # written anew by each run


@pytest.mark.parametrize(
    "option",
    [
        ("--config", "llama-3-8b"), ("--engine", "vllm"), ("--gpu", "h100"), ("--bandwidth", "1"),
        ("--sparsity", "0.6"), ("--batch", "2"), ("--context", "5000"), ("--weights", "int8"),
        ("--preview", "4"), ("--preview", "4", "--products"), ("--batch", "2", "--overlap", "0.5"),
        ("--tp", "2"), ("--pp", "2"), ("--experts", "8"),
        ("--experts", "8", "--active-experts", "2"), ("--tp", "2", "--link-latency", "50"),
        ("--tp", "2", "--link-bandwidth", "1"),
        ("--fit", str(RESULTS / "decode-cuda-h100.jsonl")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_option_does_something(
    option: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rates(*options: str) -> list[float]:
        code, text, _ = run(capsys, "bench", "simulate", "-o", tmp_path, "--json", *options)
        assert code == 0
        keys = ("tokens_per_second", "full_tokens_per_second")
        return [row[key] for row in json.loads(text)["rows"] for key in keys]

    assert rates(*option) != rates(*option[:-2] if option[-1] != "--products" else option[:-1])


def test_rows_beside_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [RESULTS / f"{name}.jsonl" for name in ("decode-cuda-h100", "gated-mlp-cuda-h200")]
    args = ["bench", "simulate", *(part for path in paths for part in ("--rows", path))]
    code, text, _ = run(capsys, *args)
    assert code == 0
    assert "predicted beside measured" in text
    assert "other rows" in text
    found = json.loads(run(capsys, *args, "--json")[1])
    assert len(found["rows"]) == sum(group["rows"] for group in found["groups"])
    first = found["rows"][0]
    assert first["error"] == pytest.approx(first["predicted"] / first["measured"] - 1)
    op = next(row for row in found["rows"] if row["what"] == "op")
    assert op["error"] == pytest.approx(op["measured"] / op["predicted"] - 1)
    fitted = json.loads(run(capsys, *args, "--fit", paths[0], "--json")[1])["rows"][0]
    assert abs(fitted["error"]) < abs(first["error"])
    slower = json.loads(run(capsys, *args, "--bandwidth", "1", "--json")[1])["rows"][0]
    assert slower["predicted"] < first["predicted"]


def test_rows_of_another_gpu_need_its_bandwidth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.loads((RESULTS / "decode-cuda-h200.jsonl").read_text().splitlines()[1])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"device": "another"}))
    code, text, _ = run(capsys, "bench", "simulate", "--rows", path, "--json")
    assert code == 0  # as probed in its own run
    assert abs(json.loads(text)["rows"][0]["error"]) < 0.05
    del row["limit"]
    path.write_text(json.dumps(row | {"device": "another"}))
    code, _, error = run(capsys, "bench", "simulate", "--rows", path)
    assert code == 2
    assert "--bandwidth" in error


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--config", "nonsense"], "mistral-7b"),
        (["--config", "128,256"], "shape of an MLP"),
        (["--engine", "ollama"], "vllm"),
        (["--gpu", "tpu"], "h100, h200"),
        (["--bandwidth", "nan"], "--bandwidth"),
        (["--bandwidth", "0"], "--bandwidth"),
        (["--bandwidth", "3", "--gpu", "h100"], "--gpu"),
        (["--sparsity", "1"], "below 1"),
        (["--sparsity", "nan"], "below 1"),
        (["--sparsity", "half"], "0.5,0.7"),
        (["--batch", "0"], "--batch"),
        (["--batch", "²"], "--batch"),
        (["--batch", "1e3"], "--batch"),
        (["--batch", "5000"], "--batch"),
        (["--batch", "32"], "--engine vllm"),
        (["--context", "-1"], "--context"),
        (["--context", "9" * 4000], "--context"),
        (["--weights", "int3"], "bf16"),
        (["--weights", "int4", "--preview", "4"], "--preview"),
        (["--weights", "fp8", "--engine", "vllm"], "--weights"),
        (["--preview", "5"], "4 or 8"),
        (["--products"], "--preview 4"),
        (["--overlap", "1.5"], "--overlap"),
        (["--overlap", "nan"], "--overlap"),
        (["--tp", "3"], "--tp"),
        (["--tp", "0"], "--tp"),
        (["--pp", "33"], "--pp"),
        (["--active-experts", "2"], "--experts"),
        (["--experts", "2", "--active-experts", "3"], "--active-experts"),
        (["--link-latency", "-1"], "--link-latency"),
        (["--link-bandwidth", "inf"], "--link-bandwidth"),
        (["--rows", "absent.jsonl"], "absent.jsonl"),
        (["--rows", "BAD"], "JSON"),
        (["--rows", "LIST"], "no row"),
        (["--rows", "NAN"], "JSON"),
        (["--rows", "NEGATIVE"], "p50"),
        (["--rows", "HALF"], "tokens"),
        (["--rows", "TRUE"], "sparsity"),
        (["--rows", "EMPTY"], "none of the 0 rows"),
        (["--rows", "GOOD", "--tp", "2"], "--tp"),
        (["--rows", "GOOD", "--plot"], "--plot"),
        (["--fit", "absent.jsonl"], "absent.jsonl"),
        (["--fit", "EMPTY"], "--bandwidth"),
        (["--fit", "EMPTY", "--bandwidth", "3"], "bench decode"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_exit_2(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (RESULTS / "decode-cuda-h200.jsonl").read_text().splitlines()[1]
    row = json.loads(good)
    texts = {
        "BAD": "{", "LIST": "[1]", "EMPTY": "", "GOOD": good,
        "NAN": json.dumps(row | {"p50": float("nan")}), "NEGATIVE": json.dumps(row | {"p50": -1}),
        "HALF": json.dumps(row | {"tokens": 1.5}), "TRUE": json.dumps(row | {"sparsity": True}),
    }  # fmt: skip
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    args = [str(tmp_path / arg) if arg in texts else arg for arg in args]
    output = [] if "--rows" in args else ["-o", tmp_path / "out"]
    code, text, error = run(capsys, "bench", "simulate", *args, *output)
    assert code == 2
    assert text == ""
    assert says in error
    assert error.count("\n") == 1
    assert len(error) < 400


def test_a_fit_of_too_little_says_so() -> None:
    rows = [row for row in measured("decode-cuda-h200") if row.setting.sparsity]
    with pytest.raises(CatsparseError, match="bench decode"):
        fitted_machine(rows, "catsparse", 1e12)
    few = dense(measured("decode-cuda-h200"), 1, 1)
    on = fitted_machine(few, "catsparse", None)
    assert on.many == costs.COSTS["catsparse"][1]
    assert on.bandwidth == pytest.approx(costs.BANDWIDTH["h200"], rel=0.001)


def test_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    args = ("bench", "simulate", "-o", tmp_path, "--plot", "--json")
    rows = json.loads(run(capsys, *args, "--batch", "1,2,4", "--tp", "1,2")[1])["rows"]
    assert {p.name for p in tmp_path.iterdir()} == {
        *("simulated.jsonl", "simulated.png", "simulated.svg")
    }
    panels = simulated_figure(rows).axes
    assert [axis.get_title(loc="left") for axis in panels] == ["GPUs a layer 1", "GPUs a layer 2"]
    lines = {line.get_label(): line for line in panels[1].lines}
    chosen = [row for row in rows if row["tp"] == 2 and row["sparsity"] == 0.7]
    assert list(lines["70% dropped"].get_xdata()) == [1, 2, 4]
    assert list(lines["70% dropped"].get_ydata()) == [row["vs_dense"] for row in chosen]
    rows = json.loads(run(capsys, *args)[1])["rows"]
    (axis,) = simulated_figure(rows).axes
    assert list(axis.lines[0].get_xdata()) == [0, 0.5, 0.7]
    rows = json.loads(run(capsys, *args, "--context", "0,100", "--sparsity", "0")[1])["rows"]
    assert plot_simulated(rows, tmp_path)
