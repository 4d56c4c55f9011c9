"""Sparse models inside what people use them with: generate, compile, PEFT, torchao, accelerate."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GenerationConfig,
    Phi3Config,
    Qwen3Config,
    StaticCache,
)

import catsparse
from catsparse import CatsparseError, hub, kernels, modules
from catsparse.modules import sparse_modules
from tiny import (
    LONG,
    SHORT,
    SMALL,
    build,
    calibrate,
    close,
    llama_config,
    logits,
    masked_by_hand,
    save_base,
    tokens,
)

NEW = 8  # tokens to generate
GATED = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def calibration() -> catsparse.Calibration:
    return calibrate(build(llama_config()))


@pytest.fixture
def dense() -> Any:
    return build(llama_config())


@pytest.fixture
def sparse(calibration: catsparse.Calibration) -> Any:
    return catsparse.sparsify(build(llama_config()), calibration, 0.6)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of tokens of each eager call of the op."""
    calls: list[int] = []
    real = kernels.gated_mlp

    def counting(x: Tensor, *args: Any, backend: str) -> Tensor:
        calls.append(x.numel() // x.shape[-1])
        return real(x, *args, backend=backend)

    monkeypatch.setattr(modules, "gated_mlp", counting)
    return calls


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def greedy_by_recomputation(model: Any, ids: Tensor) -> Tensor:
    """The whole sequence through the model for every token: no cache, no generate."""
    start = ids.shape[1]
    for _ in range(NEW):
        best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids[:, start:]


def matches_by_hand(sparse: Any, dense: Any) -> bool:
    """Through the op and through the children, against the same maths by hand."""
    truth = masked_by_hand(sparse, dense)
    return all(close(logits(sparse, n), logits(truth, n)) for n in (SHORT, LONG))


# -- generate


def test_both_paths_match_the_maths_by_hand(sparse: Any, dense: Any, op_calls: list[int]) -> None:
    assert matches_by_hand(sparse, dense)
    assert op_calls == [SHORT, SHORT]
    # Compensation is part of it, and is not small.
    without = masked_by_hand(sparse, dense, compensate=False)
    assert not close(logits(without), logits(sparse), 0.01)


@pytest.mark.parametrize("length", [SHORT, LONG])
def test_generate_equals_recomputation(
    sparse: Any, dense: Any, op_calls: list[int], length: int
) -> None:
    ids = tokens(2, length)
    out = greedy(sparse, ids)
    # 2 rows a decode step, 2 layers, NEW - 1 steps after the prefill.
    assert op_calls[-2 * (NEW - 1) :] == [2] * (2 * (NEW - 1))
    assert torch.equal(out, greedy_by_recomputation(sparse, ids))
    assert torch.equal(out, greedy_by_recomputation(masked_by_hand(sparse, dense), ids))
    assert not torch.equal(out, greedy(dense, ids))


def test_dense_prefill_policy_in_generate(
    dense: Any, calibration: catsparse.Calibration, sparse: Any
) -> None:
    """The prompt is exact: same cache as the dense model, then sparse steps."""
    ids = tokens(1, LONG)
    model = catsparse.sparsify(build(llama_config()), calibration, 0.6, prefill="dense")
    with torch.no_grad():
        filled, expected = model(ids, use_cache=True), dense(ids, use_cache=True)
        assert torch.equal(filled.logits, expected.logits)
        step = torch.tensor([[5]])
        by_hand = masked_by_hand(model, dense)
        after = by_hand(step, past_key_values=expected.past_key_values).logits
        assert close(model(step, past_key_values=filled.past_key_values).logits, after)
        plain = dense(ids, use_cache=True)
        assert not close(dense(step, past_key_values=plain.past_key_values).logits, after, 0.01)


def test_left_padding(sparse: Any) -> None:
    """Each row of a padded batch generates what it does on its own."""
    rows = [tokens(1, length, seed=length) for length in (3, 9, 20)]
    width = max(row.shape[1] for row in rows)
    padded = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows]
    )
    together = greedy(sparse, padded, attention_mask=mask)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(greedy(sparse, row)[0], out)


def test_beam_search(sparse: Any, dense: Any, op_calls: list[int]) -> None:
    ids = tokens(2, LONG)
    out = greedy(sparse, ids, num_beams=3)
    assert op_calls[-1] == 6  # rows times beams
    assert torch.equal(out, greedy(masked_by_hand(sparse, dense), ids, num_beams=3))


def test_sampling_and_streaming(sparse: Any, dense: Any) -> None:
    ids = tokens(1, SHORT)
    outs = []
    for model in (sparse, masked_by_hand(sparse, dense)):
        torch.manual_seed(0)
        outs.append(model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=0.7))
    assert torch.equal(*outs)


def test_static_cache_generate(sparse: Any) -> None:
    ids = tokens(2, LONG)
    assert torch.equal(greedy(sparse, ids, cache_implementation="static"), greedy(sparse, ids))


def test_assisted_by_its_dense_self(sparse: Any, dense: Any) -> None:
    """The dense model drafts: the result is the sparse model's own."""
    ids = tokens(1, LONG)
    assert torch.equal(greedy(sparse, ids, assistant_model=dense), greedy(sparse, ids))


@pytest.mark.parametrize("lengths", [(2, 3), (4, 30)], ids=["packed in the op", "packed above it"])
def test_continuous_batching(sparse: Any, dense: Any, lengths: tuple[int, int]) -> None:
    if not hasattr(sparse, "generate_batch"):
        pytest.skip("this transformers has no generate_batch")
    from transformers.generation import ContinuousBatchingConfig

    prompts = [tokens(1, n, seed=n)[0].tolist() for n in lengths]
    options = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    # Its paged attention is set on the model for good: a copy serves.
    batched = copy.deepcopy(sparse).generate_batch(
        inputs=prompts,
        generation_config=options,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
    )
    outputs = [result.generated_tokens for result in batched.values()]
    alone = [greedy(sparse, torch.tensor([p]))[0].tolist() for p in prompts]
    assert sorted(outputs) == sorted(alone)
    assert alone != [greedy(dense, torch.tensor([p]))[0].tolist() for p in prompts]


def test_packed_batch_decides_by_tokens(sparse: Any, op_calls: list[int]) -> None:
    """(1, T, H) and (T, 1, H) are the same number of tokens."""
    mlp = sparse.model.layers[0].mlp
    x = torch.randn(40, 32)
    with torch.no_grad():
        for shape in ((1, 8, 32), (8, 1, 32), (8, 32), (2, 4, 32)):
            mlp(x[:8].view(shape))
        assert op_calls == [8] * 4
        packed, column = mlp(x.view(1, 40, 32)), mlp(x.view(40, 1, 32))
    assert op_calls == [8] * 4
    assert torch.equal(packed.view(40, 32), column.view(40, 32))


# -- torch.compile


@pytest.mark.parametrize(
    ("backend", "prefill", "length"),
    [
        ("eager", "masked", 1),
        ("aot_eager", "masked", 1),
        ("aot_eager", "masked", LONG),
        ("eager", "dense", 1),
        ("eager", "dense", LONG),
    ],
)
def test_compiles_without_a_graph_break(
    dense: Any, calibration: catsparse.Calibration, backend: str, prefill: str, length: int
) -> None:
    model = catsparse.sparsify(dense, calibration, 0.6, prefill=prefill)
    ids = tokens(1, length)

    def step(forward: Callable[..., Any]) -> Tensor:
        cache = StaticCache(model.config, max_cache_len=32)
        with torch.no_grad():
            return forward(input_ids=ids, past_key_values=cache).logits

    eager = step(model.forward)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend, dynamic=False)
    assert close(step(compiled), eager)
    torch._dynamo.utils.counters.clear()
    step(compiled)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # nothing anew


def test_explain_counts_one_graph(sparse: Any) -> None:
    with torch.no_grad():
        found = torch._dynamo.explain(sparse.forward)(input_ids=tokens(1, 1), use_cache=False)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    ops = [str(node.target) for g in found.graphs for node in g.graph.nodes]
    assert ops.count("catsparse.gated_mlp") + ops.count("catsparse.gated_mlp.default") == 2


def test_layers_compiled_one_by_one_share_a_graph(sparse: Any) -> None:
    """Thresholds are tensors, not constants: no compilation for each layer."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        compiled = torch.compile(
            lambda mlp, x: mlp(x), backend=backend, fullgraph=True, dynamic=False
        )
        for layer in sparse.model.layers:
            assert close(compiled(layer.mlp, x), layer.mlp(x))
    assert len(seen) <= 2


def test_compiled_static_generate(sparse: Any) -> None:
    from transformers import CompileConfig

    ids = tokens(1, LONG)
    config = CompileConfig(fullgraph=True, mode=None, backend="eager", dynamic=False)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    out = greedy(sparse, ids, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1  # it did compile
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(out, greedy(sparse, ids))


def test_retuned_thresholds_reach_the_compiled_model(
    sparse: Any, calibration: catsparse.Calibration
) -> None:
    ids = tokens(1, 1)
    compiled = torch.compile(sparse.forward, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        for name, module in sparse_modules(sparse).items():
            module.catsparse_threshold.copy_(calibration.thresholds(0.9)[name].threshold)
        new = compiled(input_ids=ids, use_cache=False).logits
        assert close(new, sparse(input_ids=ids, use_cache=False).logits)


# -- PEFT


def lora(model: Any, *targets: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(targets))
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int = 2, optimizer: Any = None) -> None:
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(wanted, lr=0.05)
    ids = tokens(2, LONG, seed=9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_lora_trains_and_uses_the_children(sparse: Any, op_calls: list[int]) -> None:
    frozen = {id(p): p.detach().clone() for p in sparse.parameters()}
    model = lora(sparse, *GATED, "q_proj")
    assert catsparse.explain(model).count("masked children (gate_proj ") == 2
    assert "kernel" not in catsparse.explain(model)
    train(model, steps=1)
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * 2 * 4  # A and B, layers, targets
    missing = [n for n, p in adapters.items() if p.grad is None or ("lora_B" in n) > p.grad.any()]
    assert missing == []
    for p in model.parameters():
        if id(p) in frozen:
            assert torch.equal(p, frozen[id(p)])
    train(model)
    assert all(p.grad.any() for p in adapters.values())
    # With an adapter on, decode goes through it too.
    model.eval()
    with torch.no_grad():
        on = logits(model, SHORT)
        with model.disable_adapter():
            off = logits(model, SHORT)
    assert op_calls == []
    assert not close(on, off, 0.001)


@pytest.mark.parametrize("targets", [("down_proj",), (*GATED, "q_proj"), ("q_proj",)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_lora_merge(
    sparse: Any, dense: Any, op_calls: list[int], targets: tuple[str, ...], compiled: bool
) -> None:
    """Straight from the merge to decode: no eval(), no forward in between."""
    thresholds = sparse.catsparse.thresholds
    model = lora(sparse, *targets)
    train(model)
    model.eval()
    merged = model.merge_and_unload()
    run = merged
    if compiled:
        run = torch.compile(merged.forward, fullgraph=True, backend="eager", dynamic=False)
    decoded = logits(run, SHORT)
    if not compiled:
        assert op_calls == [SHORT, SHORT]
    assert catsparse.explain(merged).count("decode by the c kernel") == 2
    assert merged.catsparse.thresholds is thresholds
    dense.load_state_dict(merged.state_dict())
    by_hand = masked_by_hand(merged, dense)
    assert close(logits(merged, LONG), logits(by_hand, LONG))
    assert close(decoded, logits(by_hand, SHORT))
    assert torch.equal(logits(catsparse.densify(merged)), logits(dense))


@pytest.mark.parametrize("targets", [("down_proj",), (*GATED, "q_proj"), ("q_proj",)])
@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter", "unload"])
def test_lora_after_decode(sparse: Any, dense: Any, targets: tuple[str, ...], how: str) -> None:
    """The kernel's copy of down was made before the adapter came; merging writes past autograd."""
    logits(sparse, 1)
    before = [m._catsparse_down_t for m in sparse_modules(sparse).values()]
    assert all(t is not None for t in before)
    model = lora(sparse, *targets)
    for name, p in model.named_parameters():  # as a trained one is loaded: no forward, no step
        if "lora_B" in name:
            p.data.normal_()
    logits(model, 1)
    if how == "merge_adapter":
        model.merge_adapter()
        logits(model, 1)
    merged = model.merge_and_unload() if how == "merge_and_unload" else model.unload()
    dense.load_state_dict(merged.state_dict())
    by_hand = masked_by_hand(merged, dense)
    for n in (1, SHORT, LONG):
        assert close(logits(merged, n), logits(by_hand, n))
    assert all(m._catsparse_down_t is not None for m in sparse_modules(merged).values())


def test_lora_on_a_dense_model_then_sparsify(dense: Any) -> None:
    """The other order: the site is found through the adapter, and thresholds see it."""
    model = lora(dense, *GATED)
    train(model)
    model.eval()
    calibration = calibrate(model)
    catsparse.sparsify(model, calibration, 0.6)
    unmerged = [logits(model, n) for n in (SHORT, LONG)]
    assert "masked children" in catsparse.explain(model)
    merged = model.merge_and_unload()
    for n, expected in zip((SHORT, LONG), unmerged, strict=True):
        assert close(logits(merged, n), expected, 0.001)


def test_lora_state_dict_has_no_thresholds(sparse: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = lora(sparse, *GATED)
    train(model)
    model.eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not any("catsparse" in name for name in model.state_dict())
    base = model.unload()
    assert sparse_modules(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), expected)


# -- weights that change


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused adamw", "foreach adamw"])
@pytest.mark.parametrize("flags", ["train and eval", "eval throughout"])
def test_full_fine_tuning_then_decode(sparse: Any, dense: Any, kind: str, flags: str) -> None:
    """The compensation's bias must follow the weights, whoever changed them."""
    logits(sparse, SHORT)
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
        "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    }[kind](list(sparse.parameters()))
    ids = tokens(2, LONG, seed=9)
    if flags == "train and eval":
        sparse.train()
    sparse(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    sparse.eval()
    dense.load_state_dict(sparse.state_dict())
    assert matches_by_hand(sparse, dense)


def test_load_state_dict_then_decode(sparse: Any) -> None:
    logits(sparse, SHORT)
    other = build(llama_config(), seed=4)
    sparse.load_state_dict(other.state_dict())
    assert matches_by_hand(sparse, other)


def test_assigned_weights_then_decode(sparse: Any) -> None:
    logits(sparse, SHORT)
    other = build(llama_config(), seed=4)
    sparse.load_state_dict(other.state_dict(), assign=True)
    assert matches_by_hand(sparse, other)


@pytest.mark.parametrize("how", ["load_state_dict", "sgd", "fused adamw"])
def test_changed_weights_then_compiled_decode(sparse: Any, how: str) -> None:
    """Compiled code cannot watch the weights; no eval() tells it either."""
    if how == "load_state_dict":
        sparse.load_state_dict(build(llama_config(), seed=4).state_dict())
    else:
        wanted = list(sparse.parameters())
        optimizer = torch.optim.SGD(wanted, lr=0.05)
        if how == "fused adamw":
            optimizer = torch.optim.AdamW(wanted, lr=0.01, fused=True)
        ids = tokens(2, LONG, seed=9)
        sparse(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    dense = build(llama_config())
    dense.load_state_dict(sparse.state_dict())
    compiled = torch.compile(sparse.forward, fullgraph=True, backend="eager", dynamic=False)
    assert close(logits(compiled, SHORT), logits(masked_by_hand(sparse, dense), SHORT))


# -- quantized weights


@pytest.mark.parametrize("compensate", [False, True])
def test_torchao_int8(compensate: bool, op_calls: list[int]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    dense = build(llama_config())
    exact = logits(dense)
    quantization.quantize_(dense, quantization.Int8WeightOnlyConfig())
    assert not torch.equal(logits(dense), exact)
    model = copy.deepcopy(dense)
    found = calibrate(model)
    catsparse.sparsify(model, found, 0.6, compensate=compensate)
    assert catsparse.explain(model).count("masked children (") == 2
    assert logits(model).isfinite().all()
    truth = masked_by_hand(model, dense)
    for n in (1, SHORT, LONG):
        assert close(logits(model, n), logits(truth, n))
    assert op_calls == []
    assert torch.equal(greedy(model, tokens(1, LONG)), greedy(truth, tokens(1, LONG)))
    assert torch.equal(logits(catsparse.densify(model)), logits(dense))


# -- accelerate


# A device map without the layers.
OUTSIDE = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")


def place(kind: str, model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if kind == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    where = dict(OUTSIDE)
    for layer in (0, 1):
        for child in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            where[f"model.layers.{layer}.{child}"] = "cpu"
        where[f"model.layers.{layer}.mlp"] = "cpu" if kind == "mlp on cpu" else "disk"
    return accelerate.dispatch_model(
        model, where, main_device="cpu", offload_dir=folder, force_hooks=True
    )


PLACES = ["cpu_offload", "disk_offload", "mlp on cpu", "mlp on disk"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["placed first", "sparse first"])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("kind", PLACES)
def test_accelerate_placement(
    kind: str, compensate: bool, order: str, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    dense = build(llama_config())
    expected_dense = [logits(dense, n) for n in (1, SHORT, LONG)]
    truth = catsparse.sparsify(copy.deepcopy(dense), calibration, 0.6, compensate=compensate)
    expected = [logits(truth, n) for n in (1, SHORT, LONG)]
    model = dense
    if order == "placed first":
        model = place(kind, model, tmp_path)
    catsparse.sparsify(model, calibration, 0.6, compensate=compensate)
    if order == "sparse first":
        model = place(kind, model, tmp_path)
    mlp = model.model.layers[0].mlp
    if kind != "mlp on cpu":
        assert mlp.down_proj.weight.device.type == "meta"
    if kind.startswith("mlp"):
        assert "_old_forward" in mlp.__dict__
    for n, wanted in zip((1, SHORT, LONG), expected, strict=True):
        assert close(logits(model, n), wanted)
    catsparse.densify(model)
    for n, wanted in zip((1, SHORT, LONG), expected_dense, strict=True):
        assert torch.equal(logits(model, n), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["disk_offload", "mlp on disk"])
def test_accelerate_calibrates_offloaded_weights(
    kind: str, calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    model = place(kind, build(llama_config()), tmp_path)
    found = calibrate(model)
    for name, statistics in found.statistics.items():
        assert torch.equal(statistics.histogram, calibration.statistics[name].histogram)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mlp on cpu", "cpu_offload"])
def test_accelerate_hooks_taken_off_again(
    kind: str, sparse: Any, calibration: catsparse.Calibration, dense: Any, tmp_path: Path
) -> None:
    """Hooks come off a sparse model, then the sparsity does."""
    hooks = pytest.importorskip("accelerate.hooks")
    expected = [logits(sparse, n) for n in (SHORT, LONG)]
    model = place(kind, build(llama_config()), tmp_path)
    catsparse.sparsify(model, calibration, 0.6)
    hooks.remove_hook_from_submodules(model)
    for n, wanted in zip((SHORT, LONG), expected, strict=True):
        assert close(logits(model, n), wanted)
    catsparse.densify(model)
    assert torch.equal(logits(model, SHORT), logits(dense, SHORT))
    assert torch.equal(logits(model, LONG), logits(dense, LONG))


@pytest.mark.filterwarnings("ignore")
def test_sparsify_after_hooks_were_taken_off(
    calibration: catsparse.Calibration, sparse: Any, tmp_path: Path
) -> None:
    """accelerate leaves the bound forward on the instance: sparse must not stay dense unsaid."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = place("mlp on cpu", build(llama_config()), tmp_path)
    hooks.remove_hook_from_submodules(model)
    with contextlib.suppress(CatsparseError):  # to be refused is as good
        catsparse.sparsify(model, calibration, 0.6)
        assert close(logits(model), logits(sparse))


@pytest.mark.filterwarnings("ignore")
def test_device_map_in_load(calibration: catsparse.Calibration, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    base = save_base(tmp_path / "base")
    model = catsparse.sparsify(hub.load_dense_model(str(base)), calibration, 0.6)
    for merge in (False, True):
        catsparse.save(model, tmp_path / str(merge), merge=merge)
        where = {"": "cpu"} if merge else "auto"
        loaded = catsparse.load(tmp_path / str(merge), device_map=where)
        assert torch.equal(logits(loaded), logits(model))
        where = OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"}
        loaded = catsparse.load(
            tmp_path / str(merge), device_map=where, offload_folder=tmp_path / "offload"
        )
        assert loaded.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        for n in (SHORT, LONG):
            assert close(logits(loaded, n), logits(model, n))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", [{}, {"method": "energy"}, {"down_sparsity": 0.7}])
def test_decisions_of_offloaded_weights(asked: dict[str, Any], tmp_path: Path) -> None:
    """A preview cannot be made of weights that are away: the exact ones decide, at the same
    thresholds; a second decision stays."""
    pytest.importorskip("accelerate")
    base = save_base(tmp_path / "base")
    model = hub.load_dense_model(str(base))
    seen: dict[str, Any] = {"products_at": 0.5} if "down_sparsity" in asked else {"preview": 8}
    found = catsparse.calibrate(model, tokens(8, 32), progress=False, **seen)
    catsparse.save(catsparse.sparsify(model, found, 0.5, **asked), tmp_path / "sparse")
    loaded = catsparse.load(
        tmp_path / "sparse",
        device_map=OUTSIDE | {"model.layers.0": "cpu", "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    away = loaded.model.layers[1].mlp
    assert away.up_proj.weight.device.type == "meta"
    stays, away_line = catsparse.explain(loaded).splitlines()
    assert "hooked" not in stays  # accelerate's hooks only move inputs there
    assert "masked children (gate_proj is offloaded)" in away_line
    assert loaded.model.layers[0].mlp.why_not_raw() is None
    here = model.model.layers[1].mlp
    here._forget()
    here.catsparse_preview_bits = None
    here.refresh()
    for n in (1, SHORT, LONG):
        assert close(logits(loaded, n), logits(model, n))


@pytest.mark.gpu
def test_device_map_over_gpu_and_cpu(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    base = save_base(tmp_path / "base")
    model = hub.load_dense_model(str(base))
    found = catsparse.calibrate(model, tokens(8, 32), progress=False)
    catsparse.save(catsparse.sparsify(model, found, 0.5), tmp_path / "sparse")
    where = {**dict.fromkeys(OUTSIDE, 0), "model.layers.0": 0, "model.layers.1": "cpu"}
    loaded = catsparse.load(tmp_path / "sparse", device_map=where)
    here, away = (layer.mlp.up_proj.weight.device.type for layer in loaded.model.layers)
    assert (here, away) == ("cuda", "meta")
    assert "model.layers.1.mlp: sparse" in catsparse.explain(loaded)
    for n in (1, SHORT, LONG):
        ids = tokens(1, n, seed=3)
        with torch.no_grad():
            assert close(loaded(ids.cuda()).logits.cpu(), model(ids).logits, 1e-3)
    assert greedy(loaded, tokens(1, SHORT).cuda()).shape == (1, NEW)


# -- torch's own ways of handling a module


def test_deepcopy(sparse: Any) -> None:
    twin = copy.deepcopy(sparse)
    before = [logits(sparse, n) for n in (SHORT, LONG)]
    for n, wanted in zip((SHORT, LONG), before, strict=True):
        assert torch.equal(logits(twin, n), wanted)
    catsparse.densify(twin)
    assert not sparse_modules(twin)
    assert len(sparse_modules(sparse)) == 2
    assert torch.equal(logits(sparse), before[1])
    mine = {p.data_ptr() for p in sparse.parameters()}
    assert not mine & {p.data_ptr() for p in twin.parameters()}


def test_pickle_of_a_model_object(sparse: Any) -> None:
    """As torch.save does, or a process pool."""
    twin = pickle.loads(pickle.dumps(sparse))
    for n in (SHORT, LONG):
        assert torch.equal(logits(twin, n), logits(sparse, n))
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again, SHORT), logits(sparse, SHORT))


def test_deepcopy_of_a_merged_model_saves_itself(
    calibration: catsparse.Calibration, tmp_path: Path
) -> None:
    model = catsparse.sparsify(build(llama_config()), calibration, 0.6)
    catsparse.save(model, tmp_path / "1", merge=True)
    first = catsparse.load(tmp_path / "1")
    twin = copy.deepcopy(first)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    twin.save_pretrained(tmp_path / "2")
    assert torch.equal(logits(catsparse.load(tmp_path / "2")), logits(twin))
    catsparse.densify(twin)
    assert sparse_modules(first)


def test_state_dict_is_the_dense_models(sparse: Any, dense: Any) -> None:
    mine, its = sparse.state_dict(), dense.state_dict()
    assert list(mine) == list(its)
    assert all(torch.equal(mine[name], its[name]) for name in its)


def test_densify_gives_the_same_parameters(dense: Any, calibration: catsparse.Calibration) -> None:
    before = [(name, id(p)) for name, p in dense.named_parameters()]
    kinds = [type(m) for m in dense.modules()]
    keys = [set(m.__dict__) for m in dense.modules()]
    catsparse.densify(catsparse.sparsify(dense, calibration))
    assert [(name, id(p)) for name, p in dense.named_parameters()] == before
    assert [type(m) for m in dense.modules()] == kinds
    assert [set(m.__dict__) for m in dense.modules()] == keys


def test_gradients_match_the_maths_by_hand(sparse: Any, dense: Any) -> None:
    truth = masked_by_hand(sparse, dense)
    ids = tokens(2, LONG)
    for model in (sparse, truth):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, mine), its in zip(sparse.named_parameters(), truth.parameters(), strict=True):
        assert close(mine.grad, its.grad), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(sparse: Any, reentrant: bool) -> None:
    ids = tokens(2, LONG)
    sparse.train()
    sparse(input_ids=ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in sparse.parameters()]
    sparse.zero_grad()
    sparse.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        sparse.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter, wanted in zip(sparse.parameters(), expected, strict=True):
        assert close(parameter.grad, wanted)


def test_few_tokens_with_gradients(sparse: Any, op_calls: list[int]) -> None:
    """Decode-sized calls take the children when a gradient is wanted: the op has none."""
    out = sparse(input_ids=tokens(1, SHORT)).logits
    out.sum().backward()
    assert op_calls == []
    assert all(p.grad is not None for p in sparse.parameters())
    with torch.no_grad():
        assert close(logits(sparse, SHORT), sparse(input_ids=tokens(1, SHORT, 3)).logits)


def test_train_and_eval_give_the_same_logits(sparse: Any) -> None:
    """Nothing of the sparse forward depends on the training flag."""
    for n in (SHORT, LONG):
        assert torch.equal(logits(sparse.train(), n), logits(sparse.eval(), n))


def test_inference_mode(sparse: Any) -> None:
    expected = logits(sparse, SHORT)
    with torch.inference_mode():
        assert torch.equal(sparse(input_ids=tokens(1, SHORT, 3), use_cache=False).logits, expected)


def test_made_in_inference_mode(calibration: catsparse.Calibration, sparse: Any) -> None:
    with torch.inference_mode():
        model = catsparse.sparsify(build(llama_config()), calibration, 0.6)
        assert torch.equal(logits(model, SHORT), logits(sparse, SHORT))
        assert torch.equal(logits(model, LONG), logits(sparse, LONG))


@pytest.mark.parametrize("compensate", [False, True])
def test_autocast(dense: Any, calibration: catsparse.Calibration, compensate: bool) -> None:
    """The op and the children under autocast: as near to fp32 as the dense model is."""
    model = catsparse.sparsify(copy.deepcopy(dense), calibration, 0.6, compensate=compensate)
    for n in (SHORT, LONG):
        exact, dense_exact = logits(model, n), logits(dense, n)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, dense_found = logits(model, n), logits(dense, n)
        assert found.dtype == dense_found.dtype
        spread = float(dense_exact.std())
        dense_error = float((dense_found - dense_exact).abs().mean()) / spread
        assert 1e-4 < dense_error < 0.1
        assert float((found - exact).abs().mean()) / spread < 3 * dense_error


def test_autocast_training(sparse: Any) -> None:
    ids = tokens(2, LONG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sparse.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sparse.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_paths_agree(sparse: Any, dtype: torch.dtype, op_calls: list[int]) -> None:
    model = sparse.to(dtype)
    catsparse.set_backend(model, "c")
    ids = tokens(1, SHORT)
    with torch.no_grad():
        by_op = model(input_ids=ids, use_cache=False).logits.float()
        assert op_calls == [SHORT, SHORT]
        long = tokens(1, LONG)
        long[:, :SHORT] = ids
        by_children = model(input_ids=long, use_cache=False).logits[:, :SHORT].float()
    assert len(op_calls) == 2
    # A handful of roundings apart (one is 2^-9 or 2^-12 of a value).
    assert (by_op - by_children).abs().mean() < 0.02 * by_children.abs().mean()


def test_hooks_of_the_user_still_run(dense: Any, calibration: catsparse.Calibration) -> None:
    seen: list[str] = []
    mlp = dense.model.layers[0].mlp
    mlp.register_forward_hook(lambda *a: seen.append("mlp"))
    catsparse.sparsify(dense, calibration, 0.6)
    mlp.down_proj.register_forward_hook(lambda *a: seen.append("down"))
    for n in (SHORT, LONG):
        logits(dense, n)
        assert seen == ["down", "mlp"]
        seen.clear()


def test_children_with_a_forward_of_their_own(sparse: Any, dense: Any) -> None:
    """As tensor parallelism gives them: reading their weights would miss it."""
    for model in (sparse, dense):
        up = model.model.layers[0].mlp.up_proj
        up.forward = lambda x, up=up: 2 * nn.functional.linear(x, up.weight)
    assert "up_proj is hooked" in catsparse.explain(sparse)
    assert matches_by_hand(sparse, dense)


# -- families, end to end

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
LAYERS = {"model.layers.0.mlp", "model.layers.1.mlp"}
FAMILIES: dict[str, tuple[Any, set[str]]] = {
    "qwen3": (Qwen3Config(**SMALL, head_dim=8), LAYERS),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8), LAYERS),
    "phi3": (Phi3Config(**SMALL), LAYERS),
    "deepseek_v3": (
        DeepseekV3Config(**(SMALL | DEEPSEEK)),
        {"model.layers.0.mlp", "model.layers.1.mlp.shared_experts"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_end_to_end(family: str, tmp_path: Path) -> None:
    config, names = FAMILIES[family]
    base = save_base(tmp_path / "base", config)
    dense = hub.load_dense_model(str(base))
    dense.generation_config.eos_token_id = None
    # Loaded as well, not copied: products differ in the last bit with the weights' alignment.
    model = hub.load_dense_model(str(base))
    model.generation_config.eos_token_id = None
    catsparse.sparsify(model, calibrate(model), 0.6)
    assert set(sparse_modules(model)) == names
    assert matches_by_hand(model, dense)
    ids = tokens(1, LONG)
    out = greedy(model, ids)
    for merge in (False, True):
        catsparse.save(model, tmp_path / str(merge), merge=merge)
        loaded = catsparse.load(tmp_path / str(merge))
        loaded.generation_config.eos_token_id = None
        for n in (SHORT, LONG):
            assert torch.equal(logits(loaded, n), logits(model, n))
        assert torch.equal(greedy(loaded, ids), out)
    assert torch.equal(logits(catsparse.densify(model)), logits(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_family_at_sparsity_0_is_dense(family: str) -> None:
    dense = build(FAMILIES[family][0])
    model = copy.deepcopy(dense)
    catsparse.sparsify(model, calibrate(model), 0.0)
    for n in (SHORT, LONG):
        catsparse.set_backend(model, "auto")
        assert close(logits(model, n), logits(dense, n), 1e-5)
        # Torch multiplies a fused projection's halves one by one.
        catsparse.set_backend(model, "torch")
        if family != "phi3" or n == LONG:
            assert torch.equal(logits(model, n), logits(dense, n))
