"""Gated MLPs of real model families and of toy modules: what is found, and why the rest is not."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.activations import ACT2FN

import catsparse
import tiny
from catsparse.kernels import ACTIVATIONS
from catsparse.modules import SparseMLP, sparse_modules
from catsparse.sites import (
    NearMiss,
    Site,
    activation_kind,
    describe,
    find_sites,
)

H, I = 32, 88  # noqa: E741

COMMON = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """What is expected of a tiny model of one family."""

    act: str = "silu"
    names: tuple[str, ...] = ("model.layers.0.mlp", "model.layers.1.mlp")
    parts: tuple[str, str | None, str] = ("gate_proj", "up_proj", "down_proj")
    act_child: str | None = "act_fn"
    neurons: int = I
    config: dict[str, Any] = field(default_factory=dict)
    misses: str = ""


FUSED = ("gate_up_proj", None, "down_proj")
EXPERTS = "experts (3-D weights): not yet"
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "ministral3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family("gelu_tanh"),
    "gemma2": Family("gelu_tanh"),
    "gemma3_text": Family("gelu_tanh"),
    "olmo2": Family(),
    "olmo3": Family(),
    "granite": Family(),
    "smollm3": Family(),
    "stablelm": Family(),
    "cohere": Family(),
    "cohere2": Family(),
    "exaone4": Family(),
    "seed_oss": Family(config={"residual_dropout": 0.0}),
    "phi3": Family(parts=FUSED, act_child="activation_fn"),
    "glm": Family(parts=FUSED, act_child="activation_fn"),
    "glm4": Family(parts=FUSED, act_child="activation_fn"),
    "lfm2": Family(
        names=("model.layers.0.feed_forward", "model.layers.1.feed_forward"),
        parts=("w1", "w3", "w2"),
        act_child=None,
        config={"full_attn_idxs": [1], "block_auto_adjust_ff_dim": False},
    ),
    "deepseek_v3": Family(
        names=("model.layers.0.mlp", "model.layers.1.mlp.shared_experts"),
        config={
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": I,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        misses=f"DeepseekV3Experts (model.layers.1.mlp.experts): {EXPERTS}",
    ),
    "llama4_text": Family(
        names=("model.layers.0.feed_forward", "model.layers.1.feed_forward.shared_expert"),
        act_child="activation_fn",
        config={
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": I,
        },
        misses=f"Llama4TextExperts (model.layers.1.feed_forward.experts): {EXPERTS}",
    ),
}

# Families of which no site is found, and the reason that is given.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "starcoder2": ({}, "c_proj's input is act(c_fc(...)), not act(gate) * up"),
    "nemotron": ({}, "down_proj's input is act_fn(up_proj(...)), not act(gate) * up"),
    "falcon_h1": (
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
        "its output is mul(down_proj(...), 1.0), not a linear layer of it",
    ),
    "bitnet": ({}, "down_proj's input is ffn_sub_norm(mul), not act(gate) * up"),
    "mixtral": (
        {"num_local_experts": 4},
        f"MixtralExperts (model.layers.0.mlp.experts and 1 more): {EXPERTS}",
    ),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        f"Qwen3MoeExperts (model.layers.0.mlp.experts and 1 more): {EXPERTS}",
    ),
    "seed_oss": ({"residual_dropout": 0.1}, "its output is dropout(down_proj(...))"),
    "gpt2": ({}, ""),
}


def build(family: str, config: dict[str, Any]) -> Any:
    return tiny.build(AutoConfig.for_model(family, **(COMMON | config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    """Found as expected; at sparsity 0 bit-identical; and restored to the same objects."""
    expected = FAMILIES[family]
    model = build(family, expected.config)
    sites, misses = find_sites(model)
    gate, up, down = expected.parts
    assert sites == [
        Site(name, gate, up, expected.act, expected.act_child, down, H, expected.neurons)
        for name in expected.names
    ]
    assert describe(misses) == expected.misses

    before = dict(model.named_parameters())
    classes = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    dense = tiny.logits(model, length=32)
    calibration = catsparse.calibrate(model, tiny.tokens(2, 16), progress=False)
    assert list(calibration.sites.values()) == sites

    catsparse.sparsify(model, calibration, sparsity=0.0)
    assert list(sparse_modules(model)) == list(expected.names)
    assert torch.equal(tiny.logits(model, length=32), dense)
    assert list(model.state_dict()) == keys
    catsparse.densify(model)

    catsparse.sparsify(model, calibration, sparsity=0.5)
    assert not torch.equal(tiny.logits(model, length=32), dense)  # the sites are in use
    catsparse.densify(model)
    assert [type(m) for m in model.modules()] == classes
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(tiny.logits(model, length=32), dense)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_family_has_its_reason(family: str) -> None:
    config, reason = REFUSED[family]
    sites, misses = find_sites(build(family, config))
    assert sites == []
    assert reason in describe(misses)
    assert bool(misses) == bool(reason)


def test_decode_at_sparsity_zero(llama: Any, calibration: Any) -> None:
    for length in (1, 5, 16):
        dense = tiny.logits(llama, length=length)
        catsparse.sparsify(llama, calibration, sparsity=0.0)
        assert tiny.close(tiny.logits(llama, length=length), dense, 1e-5)
        catsparse.set_backend(llama, "torch")
        assert torch.equal(tiny.logits(llama, length=length), dense)
        catsparse.densify(llama)


# Toy modules


class Toy(nn.Module):
    """down(act(gate(x)) * up(x)) with names of its own; subclasses change one thing each."""

    def __init__(self, act: Any = None, neurons: int = 12) -> None:
        super().__init__()
        self.a = nn.Linear(8, neurons, bias=False)
        self.b = nn.Linear(8, neurons, bias=False)
        self.c = nn.Linear(neurons, 8, bias=False)
        self.f = act or nn.SiLU()
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.f(self.a(x)) * self.b(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 24, bias=False)
        self.out = nn.Linear(12, 8, bias=False)
        self.f = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.out(self.f(gate) * up)


def variant(base: type[nn.Module], forward: Any) -> nn.Module:
    return type("Variant", (base,), {"forward": forward})()


def reason(module: nn.Module) -> str:
    sites, misses = find_sites(module)
    assert sites == []
    assert len(misses) == 1
    return misses[0].reason


def one_site(module: nn.Module) -> Site:
    """The only site; its sparse form at sparsity 0 is the module itself."""
    sites, misses = find_sites(nn.ModuleDict({"mlp": module}))
    assert misses == []
    (site,) = sites
    assert site.name == "mlp"
    x = torch.randn(20, 8)
    with torch.no_grad():
        dense = module(x)
        sparse = catsparse.modules.add_sparsity(module, site, torch.tensor(-1.0), None, "masked")
        assert isinstance(sparse, SparseMLP)
        assert torch.equal(sparse(x), dense)
        torch.testing.assert_close(sparse(x[:3]), dense[:3])
    catsparse.modules.remove_sparsity(sparse)
    return site


def test_names_do_not_matter() -> None:
    assert one_site(Toy()) == Site("mlp", "a", "b", "silu", "f", "c", 8, 12)


def fused_torch_chunk(s: Any, x: Tensor) -> Tensor:
    gate, up = torch.chunk(s.both(x), 2, -1)
    return s.out(s.f(gate) * up)


def fused_up_before_gate(s: Any, x: Tensor) -> Tensor:
    gate, up = s.both(x).chunk(2, dim=-1)
    return s.out(up * s.f(gate))


FOUND = {
    "up before gate": (Toy, lambda s, x: s.c(s.b(x) * s.f(s.a(x)))),
    "torch.mul": (Toy, lambda s, x: s.c(torch.mul(s.f(s.a(x)), s.b(x)))),
    "method mul": (Toy, lambda s, x: s.c(s.f(s.a(x)).mul(s.b(x)))),
    "function": (Toy, lambda s, x: s.c(F.silu(s.a(x)) * s.b(x))),
    "dropout of 0 after": (Toy, lambda s, x: s.drop(s.c(s.f(s.a(x)) * s.b(x)))),
    "dropout of 0 inside": (Toy, lambda s, x: s.c(s.drop(s.f(s.a(x)) * s.b(x)))),
    "function dropout of 0": (
        Toy,
        lambda s, x: F.dropout(s.c(s.f(s.a(x)) * s.b(x)), p=0.0, training=s.training),
    ),
    "fused": (Fused, Fused.forward),
    "fused, torch.chunk": (Fused, fused_torch_chunk),
    "fused, up before gate": (Fused, fused_up_before_gate),
}


@pytest.mark.parametrize("name", FOUND)
def test_other_ways_to_write_it(name: str) -> None:
    base, forward = FOUND[name]
    site = one_site(variant(base, forward))
    assert (site.gate, site.up) == (("both", None) if base is Fused else ("a", "b"))
    assert site.act_child == (None if name == "function" else "f")


def clamped_in_place(s: Any, x: Tensor) -> Tensor:
    gate = s.a(x)
    gate.clamp_(max=0.1)
    return s.c(s.f(gate) * s.b(x))


def fused_clamped_in_place(s: Any, x: Tensor) -> Tensor:
    gate, up = s.both(x).chunk(2, dim=-1)
    up.clamp_(-0.1, 0.1)
    return s.out(s.f(gate) * up)


def fused_swapped(s: Any, x: Tensor) -> Tensor:
    up, gate = s.both(x).chunk(2, dim=-1)
    return s.out(s.f(gate) * up)


def fused_along_tokens(s: Any, x: Tensor) -> Tensor:
    gate, up = s.both(x).chunk(2, dim=0)
    return s.out(s.f(gate) * up)


def fused_interleaved(s: Any, x: Tensor) -> Tensor:
    both = s.both(x)
    return s.out(s.f(both[..., ::2]) * both[..., 1::2])


MORE = {
    "fused with up first": (Fused, fused_swapped, "the fused projection holds up before gate"),
    "interleaved": (Fused, fused_interleaved, "the activation's input is getitem(both"),
    "chunked along tokens": (Fused, fused_along_tokens, "chunk(2, dim=0)"),
    "cut in three": (
        Fused,
        lambda s, x: (lambda c: s.out(s.f(c[0]) * c[1]))(s.both(x).chunk(3, -1)),
        "chunk(3, dim=-1)",
    ),
    "clamped gate": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x).clamp(max=7)) * s.b(x)),
        "the activation's input is clamp(a(...)), not a linear layer",
    ),
    "clamped up": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x)) * s.b(x).clamp(-7, 7)),
        "the factor beside the activation is clamp(b(...), -7, 7)",
    ),
    "clamped in place": (Toy, clamped_in_place, "clamp_"),
    "fused and clamped in place": (Fused, fused_clamped_in_place, "clamp_"),
    "shifted up": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x)) * (s.b(x) + 1)),
        "the factor beside the activation is add(b(...), 1)",
    ),
    "scaled output": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x)) * s.b(x)) * 0.5,
        "its output is mul(c(...), 0.5), not a linear layer",
    ),
    "residual": (
        Toy,
        lambda s, x: x + s.c(s.f(s.a(x)) * s.b(x)),
        "its output is add(x, c(...))",
    ),
    "scaled product": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x)) * s.b(x) * 2),
        "c's input is mul(mul, 2), not act(gate) * up",
    ),
    "normed input": (
        Toy,
        lambda s, x: s.c(s.f(s.a(F.layer_norm(x, (8,)))) * s.b(x)),
        "a is given layer_norm(",
    ),
    "two inputs": (
        Toy,
        lambda s, x, y: s.c(s.f(s.a(x)) * s.b(y)),
        "its forward uses 2 inputs, not one",
    ),
    "no gate": (Toy, lambda s, x: s.c(s.a(x) * s.b(x)), "neither factor before c is one of"),
    "sum": (Toy, lambda s, x: s.c(s.f(s.a(x)) + s.b(x)), "c's input is add("),
    "data decides": (
        Toy,
        lambda s, x: s.c(s.f(s.a(x)) * s.b(x)) if x.sum() > 0 else x,
        "its forward cannot be traced",
    ),
    "side computation": (
        Toy,
        lambda s, x: s.c((lambda g: [g, g + s.a(x), s.f(g) * s.b(x)][2])(s.a(x))),
        "its forward also computes",
    ),
}


@pytest.mark.parametrize("name", MORE)
def test_a_module_that_does_more_is_refused(name: str) -> None:
    base, forward, says = MORE[name]
    assert says in reason(variant(base, forward)).replace("both(...)", "both")


@pytest.mark.parametrize("place", ["inside", "after"])
def test_dropout_is_refused_unless_idle(place: str) -> None:
    def inside(s: Any, x: Tensor) -> Tensor:
        return s.c(s.drop(s.f(s.a(x)) * s.b(x)))

    def after(s: Any, x: Tensor) -> Tensor:
        return s.drop(s.c(s.f(s.a(x)) * s.b(x)))

    module = variant(Toy, inside if place == "inside" else after)
    one_site(module)
    module.drop.p = 0.1
    for mode in (True, False):
        assert "drop(" in reason(module.train(mode))


def test_function_dropout_without_p_is_refused() -> None:
    assert "dropout" in reason(variant(Toy, lambda s, x: F.dropout(Toy.forward(s, x))))


def test_forward_replaced_on_the_instance() -> None:
    """Liger and others patch instances so; what runs is then no longer what the class says."""
    module = Toy()

    def patched(self: Any, x: Tensor) -> Tensor:
        return self.c(self.f(self.a(x)) * self.b(x))

    module.forward = types.MethodType(patched, module)
    assert "replaced on the instance" in reason(module)
    assert "patched" in reason(module)


@pytest.mark.parametrize("sizes", [(8, 12, 11, 8), (8, 12, 12, 8)])
def test_sizes_must_fit(sizes: tuple[int, int, int, int]) -> None:
    module = Toy()
    module.b = nn.Linear(sizes[0], sizes[2], bias=False)
    if sizes[2] == 12:
        module.c = nn.Linear(13, 8, bias=False)
        assert "c does not take 12 neurons" in reason(module)
    else:
        assert "a and b differ in shape" in reason(module)


# Activations


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (ACT2FN["silu"], "silu"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["relu"], "relu"),
        (F.silu, "silu"),
        (lambda z: z * torch.sigmoid(z), "silu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (ACT2FN["quick_gelu"], None),
        (ACT2FN["relu2"], None),
        (nn.Sigmoid(), None),
        (nn.Tanh(), None),
        (nn.Mish(), None),
        (nn.ReLU6(), None),
        (nn.LeakyReLU(0.01), None),
        (nn.Softplus(), None),
        (nn.Identity(), None),
        (lambda z: z.sum(), None),
        (lambda z: 1 / 0, None),
    ],
)
def test_activation_is_known_by_its_values(act: Any, kind: str | None) -> None:
    assert activation_kind(act) == kind


def test_every_kind_recognises_itself() -> None:
    assert {kind: activation_kind(act) for kind, act in ACTIVATIONS.items()} == {
        kind: kind for kind in ACTIVATIONS
    }


def test_recognition_leaves_an_activation_alone() -> None:
    act = nn.SiLU(inplace=True)
    assert activation_kind(act) == "silu"
    assert act.inplace


@pytest.mark.parametrize(
    ("act", "kind"), [(nn.ReLU(), "relu"), (nn.GELU(approximate="tanh"), "gelu_tanh")]
)
def test_kind_of_the_gate(act: nn.Module, kind: str) -> None:
    assert one_site(Toy(act)).act == kind


def test_quick_gelu_is_refused_by_name() -> None:
    assert reason(Toy(ACT2FN["quick_gelu"])) == (
        "its activation QuickGELUActivation is none of silu, gelu_tanh, gelu, relu"
    )


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
        (F.gelu, "gelu"),
        (torch.relu, "relu"),
        (F.relu, "relu"),
    ],
)
def test_functional_activations(function: Any, kind: str) -> None:
    module = variant(Toy, lambda s, x: s.c(function(s.a(x)) * s.b(x)))
    assert one_site(module).act == kind


# Lists


def test_sites_come_in_module_order_and_inner_modules_once() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Toy() for _ in range(11))

    sites, misses = find_sites(Outer())
    assert [site.name for site in sites] == [f"layers.{i}" for i in range(11)]
    assert misses == []


def test_attention_and_plain_layers_are_no_near_misses(llama: Any) -> None:
    assert find_sites(llama)[1] == []
    plain = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    assert find_sites(nn.ModuleList([plain, nn.LayerNorm(8)]))[0] == []


def test_finding_changes_nothing(llama: Any) -> None:
    before = {name: dict(m.__dict__) for name, m in llama.named_modules()}
    find_sites(llama)
    for name, module in llama.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert module.training == before[name]["training"]


def test_describe_groups_equal_refusals() -> None:
    misses = [NearMiss(f"layers.{i}", "MLP", "why") for i in range(30)]
    misses += [NearMiss(f"other.{i}", f"Kind{i}", "because") for i in range(7)]
    text = describe(misses, limit=3)
    assert text == (
        "MLP (layers.0 and 29 more): why; Kind0 (other.0): because; Kind1 (other.1): because; ..."
    )
    assert describe(misses[:1]) == "MLP (layers.0): why"
