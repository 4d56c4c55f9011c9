"""The vLLM plugin's own parts, without vLLM: ranks' shares, refusals, no import ahead of time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import catsparse
import tiny
from catsparse import CatsparseError, hub
from catsparse.surgery import state_of
from catsparse.vllm_plugin.shards import (
    check_config,
    cut,
    find_site,
    make_shard,
    mask_alone,
    sparse_tokens,
)


def sparse_model(seed: int = 0, calibration: Any = None, **options: Any) -> Any:
    model = tiny.build(tiny.llama_config(), seed)
    found = catsparse.calibrate(model, tiny.tokens(8, 32, 7), progress=False, **calibration or {})
    return catsparse.sparsify(model, found, 0.5, **options)


def merged_gate_up(mlp: Any, rank: int, ranks: int) -> torch.Tensor:
    """As vLLM lays it out: a rank's gate rows, then its up rows."""
    parts = [w.weight.chunk(ranks)[rank] for w in (mlp.gate_proj, mlp.up_proj)]
    return torch.cat(parts).detach()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(
    ("calibration", "options"),
    [
        ({}, {"method": "cats", "compensate": False}),
        ({}, {"method": "energy"}),
        ({"products_at": 0.5}, {"method": "energy", "down_sparsity": 0.7}),
        ({"preview": 4}, {"method": "product"}),
        ({"preview": 8}, {"method": "chess"}),
    ],
    ids=["cats", "energy", "second", "product", "preview"],
)
def test_ranks_add_up(
    ranks: int, tokens: int, calibration: dict[str, Any], options: dict[str, Any]
) -> None:
    model = sparse_model(calibration=calibration, **options)
    state = state_of(model)
    x = torch.randn(tokens, 32)
    for name in state.config.sites:
        mlp = model.get_submodule(name)
        shards = [
            make_shard(
                name,
                state.config,
                state.thresholds[name],
                merged_gate_up(mlp, rank, ranks),
                mlp.down_proj.weight.detach().chunk(ranks, dim=1)[rank],
                rank,
                ranks,
            )
            for rank in range(ranks)
        ]
        with torch.no_grad():
            expected, dense = mlp(x), x.new_zeros(())
            total = sum(shard(x) for shard in shards)
            for shard in shards:
                shard.catsparse_enabled = False
                dense = dense + shard(x)
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(dense, expected, atol=1e-3)


def shard_of(model: Any, **changes: Any) -> tuple[Any, Any, str]:
    """Of the first MLP, with the config and its name."""
    state, mlp = state_of(model), model.model.layers[0].mlp
    config = replace(state.config, **changes)
    name = next(iter(config.sites))
    parts = merged_gate_up(mlp, 0, 1), mlp.down_proj.weight.detach()
    return make_shard(name, config, state.thresholds[name], *parts), config, name


def test_with_masked_prompts_the_op_takes_what_it_can() -> None:
    shard, config, name = shard_of(sparse_model())
    assert sparse_tokens(config, name, shard) == 16


def test_with_dense_prompts_steps_go_dense_where_sparsity_no_longer_pays() -> None:
    """At 90% the gate alone leaves out 0.9^T of two thirds, at 10% less than 2% from T = 2 on."""
    for sparsity, expected in ((0.9, 16), (0.5, 5), (0.1, 1), (0.01, 0)):
        shard, config, name = shard_of(sparse_model(), prefill="dense")
        site = replace(config.sites[name], sparsity=sparsity)
        config = replace(config, sites={**config.sites, name: site})
        assert sparse_tokens(config, name, shard) == expected
        assert (
            expected in (0, 16)
            or sparsity**expected * 2 / 3 > 0.02 >= sparsity ** (expected + 1) * 2 / 3
        )


def test_without_foretelling_the_exact_product_decides() -> None:
    model = sparse_model(calibration={"preview": 4}, method="product")
    mlp = model.model.layers[0].mlp
    x = torch.randn(40, 32)
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        h = torch.nn.functional.silu(gate) * up
        kept = torch.where(h.abs() > mlp.catsparse_threshold, h, mlp.catsparse_mean)
        found = mlp.mask_and_project(x, gate, up, foretell=False)
        torch.testing.assert_close(found, mlp.down_proj(kept))
        assert not torch.allclose(found, mlp(x), atol=1e-4)


def test_masking_alone() -> None:
    """By the exact product, and nothing is kept that only kernels need."""
    model = sparse_model(calibration={"preview": 4}, method="product")
    shard, _, _ = shard_of(model)
    assert shard.catsparse_preview is not None
    mask_alone(shard)
    assert shard.catsparse_preview is None
    gate, up = torch.randn(5, 48), torch.randn(5, 48)
    h = torch.nn.functional.silu(gate) * up
    kept = torch.where(h.abs() > shard.catsparse_threshold, h, shard.catsparse_mean)
    found = shard.mask_and_project(h, gate, up, foretell=False)
    torch.testing.assert_close(found, kept)
    assert not torch.equal(kept, h)


def test_many_tokens_from_the_products_alone() -> None:
    """More tokens: vLLM multiplied by gate and up already, and this is what is left to do."""
    model = sparse_model()
    mlp = model.model.layers[0].mlp
    x = torch.randn(40, 32)
    with torch.no_grad():
        assert torch.equal(mlp.mask_and_project(x, mlp.gate_proj(x), mlp.up_proj(x)), mlp(x))


def test_the_weights_are_not_copied() -> None:
    model = sparse_model()
    state, mlp = state_of(model), model.model.layers[0].mlp
    gate_up, down = merged_gate_up(mlp, 0, 1), mlp.down_proj.weight.detach()
    name = next(iter(state.config.sites))
    shard: Any = make_shard(name, state.config, state.thresholds[name], gate_up, down)
    assert shard.gate_up_proj.weight.data_ptr() == gate_up.data_ptr()
    assert shard.down_proj.weight.data_ptr() == down.data_ptr()


def test_cut() -> None:
    values = torch.arange(6.0)
    assert cut(values, 1, 3).tolist() == [2, 3]  # type: ignore[union-attr]
    scalar = torch.tensor(0.5)
    assert cut(scalar, 1, 3) is scalar
    assert cut(None, 0, 2) is None


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp"),
        ("language_model.model.layers.1.mlp", "model.layers.1.mlp"),
        ("model.layers.7.mlp", None),
        ("mlp", None),
        ("model.layers.1.feed_forward", None),
    ],
)
def test_names_of_models_within_models(prefix: str, found: str | None) -> None:
    assert find_site(prefix, ["model.layers.0.mlp", "model.layers.1.mlp"]) == found


def test_an_ambiguous_name_is_no_site() -> None:
    assert find_site("x.layers.0.mlp", ["a.layers.0.mlp", "b.layers.0.mlp"]) is None


def test_inputs_are_refused() -> None:
    config = state_of(sparse_model(calibration={"inputs": "mlp"}, method="teal")).config
    with pytest.raises(CatsparseError, match="sparsify with --scope mlp and another method"):
        check_config(config, "folder")
    check_config(state_of(sparse_model()).config, "folder")


def test_packed_weights_are_refused() -> None:
    config = state_of(sparse_model()).config
    assert config.calibration is not None
    packed = replace(config, calibration=replace(config.calibration, weights="int8"))
    with pytest.raises(CatsparseError, match="sparsify without --weights"):
        check_config(packed, "folder")


@pytest.mark.parametrize("ranks", [1, 5])
def test_weights_of_another_model_are_refused(ranks: int) -> None:
    state = state_of(sparse_model())
    name = next(iter(state.config.sites))
    size = {1: 47, 5: 48 // 5}[ranks]  # 48 neurons: one is missing, or they cannot be cut in five
    with pytest.raises(CatsparseError, match="is it of another model"):
        make_shard(
            name,
            state.config,
            state.thresholds[name],
            torch.zeros(2 * size, 32),
            torch.zeros(32, size),
            0,
            ranks,
        )
    # In a wrong activation's name, too, nothing is guessed.
    other = replace(state.config.sites[name], hidden_size=31)
    config = replace(state.config, sites={**state.config.sites, name: other})
    with pytest.raises(CatsparseError, match="is it of another model"):
        make_shard(name, config, state.thresholds[name], torch.zeros(96, 32), torch.zeros(32, 48))


def test_the_entry_point_imports_nothing_of_vllm() -> None:
    entry = next(e for e in metadata.entry_points(group="vllm.general_plugins"))
    assert entry.value == "catsparse.vllm_plugin:register"
    code = (
        "import sys, catsparse, catsparse.vllm_plugin, catsparse.vllm_plugin.shards\n"
        "sys.exit('vllm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_index_says_which_file_holds_weights(tmp_path: Path) -> None:
    """vLLM takes every safetensors file for weights if there is none."""
    catsparse.save(sparse_model(), tmp_path, merge=True)
    index = hub.json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = set(index["weight_map"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not any("threshold" in name for name in names)
    again = catsparse.load(tmp_path)
    assert torch.equal(tiny.logits(again), tiny.logits(sparse_model()))
