"""Calibration runs: the model stays as it was, pads do not count, interrupted runs go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

import catsparse
import tiny
from catsparse import Calibration, CatsparseError, calibrate, observation
from catsparse.calibration import GateDecision
from catsparse.data import pack_texts
from catsparse.kernels import dequantize, make_preview
from catsparse.products import ProductStatistics
from catsparse.statistics import SiteStatistics
from test_calibration import assert_equal
from test_statistics import assert_same_counts

SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]
BATCHES = 6


def quiet(model: Any, data: Any, *arguments: Any, **options: Any) -> Calibration:
    return calibrate(model, data, *arguments, progress=False, **options)


def one_line(error: pytest.ExceptionInfo[CatsparseError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# The model is left alone


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that calibration might have touched."""
    return {
        "bytes": {k: v.numpy().tobytes() for k, v in model.state_dict().items()},
        "identities": {n: id(p) for n, p in model.named_parameters()},
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modules": {
            name: (
                type(m),
                m.training,
                sorted(m.__dict__),
                [len(m.__dict__[k]) for k in sorted(m.__dict__) if k.endswith("_hooks")],
            )
            for name, m in model.named_modules()
        },
        "grad mode": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


def mixed_flags(model: nn.Module) -> nn.Module:
    """Some modules in training, some not, as in fine-tuning with frozen parts."""
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    return model


def test_model_is_unchanged_after_success(llama: Any, windows: Tensor) -> None:
    mixed_flags(llama)
    llama.model.layers[0].mlp.register_forward_hook(lambda m, a, out: None)
    before = snapshot(llama)
    quiet(llama, windows)
    assert snapshot(llama) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", ["forward", "data"])
def test_model_is_unchanged_after_an_error(
    llama: Any, windows: Tensor, error: type[BaseException], at: str
) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("on purpose")

    def batches() -> Iterator[dict[str, Tensor]]:
        for ids in windows:
            if at == "data":
                fail()
            yield {"input_ids": ids[None]}

    mixed_flags(llama)
    if at == "forward":
        # Between the first layer's MLP and the second's: some hooks have fired, some not.
        llama.model.layers[1].self_attn.register_forward_hook(fail)
    before = snapshot(llama)
    with pytest.raises(error, match="on purpose"):
        quiet(llama, batches())
    assert calls == 3
    assert snapshot(llama) == before


def test_calibration_runs_in_evaluation_mode(windows: Tensor) -> None:
    model = tiny.build(tiny.llama_config(attention_dropout=0.5))
    expected = quiet(model, windows)
    assert_equal(quiet(model.train(), windows), expected)
    assert model.training


def test_repeatable(llama: Any, windows: Tensor) -> None:
    assert_equal(quiet(llama, windows), quiet(llama, windows))


# What is counted


def watched(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, SiteStatistics]:
    """Statistics from activations collected by hooks of our own, pads taken out by hand."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []
    for name in SITES:
        for child in ("gate_proj", "up_proj"):
            key = f"{name}.{child}"
            outputs[key] = []
            handles.append(
                model.get_submodule(key).register_forward_hook(
                    lambda m, a, out, key=key: outputs[key].append(out)
                )
            )
    statistics = {name: SiteStatistics.empty(48) for name in SITES}
    with torch.no_grad():
        for i, batch in enumerate(batches):
            model(**batch, use_cache=False)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for name in SITES:
                g = F.silu(outputs[f"{name}.gate_proj"][i])[mask]
                u = outputs[f"{name}.up_proj"][i][mask]
                statistics[name].update(g, u, g * u)
    for handle in handles:
        handle.remove()
    return statistics


def padded_batch(side: str) -> dict[str, Tensor]:
    lengths = [20, 1, 13, 7]
    ids = torch.zeros(4, 20, dtype=torch.long)
    mask = torch.zeros(4, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(20 - length, 20)
        ids[row, at] = tiny.tokens(1, length, seed=row)[0]
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_statistics_are_those_of_the_activations(llama: Any, windows: Tensor) -> None:
    batches = [{"input_ids": ids} for ids in windows.split(3)]
    calibration = quiet(llama, windows, batch_size=3)
    for name, statistics in watched(llama, batches).items():
        own = calibration.statistics[name]
        assert own.tokens == windows.numel()
        for field in ("histogram", "gate_square", "up_square", "bucket_count", "bucket_sum"):
            assert torch.equal(getattr(own, field), getattr(statistics, field)), field


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_not_counted(llama: Any, side: str) -> None:
    batch = padded_batch(side)
    calibration = quiet(llama, [batch])
    assert calibration.provenance.tokens == 41
    for name, statistics in watched(llama, [batch]).items():
        own = calibration.statistics[name]
        assert own.tokens == 41
        for field in ("histogram", "gate_square", "up_square", "bucket_count", "bucket_sum"):
            assert torch.equal(getattr(own, field), getattr(statistics, field)), field


def test_padded_equals_unpadded(llama: Any) -> None:
    batch = padded_batch("right")
    rows = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    padded, alone = quiet(llama, [batch]), quiet(llama, rows)
    assert padded.provenance.tokens == alone.provenance.tokens
    for name in SITES:
        one, other = padded.statistics[name], alone.statistics[name]
        assert one.tokens == other.tokens
        # Other batch shapes round a few gates to the neighbouring bf16 magnitude.
        assert int((one.histogram - other.histogram).abs().sum()) <= 8
        torch.testing.assert_close(one.gate_square, other.gate_square, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.up_square, other.up_square, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.int32])
def test_any_kind_of_mask(llama: Any, kind: torch.dtype) -> None:
    batch = padded_batch("right")
    typed = batch | {"attention_mask": batch["attention_mask"].to(kind)}
    assert_equal(quiet(llama, [typed]), quiet(llama, [batch]))


def test_full_mask_is_no_mask(llama: Any, windows: Tensor) -> None:
    batches = [{"input_ids": windows, "attention_mask": torch.ones_like(windows)}]
    assert_same(quiet(llama, batches), quiet(llama, [{"input_ids": windows}]))


def assert_same(one: Calibration, other: Calibration) -> None:
    """Every statistic bit for bit; the provenance may differ."""
    first, second = one.tensors(), other.tensors()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_module_that_sees_other_tokens_than_the_batch() -> None:
    """Where an MLP is given a part of the tokens, pads cannot be told apart; without, they can."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(tiny.VOCABULARY, 32)
            self.mlp = tiny.build(tiny.llama_config()).model.layers[0].mlp

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            return self.mlp(self.embedding(input_ids)[:, 1:])

    batch = padded_batch("right")
    with pytest.raises(CatsparseError, match="padding") as caught:
        quiet(Part(), [batch])
    one_line(caught)
    assert quiet(Part(), batch["input_ids"]).statistics["mlp"].tokens == 4 * 19


# Kinds of data


class Characters:
    eos_token_id = 2

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 60 for c in text]}


TEXTS = ["The quick brown fox jumps over the lazy dog. " * n for n in (1, 4, 2, 3)]


def test_windows_batches_and_texts_are_alike(llama: Any) -> None:
    ids = pack_texts(TEXTS, Characters(), tokens=256, seq_len=32, seed=4)
    windows = quiet(llama, ids, batch_size=4)
    assert_same(windows, quiet(llama, [{"input_ids": rows} for rows in ids.split(4)]))
    assert_same(windows, quiet(llama, ({"input_ids": rows} for rows in ids.split(4))))
    options = {"tokens": 256, "seq_len": 32, "seed": 4, "batch_size": 4}
    assert_same(windows, quiet(llama, TEXTS, Characters(), **options))
    assert_same(windows, quiet(llama, tuple(TEXTS), Characters(), **options))


def test_provenance(llama: Any, windows: Tensor) -> None:
    provenance = quiet(llama, windows, data_name="books", seed=3).provenance
    assert provenance.data == "books"
    assert (provenance.tokens, provenance.seq_len, provenance.seed) == (256, 32, 3)
    assert provenance.dtype == "float32"
    assert quiet(llama.bfloat16(), windows).provenance.dtype == "bfloat16"


def test_batch_size_changes_nothing_but_rounding(llama: Any, windows: Tensor) -> None:
    whole, single = quiet(llama, windows), quiet(llama, windows, batch_size=1)
    for name in SITES:
        one, other = whole.statistics[name], single.statistics[name]
        assert one.tokens == other.tokens
        assert int((one.histogram - other.histogram).abs().sum()) <= 20
        torch.testing.assert_close(one.up_square, other.up_square, rtol=1e-4, atol=1e-5)


def test_addition_equals_one_run(llama: Any, windows: Tensor) -> None:
    both = quiet(llama, windows[:4], batch_size=2) + quiet(llama, windows[4:], batch_size=2)
    one = quiet(llama, windows, batch_size=2)
    assert both.sites == one.sites
    assert both.provenance == one.provenance
    for name in SITES:
        assert_same_counts(both.statistics[name], one.statistics[name])


def test_batches_may_hold_labels(llama: Any, windows: Tensor) -> None:
    """As the usual collators make them; the loss is of no interest here."""
    batch = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    assert_same(quiet(llama, [batch | {"labels": windows}]), quiet(llama, [batch]))


def test_fused_projection() -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": 0}
    config |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = tiny.build(AutoConfig.for_model("phi3", **config))
    seen: list[Tensor] = []
    mlp = model.model.layers[0].mlp
    handle = mlp.gate_up_proj.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    own = quiet(model, tiny.tokens(2, 16)).statistics["model.layers.0.mlp"]
    handle.remove()
    gate, up = seen[0].flatten(0, 1).split(48, dim=-1)
    g = F.silu(gate)
    expected = SiteStatistics.empty(48)
    expected.update(g, up, g * up)
    assert_same_counts(own, expected)
    np.testing.assert_allclose(own.up_square, up.double().square().sum(0), rtol=1e-5)


def test_progress_goes_to_stderr(
    llama: Any, windows: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    calibrate(llama, windows, progress=True)
    assert capfd.readouterr().out == ""
    quiet(llama, windows)
    assert capfd.readouterr() == ("", "")


# Refusals


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.zeros(2, 3), "integer tensor"),
        (torch.zeros(3, dtype=torch.long), "integer tensor"),
        (torch.zeros(0, 8, dtype=torch.long), "integer tensor"),
        (["a text"], "need a tokenizer"),
        ("a text", "token ids, batches or a list of texts"),
        (3, "token ids, batches or a list of texts"),
        (None, "token ids, batches or a list of texts"),
        ([], "no calibration token"),
        (iter([]), "no calibration token"),
    ],
    ids=["floats", "flat", "empty", "texts", "one text", "number", "none", "no batch", "no more"],
)
def test_unusable_data(llama: Any, data: Any, says: str) -> None:
    with pytest.raises(CatsparseError, match=says) as caught:
        quiet(llama, data)
    one_line(caught)


def test_one_text_is_not_taken_for_its_letters(llama: Any) -> None:
    with pytest.raises(CatsparseError, match="list of texts"):
        quiet(llama, TEXTS[1] * 10, Characters(), tokens=64, seq_len=16)


def test_nothing_but_padding(llama: Any) -> None:
    batch = padded_batch("right")
    batch["attention_mask"].zero_()
    with pytest.raises(CatsparseError, match="no calibration token"):
        quiet(llama, [batch])


@pytest.mark.parametrize("where", ["gate_proj", "up_proj"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_activations_that_are_not_finite(
    llama: Any, windows: Tensor, where: str, value: float
) -> None:
    with torch.no_grad():
        llama.model.layers[1].mlp.get_submodule(where).weight[5, 3] = value
    with pytest.raises(CatsparseError, match=r"model\.layers\.1\.mlp are not finite") as caught:
        quiet(llama, windows)
    assert "bf16 or fp32" in one_line(caught)


def tiny_model(family: str) -> Any:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return tiny.build(AutoConfig.for_model(family, **config, bos_token_id=1, eos_token_id=2))


def test_model_without_gated_mlps(windows: Tensor) -> None:
    with pytest.raises(CatsparseError, match="GPT2LMHeadModel has no gated MLP") as caught:
        quiet(tiny_model("gpt2"), windows)
    message = one_line(caught)
    assert "down(act(gate(x)) * up(x))" in message
    assert "no module comes near" in message


def test_model_with_near_misses(windows: Tensor) -> None:
    with pytest.raises(CatsparseError, match="BitNetForCausalLM has no gated MLP") as caught:
        quiet(tiny_model("bitnet"), windows)
    message = one_line(caught)
    assert "down(act(gate(x)) * up(x))" in message
    assert "BitNetMLP (model.layers.0.mlp and 1 more): down_proj's input is ffn_sub_norm" in message


def test_sparse_model(sparse_llama: Any, windows: Tensor) -> None:
    with pytest.raises(CatsparseError, match=r"already sparse.*densify") as caught:
        quiet(sparse_llama, windows)
    one_line(caught)


# Sites that no token passes through


class Idle(nn.Module):
    """A language model beside a gated MLP that text does not reach, as a vision tower's."""

    def __init__(self) -> None:
        super().__init__()
        self.language = tiny.build(tiny.llama_config())
        self.vision = tiny.build(tiny.llama_config()).model.layers[0].mlp

    def forward(self, **inputs: Any) -> Any:
        return self.language(**inputs)


def test_idle_sites_are_left_out(windows: Tensor) -> None:
    calibration = quiet(Idle(), windows)
    assert list(calibration.sites) == [f"language.{name}" for name in SITES]
    assert list(calibration.statistics) == list(calibration.sites)


def test_only_idle_sites(windows: Tensor) -> None:
    model = Idle()
    model.language = nn.Identity()
    model.forward = lambda input_ids, **_: input_ids
    with pytest.raises(CatsparseError, match="no token reached any gated MLP"):
        quiet(model, windows)


# Checkpoints


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": tiny.tokens(2, 16, seed=i)} for i in range(BATCHES)]


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each batch."""
    monkeypatch.setattr(observation, "_SAVE_SECONDS", -1.0)


def interrupted(data: list[Any], after: int) -> Iterator[Any]:
    yield from data[:after]
    raise KeyboardInterrupt


def interrupt(model: nn.Module, data: list[Any], after: int, checkpoint: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet(model, interrupted(data, after), checkpoint=checkpoint)
    assert checkpoint.exists() == (after > 0)


def counted(model: nn.Module) -> list[int]:
    """The forward passes of ``model`` from now on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("after", [0, 1, 3, BATCHES])
def test_interrupted_run_goes_on(
    llama: Any, batches: list[Any], after: int, tmp_path: Path
) -> None:
    expected = quiet(llama, batches)
    path = tmp_path / "checkpoint"
    interrupt(llama, batches, after, path)
    calls = counted(llama)
    resumed = quiet(llama, batches, checkpoint=path)
    assert len(calls) == BATCHES - after
    assert_equal(resumed, expected)
    assert os.listdir(tmp_path) == []


def test_kept_checkpoint_holds_the_whole_run(
    llama: Any, batches: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    expected = quiet(llama, batches, checkpoint=path, keep_checkpoint=True)
    assert path.exists()
    calls = counted(llama)
    assert_equal(quiet(llama, batches, checkpoint=path), expected)
    assert len(calls) == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("every_batch")
def test_interrupted_twice(llama: Any, batches: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for after in (2, 2, 5):  # the second is interrupted before it has come further
        interrupt(llama, batches, after, path)
    assert_equal(quiet(llama, batches, checkpoint=str(path)), quiet(llama, batches))


@pytest.mark.usefixtures("every_batch")
def test_interrupted_in_a_forward_pass(llama: Any, batches: list[Any], tmp_path: Path) -> None:
    """The batch under way was counted in some layers and not in others; it must count once."""
    expected = quiet(llama, batches)
    path = tmp_path / "checkpoint"
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    handle = llama.model.layers[1].self_attn.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, batches, checkpoint=path)
    handle.remove()
    assert_equal(quiet(llama, batches, checkpoint=path), expected)


@pytest.mark.usefixtures("every_batch")
def test_padded_run_goes_on(llama: Any, tmp_path: Path) -> None:
    data = [padded_batch("right"), padded_batch("left"), padded_batch("right")]
    path = tmp_path / "checkpoint"
    interrupt(llama, data, 2, path)
    assert_equal(quiet(llama, data, checkpoint=path), quiet(llama, data))


@pytest.mark.usefixtures("every_batch")
def test_run_with_idle_sites_goes_on(batches: list[Any], tmp_path: Path) -> None:
    model = Idle()
    path = tmp_path / "checkpoint"
    interrupt(model, batches, 2, path)
    assert_equal(quiet(model, batches, checkpoint=path), quiet(model, batches))


def test_short_runs_write_no_checkpoint(llama: Any, batches: list[Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, interrupted(batches, 3), checkpoint=tmp_path / "checkpoint")
    assert os.listdir(tmp_path) == []


def other_tokens(batches: list[Any]) -> list[Any]:
    return [{"input_ids": b["input_ids"].flip(1)} for b in batches]


def other_order(batches: list[Any]) -> list[Any]:
    return batches[::-1]


def fewer(batches: list[Any]) -> list[Any]:
    return batches[:2]


def other_shape(batches: list[Any]) -> list[Any]:
    """The same ids in the same order, in windows of another length."""
    return [{"input_ids": b["input_ids"].view(4, 8)} for b in batches]


def other_mask(batches: list[Any]) -> list[Any]:
    """The same ids and as many of them counted, but others."""
    return [b | {"attention_mask": b["attention_mask"].flip(1)} for b in batches]


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("change", [other_tokens, other_order, fewer, other_shape, other_mask])
def test_checkpoint_of_other_data(
    llama: Any,
    batches: list[Any],
    change: Callable[[list[Any]], list[Any]],
    tmp_path: Path,
) -> None:
    if change is other_mask:
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[:, 10:] = 0
        batches = [b | {"attention_mask": mask} for b in batches]
    path = tmp_path / "checkpoint"
    interrupt(llama, batches, 3, path)
    with pytest.raises(CatsparseError, match="delete it to start again") as caught:
        quiet(llama, change(batches), checkpoint=path)
    assert str(path) in one_line(caught)
    assert path.exists()


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("change", ["dtype", "sites", "weights"])
def test_checkpoint_of_another_model(
    llama: Any, batches: list[Any], change: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    interrupt(llama, batches, 3, path)
    other = tiny.build(tiny.llama_config(num_hidden_layers=3 if change == "sites" else 2), seed=5)
    with pytest.raises(CatsparseError, match="delete it to start again"):
        quiet(llama.bfloat16() if change == "dtype" else other, batches, checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\xff" * 64])
def test_damaged_checkpoint(llama: Any, batches: list[Any], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(CatsparseError) as caught:
        quiet(llama, batches, checkpoint=path)
    assert str(path) in one_line(caught)
    assert path.read_bytes() == content


@pytest.mark.usefixtures("every_batch")
def test_a_calibration_is_no_checkpoint(llama: Any, batches: list[Any], tmp_path: Path) -> None:
    """Whoever names a finished calibration must not have it overwritten or deleted."""
    path = tmp_path / "calibration.safetensors"
    quiet(llama, batches).save(path)
    with pytest.raises(CatsparseError, match="delete it to start again"):
        quiet(llama, batches, checkpoint=path)
    assert path.exists()


@pytest.mark.usefixtures("every_batch")
def test_thresholds_after_resuming_are_the_same(
    llama: Any, batches: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    interrupt(llama, batches, 4, path)
    resumed = quiet(llama, batches, checkpoint=path).thresholds(0.5)
    for name, t in quiet(llama, batches).thresholds(0.5).items():
        assert torch.equal(resumed[name].threshold, t.threshold)
        assert t.mean is not None
        assert torch.equal(resumed[name].mean, t.mean)


def test_result_is_on_the_cpu_and_usable(llama: Any, windows: Tensor) -> None:
    calibration = quiet(llama, windows)
    assert all(t.device.type == "cpu" for t in calibration.tensors().values())
    catsparse.sparsify(llama, calibration)


# A preview's activations, and the second pass


def gates_by_hand(model: Any, windows: Tensor, bits: int | None) -> dict[str, tuple[Tensor, ...]]:
    """(g that decides, u, h) of each site."""
    return {name: found[:3] for name, found in foretold_by_hand(model, windows, bits).items()}


def foretold_by_hand(
    model: Any, windows: Tensor, bits: int | None
) -> dict[str, tuple[Tensor, ...]]:
    """(g that decides, u, h, h foretold) of each site, from hooks of our own."""
    seen: dict[str, list[Tensor]] = {name: [] for name in SITES}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].flatten(0, 1))
        )
        for name in SITES
    ]
    with torch.no_grad():
        for ids in windows.split(8):
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for name, parts in seen.items():
        mlp, x = model.get_submodule(name), torch.cat(parts)
        w_gate, w_up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        decides = [w_gate, w_up]
        if bits is not None:
            decides = [dequantize(*make_preview(w, bits), w.shape[1], x.dtype) for w in decides]
        g, u = F.silu(x @ decides[0].t()), x @ w_up.t()
        found[name] = g, u, F.silu(x @ w_gate.t()) * u, g * (x @ decides[1].t())
    return found


def assert_alike(one: Tensor, other: Tensor) -> None:
    """Counts, but for a few that other matmuls round to the next magnitude."""
    assert int(one.sum()) == int(other.sum())
    assert int((one - other).abs().sum()) <= 8


@pytest.mark.parametrize("bits", [4, 8])
def test_preview_is_what_is_counted(llama: Any, windows: Tensor, bits: int) -> None:
    calibration = quiet(llama, windows, preview=bits)
    assert calibration.preview == bits
    assert calibration.products_at is None
    for name, (g, u, h) in gates_by_hand(llama, windows, bits).items():
        expected, own = SiteStatistics.empty(48), calibration.statistics[name]
        expected.update(g, u, h)
        assert_alike(own.histogram, expected.histogram)
        torch.testing.assert_close(own.gate_square, expected.gate_square, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.up_square, expected.up_square, rtol=1e-4, atol=1e-5)
        sums = own.bucket_sum.sum(0), expected.bucket_sum.sum(0)
        torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)  # of the exact product
        exact = quiet(llama, windows).statistics[name]
        assert int((own.histogram - exact.histogram).abs().sum()) > 1000


@pytest.mark.parametrize("bits", [4, 8])
def test_products_foretold_are_those_of_both_previews(
    llama: Any, windows: Tensor, bits: int
) -> None:
    calibration = quiet(llama, windows, preview=bits)
    assert calibration.foretold.keys() == calibration.sites.keys()
    for name, (_, _, h, foretold) in foretold_by_hand(llama, windows, bits).items():
        norm = llama.get_submodule(name).down_proj.weight.detach().double().norm(dim=0).float()
        own, expected = calibration.foretold[name], ProductStatistics.empty(norm)
        expected.update(foretold, h)
        torch.testing.assert_close(own.down_norm, norm, rtol=1e-5, atol=0)
        assert_alike(own.histogram, expected.histogram)
        assert_alike(own.bucket_count, expected.bucket_count)
        sums = own.bucket_sum.sum(0), expected.bucket_sum.sum(0)
        torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3)  # of the exact product
        exact = ProductStatistics.empty(norm)
        exact.update(h, h)
        assert int((own.histogram - exact.histogram).abs().sum()) > 1000
    assert not quiet(llama, windows).foretold


def test_share_of_product_on_the_calibration_tokens(llama: Any, windows: Tensor) -> None:
    """The first layer sees the very inputs that were counted: there the share is exact."""
    catsparse.sparsify(llama, quiet(llama, windows, preview=4), 0.6)
    with torch.no_grad(), catsparse.achieved_sparsity(llama) as meter:
        llama(input_ids=windows)
    share = llama.catsparse.config.sites[SITES[0]].sparsity
    assert share == pytest.approx(0.6, abs=1e-3)
    assert meter.sites[SITES[0]] == meter.down_sites[SITES[0]] == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["cats", "chess"])
def test_products_are_those_behind_the_gate(
    llama: Any, windows: Tensor, bits: int | None, method: str
) -> None:
    calibration = quiet(llama, windows, preview=bits, products_at=0.4, method=method)
    first = quiet(llama, windows, preview=bits)
    assert calibration.products_at == GateDecision(0.4, method)
    assert calibration.provenance == first.provenance
    thresholds = first.thresholds(0.4, method)
    for name, (g, _, h) in gates_by_hand(llama, windows, bits).items():
        norm = llama.get_submodule(name).down_proj.weight.detach().double().norm(dim=0).float()
        own = calibration.products[name]
        torch.testing.assert_close(own.down_norm, norm, rtol=1e-5, atol=0)
        expected = ProductStatistics.empty(norm)
        expected.update(h, h, g.abs() > thresholds[name].threshold)
        assert int((own.histogram - expected.histogram).abs().sum()) <= 8
        assert int((own.bucket_count - expected.bucket_count).abs().sum()) <= 8
        sums = own.bucket_sum.sum(0), expected.bucket_sum.sum(0)
        torch.testing.assert_close(*sums, rtol=1e-2, atol=1e-2)
        for field in ("histogram", "bucket_count", "bucket_sum"):  # the first pass is the same
            assert torch.equal(
                getattr(calibration.statistics[name], field), getattr(first.statistics[name], field)
            )


def test_shares_on_the_calibration_tokens(llama: Any, windows: Tensor) -> None:
    """The first layer sees the very inputs that were counted: there the shares are exact."""
    calibration = quiet(llama, windows, preview=4, products_at=0.4)
    catsparse.sparsify(llama, calibration, 0.4, down_sparsity=0.6)
    with torch.no_grad(), catsparse.achieved_sparsity(llama) as meter:
        llama(input_ids=windows)
    site = llama.catsparse.config.sites[SITES[0]]
    assert meter.sites[SITES[0]] == pytest.approx(site.sparsity, abs=1e-3)
    assert meter.down_sites[SITES[0]] == pytest.approx(site.down_sparsity, abs=5e-3)
    assert site.sparsity == pytest.approx(0.4, abs=0.02)
    assert site.down_sparsity == pytest.approx(0.6, abs=1e-3)


def test_pads_are_in_neither_pass(llama: Any) -> None:
    batch = padded_batch("right")
    calibration = quiet(llama, [batch], preview=4, products_at=0.0, method="chess")
    for products in (*calibration.products.values(), *calibration.foretold.values()):
        assert bool((products.bucket_count.sum(0) == 41).all())


def test_fused_projection_has_a_preview(windows: Tensor) -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny.build(AutoConfig.for_model("phi3", **config, bos_token_id=1, eos_token_id=2))
    calibration = quiet(model, windows, preview=4, products_at=0.4)
    catsparse.sparsify(model, calibration, 0.4, down_sparsity=0.6)
    with torch.no_grad(), catsparse.achieved_sparsity(model) as meter:
        model(input_ids=windows)
    assert meter.sparsity == pytest.approx(0.4, abs=0.02)
    assert meter.down_sparsity == pytest.approx(0.6, abs=0.01)
    catsparse.sparsify(catsparse.densify(model), calibration, 0.6)
    assert model.catsparse.config.method == "product"
    with torch.no_grad(), catsparse.achieved_sparsity(model) as meter:
        model(input_ids=windows)
    assert meter.sparsity == meter.down_sparsity == pytest.approx(0.6, abs=0.01)


def test_data_that_can_be_read_only_once(llama: Any, batches: list[Any]) -> None:
    with pytest.raises(CatsparseError, match=r"read only once.*list of batches") as caught:
        quiet(llama, iter(batches), products_at=0.5)
    one_line(caught)
    quiet(llama, iter(batches), preview=4)


def test_data_that_is_other_when_read_again(llama: Any, batches: list[Any]) -> None:
    class Shrinking:
        def __iter__(self) -> Iterator[Any]:
            batches.pop()
            return iter(batches)

    with pytest.raises(CatsparseError, match=r"160 tokens at first and 128 when read again"):
        quiet(llama, Shrinking(), products_at=0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preview": 3}, "preview must be 4 or 8"),
        ({"preview": True}, "preview must be 4 or 8"),
        ({"preview": 4.0}, "preview must be 4 or 8"),
        ({"products_at": 1.0}, "sparsity must be"),
        ({"products_at": 0.5, "method": "teal"}, "method must be one of"),
        ({"products_at": 0.5, "method": "product"}, "method must be one of cats, chess, energy"),
    ],
)
def test_unusable_options(llama: Any, windows: Tensor, options: Any, says: str) -> None:
    with pytest.raises(CatsparseError, match=says) as caught:
        quiet(llama, windows, **options)
    one_line(caught)


def test_weights_that_cannot_be_read(llama: Any, windows: Tensor) -> None:
    class Wrapped(nn.Linear):
        pass

    before = snapshot(llama)
    mlp = llama.model.layers[1].mlp
    both = {"preview": 4}, {"products_at": 0.5}
    for child, option in (
        *((child, both[0]) for child in ("gate_proj", "up_proj", "down_proj")),
        ("down_proj", both[1]),
    ):
        linear = getattr(mlp, child)
        linear.__class__ = Wrapped
        remedy = f"{child} is .*; calibrate without {next(iter(option))}"
        with pytest.raises(CatsparseError, match=remedy) as caught:
            quiet(llama, windows, **option)
        assert SITES[1] in one_line(caught)
        linear.__class__ = nn.Linear
    assert snapshot(llama) == before


PASSES = {"preview": 4, "products_at": 0.4}


class Interrupting:
    """Batches that may be read again, with an interrupt before the batch of this number in all."""

    def __init__(self, batches: list[Any], after: int) -> None:
        self.batches, self.left = batches, after

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("after", [1, BATCHES, BATCHES + 1, 2 * BATCHES - 1])
def test_interrupted_passes_go_on(
    llama: Any, batches: list[Any], after: int, tmp_path: Path
) -> None:
    expected = quiet(llama, batches, **PASSES)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, Interrupting(batches, after), checkpoint=path, **PASSES)
    assert path.exists()
    calls = counted(llama)
    resumed = quiet(llama, batches, checkpoint=path, **PASSES)
    assert len(calls) == 2 * BATCHES - after
    assert_equal(resumed, expected)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("every_batch")
def test_interrupted_in_both_passes(llama: Any, batches: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for after in (2, BATCHES + 2, BATCHES + 2, BATCHES + 4):
        with pytest.raises(KeyboardInterrupt):
            quiet(llama, Interrupting(batches, after), checkpoint=path, **PASSES)
    assert_equal(quiet(llama, batches, checkpoint=path, **PASSES), quiet(llama, batches, **PASSES))


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize(
    "change",
    [
        *({"preview": 8}, {"preview": None}, {"products_at": 0.5}, {"products_at": None}),
        {"method": "chess"},
    ],
    ids=str,
)
def test_checkpoint_of_a_second_pass_of_other_settings(
    llama: Any, batches: list[Any], change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, Interrupting(batches, BATCHES + 2), checkpoint=path, **PASSES)
    with pytest.raises(CatsparseError, match="delete it to start again") as caught:
        quiet(llama, batches, checkpoint=path, **(PASSES | change))
    assert str(path) in one_line(caught)
    assert path.exists()


@pytest.mark.usefixtures("every_batch")
def test_model_is_unchanged_by_both_passes(llama: Any, windows: Tensor, tmp_path: Path) -> None:
    before = snapshot(mixed_flags(llama))
    quiet(llama, windows, checkpoint=tmp_path / "checkpoint", **PASSES)
    assert snapshot(llama) == before
