"""What the vLLM plugin refuses, and what it says: nobody runs dense and believes it is sparse.

vLLM is imported, but not started: a few stand-ins for its layers are built and loaded as it does.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import catsparse
from catsparse import CatsparseError
from catsparse.surgery import state_of
from test_vllm import pytestmark
from test_vllm_plugin import merged_gate_up, sparse_model

__all__ = ["pytestmark"]

NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]


class Linear(nn.Module):
    tp_rank, tp_size, bias = 0, 1, None

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)


class Embedding(nn.Embedding):
    pass


class Started:
    """Stands in for a start of vLLM with a sparse directory."""

    def __init__(self, layers: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layers, "LinearBase", Linear)
        monkeypatch.setattr(layers, "VocabParallelEmbedding", Embedding)
        monkeypatch.setattr(layers, "get_current_vllm_config", lambda: self.vllm)
        self.model = sparse_model()
        catsparse.save(self.model, folder, merge=True)
        kind = SimpleNamespace(model_type=self.model.config.model_type)
        self.model_config = SimpleNamespace(
            model=str(folder),
            revision=None,
            hf_config=kind,
            hf_text_config=kind,
            get_total_num_hidden_layers=lambda: 2,
        )
        self.vllm = SimpleNamespace(
            model_config=self.model_config,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
            compilation_config=SimpleNamespace(static_forward_context={}),
            lora_config=None,
            additional_config={},
        )
        self.layers = layers
        self.config = layers.CatsConfig()
        self.built: list[Any] = []

    def build(self, name: str, kind: str = "both", of: int = 0) -> None:
        """vLLM's MLP ``name``, with the weights of ours number ``of``."""
        mlp = self.model.model.layers[of].mlp
        if kind in ("both", "gate_up"):
            self.add(Linear(merged_gate_up(mlp, 0, 1)), f"{name}.gate_up_proj")
        if kind in ("both", "down"):
            self.add(Linear(mlp.down_proj.weight), f"{name}.down_proj")

    def add(self, layer: Any, name: str) -> Any:
        layer.quant_method = self.config.get_quant_method(layer, name)
        self.built.append(layer)
        return layer

    def load(self) -> None:
        for layer in self.built:
            layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    from catsparse.vllm_plugin import layers, register

    register()
    return Started(layers, tmp_path / "sparse", monkeypatch)


def test_it_says_how_many_are_sparse(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    started.build(NAMES[0])
    started.build(NAMES[1], of=1)
    started.build("model.layers.2.mlp")
    logger = logging.getLogger("vllm.plugins.catsparse")
    logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate
    caplog.set_level(logging.INFO, logger.name)
    started.load()
    folder = started.model_config.model
    assert f"catsparse: 2 of 3 MLPs run sparse, by {folder}" in caplog.messages
    context = started.vllm.compilation_config.static_forward_context
    assert set(context) == {f"{name}.catsparse" for name in NAMES}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Linear(torch.zeros(4, 4)), "transformer.h.0.ffn.gate_up_proj"),
        (Embedding(4, 4), "transformer.wte"),
    ],
)
def test_a_model_of_other_names_is_refused(started: Started, layer: Any, name: str) -> None:
    """Even one without a linear layer that asks for its method."""
    started.add(layer, name)
    with pytest.raises(CatsparseError, match=r"has no model\.layers\.0\.mlp of a gate_up_proj and"):
        started.load()


@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_half_an_mlp_is_refused(started: Started, kind: str) -> None:
    started.build(NAMES[0])
    started.build(NAMES[1], kind)
    with pytest.raises(CatsparseError, match=r"has no model\.layers\.1\.mlp"):
        started.load()


def test_a_method_that_vllm_does_not_use_is_noticed(started: Started) -> None:
    for name in NAMES:
        started.build(name)
    started.built[0].quant_method = started.layers.UnquantizedLinearMethod()
    with pytest.raises(CatsparseError, match=r"has no model\.layers\.0\.mlp"):
        started.built[1].quant_method.process_weights_after_loading(started.built[1])


def test_two_that_could_be_one_are_refused(started: Started) -> None:
    started.build("language_model.model.layers.0.mlp")
    with pytest.raises(CatsparseError, match="could be"):
        started.build("vision.layers.0.mlp")


@pytest.mark.parametrize(
    ("stage", "built", "missing"),
    [(0, [0], None), (1, [1], None), (1, [0], 1), (0, [], 0), (1, [], 1)],
)
def test_a_pipeline_stage_has_its_own(
    started: Started, stage: int, built: list[int], missing: int | None
) -> None:
    started.vllm.parallel_config.pipeline_parallel_size = 2
    started.model_config.get_layers_start_end_indices = lambda parallel: (stage, stage + 1)
    started.add(Linear(torch.zeros(4, 4)), "model.layers.0.self_attn.qkv_proj")
    for layer in built:
        started.build(NAMES[layer], of=layer)
    if missing is None:
        started.load()
        assert [p.prefix for p in started.config.pairs.values()] == [NAMES[stage]]
    else:
        with pytest.raises(CatsparseError, match=rf"has no model\.layers\.{missing}\.mlp"):
            started.load()


def test_layers_beyond_the_model_are_missing_on_the_last_stage(started: Started) -> None:
    started.vllm.parallel_config.pipeline_parallel_size = 2
    started.model_config.get_total_num_hidden_layers = lambda: 1
    started.model_config.get_layers_start_end_indices = lambda parallel: (0, 1)
    started.build(NAMES[0])
    with pytest.raises(CatsparseError, match=r"has no model\.layers\.1\.mlp"):
        started.load()


def test_a_bias_is_refused(started: Started) -> None:
    for name in NAMES:
        started.build(name)
    started.built[0].bias = torch.zeros(1)
    with pytest.raises(CatsparseError, match="gate_up_proj has a bias"):
        started.load()


def test_the_directory_must_be_there_and_of_this_model(started: Started, tmp_path: Path) -> None:
    make, add = started.layers.CatsConfig.from_config, started.build
    with pytest.raises(CatsparseError, match="quantization_config holds artefact, which catsparse"):
        make({"quant_method": "cats", "artefact": "folder"})
    started.config = make({"quant_method": "cats", "artifact": str(tmp_path / "nowhere")})
    with pytest.raises(CatsparseError, match="there is no folder or Hub repository"):
        add(NAMES[0])
    own, started.model_config.model = started.model_config.model, str(tmp_path)
    started.config = make({"quant_method": "cats"})
    with pytest.raises(CatsparseError, match=r"catsparse\.json.*--hf-overrides"):
        add(NAMES[0])
    started.config = make({"quant_method": "cats", "artifact": own})
    started.model_config.hf_config = started.model_config.hf_text_config = SimpleNamespace(
        model_type="other"
    )
    with pytest.raises(CatsparseError, match=r"belongs to a llama model, and .* is of type other"):
        add(NAMES[0])


def test_the_model_is_the_one_that_vllm_told_of(started: Started) -> None:
    """Of a draft model the current config may be the target's."""
    own, started.model_config.model = started.model_config.model, "elsewhere"
    started.config.maybe_update_config(own, hf_config=None)
    started.build(NAMES[0])


def test_quantization_while_loading_is_refused(started: Started) -> None:
    started.config.online_quantization_config = object()
    with pytest.raises(CatsparseError, match="give no other quantization beside cats"):
        started.build(NAMES[0])


def test_what_vllm_keeps_compiled_depends_on_the_sites(started: Started, tmp_path: Path) -> None:
    model, folder = sparse_model(method="cats", compensate=False), tmp_path / "some"
    config, seen = state_of(model).config, []
    for names in (NAMES, NAMES[:1]):
        catsparse.densify(model)
        sites = {name: config.sites[name] for name in names}
        catsparse.save(catsparse.sparsify(model, replace(config, sites=sites)), folder, merge=True)
        started.config = started.layers.CatsConfig(str(folder))
        started.build(NAMES[0])
        seen.append(dict(started.vllm.additional_config))
    assert seen[0] != seen[1]


def test_other_processes_read_for_themselves(started: Started) -> None:
    started.config.maybe_update_config(started.model_config.model, revision="main")
    started.config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    started.build(NAMES[0])
    fresh = copy.deepcopy(started.config)
    assert fresh.config is None
    assert fresh.pairs == {}
    assert fresh.model == (started.model_config.model, "main")
    assert fresh.packed_modules_mapping == started.config.packed_modules_mapping


@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (None, True),
        (["q_proj", "qkv_proj", "o_proj"], False),
        (["gate_up_proj"], True),
        (["q_proj", "up_proj"], True),
        (["down_proj"], True),
        (["model.layers.9.mlp.down_proj"], True),
    ],
)
def test_mlps_that_adapters_may_reach(
    started: Started, targets: list[str] | None, reached: bool
) -> None:
    started.vllm.lora_config = SimpleNamespace(target_modules=targets)
    started.build(NAMES[0])
    assert started.config.pairs[NAMES[0]].adapters is reached


def test_adapters_on_a_stream_of_their_own_are_refused(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    started.vllm.lora_config = SimpleNamespace(target_modules=["q_proj"])
    started.build(NAMES[0])
    started.vllm.lora_config = SimpleNamespace(target_modules=None)
    with pytest.raises(CatsparseError, match="unset VLLM_LORA_ENABLE_DUAL_STREAM"):
        started.build(NAMES[1])


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("policy", ["masked", "dense"])
def test_compiled_it_masks_what_the_activation_was_given(
    started: Started, monkeypatch: pytest.MonkeyPatch, tokens: int, policy: str
) -> None:
    """vLLM adds an adapter's product in place, and multiplies down's input by another."""
    from catsparse.vllm_plugin import ops

    context = started.vllm.compilation_config.static_forward_context
    found = SimpleNamespace(no_compile_layers=context)
    monkeypatch.setattr(ops, "get_forward_context", lambda: found)
    started.vllm.lora_config = SimpleNamespace(target_modules=None)
    for of, name in enumerate(NAMES):
        started.build(name, of=of)
    started.load()
    loaded = context[f"{NAMES[0]}.catsparse"]
    loaded.shard.catsparse_prefill, loaded.most_tokens = policy, 8
    gate_up, down = started.built[:2]
    x, more, other = torch.randn(tokens, 32), torch.randn(tokens, 96), torch.randn(48, 32)

    def forward(x: torch.Tensor) -> torch.Tensor:
        sums = gate_up.quant_method.apply(gate_up, x)
        sums += more
        gate, up = sums.chunk(2, dim=-1)
        h = F.silu(gate) * up
        y = down.quant_method.apply(down, h)
        return y + h @ other

    gate, up = (F.linear(x, gate_up.weight) + more).chunk(2, dim=-1)
    g = F.silu(gate)
    h = g * up
    if tokens <= 8 or policy == "masked":
        keep = g.abs() > started.model.model.layers[0].mlp.catsparse_threshold
        h = torch.where(keep, h, loaded.shard.catsparse_mean)
        assert 0.1 < keep.float().mean() < 0.9
    expected = F.linear(h, down.weight) + h @ other
    with torch.no_grad():
        torch.testing.assert_close(forward(x), expected)
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")
        torch.testing.assert_close(compiled(x), expected)
