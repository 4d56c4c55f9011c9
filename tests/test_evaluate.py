"""Perplexity and its standard error, against transformers' own loss and numpy's statistics."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import catsparse
from catsparse import CatsparseError, evaluate
from catsparse.modules import sparse_modules
from tiny import build, calibrate, close, llama_config, logits, masked_by_hand, tokens

WINDOWS = tokens(7, 40, seed=11)


@pytest.fixture(scope="module")
def calibration() -> catsparse.Calibration:
    return calibrate(build(llama_config()))


@pytest.fixture
def dense() -> Any:
    return build(llama_config())


@pytest.fixture
def sparse(calibration: catsparse.Calibration) -> Any:
    return catsparse.sparsify(build(llama_config()), calibration, 0.6)


@torch.no_grad()
def losses_by_transformers(model: Any, windows: Tensor = WINDOWS) -> np.ndarray:
    """The mean loss of each window, one at a time."""
    rows = [model(input_ids=row[None], labels=row[None]).loss for row in windows]
    return torch.stack(rows).double().numpy()


def score(model: Any, windows: Tensor = WINDOWS, **options: Any) -> evaluate.Perplexity:
    return evaluate.perplexity(model, windows, progress=False, **options)


def evaluated(model: Any, windows: Tensor = WINDOWS, **options: Any) -> evaluate.Evaluation:
    return evaluate.evaluate(model, windows, progress=False, **options)


# -- perplexity


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_perplexity_is_that_of_transformers_loss(dense: Any, batch_size: int) -> None:
    expected = losses_by_transformers(dense)
    found = score(dense, batch_size=batch_size)
    assert found.losses.dtype == torch.float64
    np.testing.assert_allclose(found.losses.numpy(), expected, rtol=1e-5)
    assert found.value == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert found.value > 1.5


@pytest.mark.parametrize("length", [2, 5, 16, 17, 40])
def test_perplexity_at_any_length(sparse: Any, dense: Any, length: int) -> None:
    """Also where a batch is small enough for the op."""
    windows = WINDOWS[:, :length]
    expected = losses_by_transformers(masked_by_hand(sparse, dense), windows)
    found = score(sparse, windows, batch_size=1)
    np.testing.assert_allclose(found.losses.numpy(), expected, rtol=1e-4)


def test_perplexity_of_bf16_logits_is_taken_in_fp32(dense: Any) -> None:
    model = dense.bfloat16()
    expected = losses_by_transformers(model)
    np.testing.assert_allclose(score(model).losses.numpy(), expected, rtol=1e-3)
    # Losses rounded to bf16 would fall on a grid of 2^-6 in this range.
    assert not torch.equal(score(model).losses.bfloat16().double(), score(model).losses)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(dense: Any) -> None:
    with torch.no_grad():
        dense.lm_head.weight.zero_()
    found = score(dense)
    assert found.value == pytest.approx(64, rel=1e-6)
    assert found.standard_error == pytest.approx(0, abs=1e-4)


def test_the_first_token_is_only_context(dense: Any) -> None:
    """Every next token certain: nothing but the first is left to guess, and it is not scored."""
    windows = torch.arange(3, 43).repeat(4, 1)

    class Successor(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            scores = torch.nn.functional.one_hot(input_ids + 1, 64) * 100.0
            return type("Output", (), {"logits": scores})

    assert score(Successor(), windows).value == pytest.approx(1, abs=1e-6)


def test_standard_error(dense: Any) -> None:
    losses = losses_by_transformers(dense)
    expected = np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(len(losses))
    assert score(dense).standard_error == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_standard_error_is_the_spread_of_perplexity(dense: Any) -> None:
    """Over many sets of windows the perplexity scatters as much as each of them says."""
    windows = tokens(400, 12, seed=5)
    values = [score(dense, part, batch_size=20) for part in windows.split(20)]
    scatter = np.std([v.value for v in values], ddof=1)
    stated = np.mean([v.standard_error for v in values])
    assert 0.6 < scatter / stated < 1.6  # 20 sets: known to about 16%


def test_one_window_has_no_standard_error(dense: Any, sparse: Any) -> None:
    assert math.isnan(score(dense, WINDOWS[:1]).standard_error)
    found = evaluated(sparse, WINDOWS[:1])
    assert math.isnan(found.rise_standard_error)
    assert math.isfinite(found.rise)


@pytest.mark.parametrize(
    "windows",
    [torch.zeros(0, 8, dtype=torch.long), tokens(1, 1), tokens(4, 8)[0], tokens(2, 8)[None]],
    ids=["no window", "one token", "one dimension", "three dimensions"],
)
def test_windows_of_a_wrong_shape(dense: Any, windows: Tensor) -> None:
    with pytest.raises(CatsparseError, match="windows must be"):
        score(dense, windows)


def test_loss_that_is_not_finite(dense: Any) -> None:
    with torch.no_grad():
        dense.lm_head.weight[7] = torch.nan
    with pytest.raises(CatsparseError, match="not finite"):
        score(dense)


@pytest.mark.parametrize("training", [False, True])
def test_perplexity_leaves_the_training_flags(dense: Any, training: bool) -> None:
    """Each module's own flag: a part frozen in evaluation mode stays so."""
    dense.train(training)
    dense.model.layers[0].eval()
    flags = [m.training for m in dense.modules()]
    score(dense)
    assert [m.training for m in dense.modules()] == flags


def test_perplexity_leaves_the_training_flags_when_it_fails(dense: Any) -> None:
    dense.train()
    with torch.no_grad():
        dense.lm_head.weight[7] = torch.nan
    with pytest.raises(CatsparseError):
        score(dense)
    assert dense.training
    with pytest.raises(IndexError):
        score(dense, WINDOWS + 1000)
    assert dense.training


def test_perplexity_is_scored_in_evaluation_mode() -> None:
    model = build(llama_config(attention_dropout=0.5))
    expected = score(model).losses
    assert torch.equal(score(model.train()).losses, expected)


def test_progress_goes_to_stderr(dense: Any, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.perplexity(dense, WINDOWS, progress=True)
    assert capsys.readouterr().out == ""


# -- dense beside sparse


@pytest.mark.parametrize("prefill", ["masked", "dense"])
def test_evaluation(dense: Any, calibration: catsparse.Calibration, prefill: str) -> None:
    """Every number once more, by hand."""
    model = catsparse.sparsify(copy.deepcopy(dense), calibration, 0.6, prefill=prefill)
    by_hand = masked_by_hand(model, dense)
    dropped: dict[str, list[Tensor]] = {name: [] for name in sparse_modules(model)}
    for name, kept in dropped.items():
        mlp, threshold = by_hand.get_submodule(name), model.catsparse.thresholds[name].threshold

        def count(child: Any, args: Any, gate: Tensor, kept: Any = kept, t: Tensor = threshold):
            kept.append((torch.nn.functional.silu(gate).abs() <= t).double().mean())

        mlp.gate_proj.register_forward_hook(count)
    expected, expected_dense = losses_by_transformers(by_hand), losses_by_transformers(dense)
    sites = {name: float(torch.stack(shares).mean()) for name, shares in dropped.items()}

    found = evaluated(model)
    assert found.tokens == 7 * 39
    np.testing.assert_allclose(found.perplexity.losses.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.dense_perplexity.losses.numpy(), expected_dense, rtol=1e-5)
    ratio = np.exp(expected.mean() - expected_dense.mean())
    assert found.rise == pytest.approx(ratio - 1, rel=1e-3)
    difference = expected - expected_dense
    paired = ratio * difference.std(ddof=1) / math.sqrt(7)
    assert found.rise_standard_error == pytest.approx(paired, rel=1e-3)
    assert found.sites == pytest.approx(sites, rel=1e-3)
    # The sites are of one size here.
    share = sum(sites.values()) / 2
    assert found.sparsity == pytest.approx(share, rel=1e-3)
    assert 0.5 < share < 0.7
    assert found.bytes_skipped == pytest.approx(2 / 3 * share, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sparsity_by_position(sparse: Any, batch_size: int) -> None:
    found = evaluate.evaluate(sparse, WINDOWS, batch_size=batch_size, progress=False)
    positions = found.positions
    assert positions is not None
    assert (positions.starts, positions.length) == ([0, 1, 2, 4, 8, 16, 32], 40)
    sizes = [b - a for a, b in zip(positions.starts, [*positions.starts[1:], 40], strict=True)]
    # Every token of every window is in one bucket.
    for name, shares in [*positions.sites.items(), ("", positions.sparsity)]:
        mean = sum(n * share for n, share in zip(sizes, shares, strict=True)) / 40
        assert mean == pytest.approx(found.sites.get(name, found.sparsity), abs=1e-12)
    assert len(set(positions.sparsity)) > 1


def test_the_rise_is_paired(sparse: Any) -> None:
    """Windows that are hard for both models do not blur their difference."""
    repeated = torch.full((3, 40), 9)
    found = evaluated(sparse, torch.cat([WINDOWS[:4], repeated]))
    one, other = found.perplexity, found.dense_perplexity
    independent = math.hypot(one.standard_error / one.value, other.standard_error / other.value) * (
        1 + found.rise
    )
    assert 0 < found.rise_standard_error < independent


def test_perplexity_rises_with_sparsity(dense: Any, calibration: catsparse.Calibration) -> None:
    """On the text that the model itself finds likely."""
    torch.manual_seed(0)
    own = dense.generate(tokens(6, 2), max_new_tokens=30, do_sample=True)
    rises = []
    for sparsity in (0.3, 0.6, 0.9):
        rises.append(evaluated(catsparse.sparsify(dense, calibration, sparsity, "cats"), own).rise)
        catsparse.densify(dense)
    assert 0 < rises[0] < rises[1] < rises[2]


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("method", ["cats", "chess", "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsity_0_is_exactly_dense(
    dense: Any,
    calibration: catsparse.Calibration,
    method: str,
    compensate: bool,
    dtype: torch.dtype,
) -> None:
    model = catsparse.sparsify(
        dense.to(dtype), calibration, 0.0, method=method, compensate=compensate
    )
    found = evaluated(model)
    assert torch.equal(found.perplexity.losses, found.dense_perplexity.losses)
    assert found.perplexity.value == found.dense_perplexity.value
    assert (found.rise, found.rise_standard_error, found.sparsity) == (0, 0, 0)
    assert found.bytes_skipped == 0
    # Not by having run dense both times.
    with torch.no_grad():
        for module in sparse_modules(model).values():
            module.catsparse_threshold.fill_(0.5)
    assert evaluated(model).rise != 0


@pytest.mark.parametrize("failing", ["sparse", "dense"])
def test_policy_comes_back_after_a_failure(
    dense: Any, calibration: catsparse.Calibration, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    model = catsparse.sparsify(dense, calibration, 0.6, prefill="dense")
    expected, known = logits(model), score(model)
    first, second = sparse_modules(model).values()
    second.catsparse_prefill = "masked"  # a policy of its own, which must come back as well

    def fail(*args: Any) -> None:
        assert [m.catsparse_prefill for m in (first, second)] == (
            ["masked"] * 2 if failing == "sparse" else ["dense", "masked"]
        )
        raise RuntimeError("out of memory")

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(model, dense=known if failing == "sparse" else None)
    handle.remove()
    assert [m.catsparse_prefill for m in (first, second)] == ["dense", "masked"]
    assert all(m.catsparse_enabled and m.catsparse_counter is None for m in (first, second))
    second.catsparse_prefill = "dense"
    assert torch.equal(logits(model), expected)


def test_evaluation_leaves_the_model_as_it_was(
    dense: Any, calibration: catsparse.Calibration
) -> None:
    model = catsparse.sparsify(dense, calibration, 0.6, prefill="dense")
    expected = [logits(model, n) for n in (5, 24)]
    evaluated(model)
    for module in sparse_modules(model).values():
        assert module.catsparse_prefill == "dense"
        assert module.catsparse_enabled
        assert module.catsparse_counter is None
    for n, wanted in zip((5, 24), expected, strict=True):
        assert torch.equal(logits(model, n), wanted)


def test_known_dense_perplexity_is_not_measured_again(sparse: Any, dense: Any) -> None:
    known = score(dense)
    calls = []
    sparse.lm_head.register_forward_hook(lambda *a: calls.append(1))
    found = evaluated(sparse, dense=known, batch_size=7)
    assert len(calls) == 1
    assert found.dense_perplexity is known
    assert found.rise == pytest.approx(evaluated(sparse).rise, rel=1e-9)


def test_a_dense_model_has_nothing_to_compare(dense: Any) -> None:
    with pytest.raises(CatsparseError, match="not sparse"):
        evaluated(dense)


def test_evaluation_under_a_peft_adapter(sparse: Any) -> None:
    """The dense number keeps the adapter: only the sparsity is switched off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(sparse, config).eval()
    found = evaluated(model)
    merged = model.merge_and_unload()
    dense = score(catsparse.densify(merged))
    assert close(found.dense_perplexity.losses, dense.losses)
    assert found.rise != 0


def test_both_shares_of_a_second_decision(llama: Any, windows: Any) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, products_at=0.4, progress=False)
    catsparse.sparsify(llama, calibration, 0.4, down_sparsity=0.6)
    found = evaluate.evaluate(llama, windows, progress=False)
    assert found.sparsity == pytest.approx(0.4, abs=0.03)
    assert found.down_sparsity == pytest.approx(0.6, abs=0.03)
    assert found.down_sites.keys() == found.sites.keys()
    # fp32 weights of H = 32, whose previews have 48 bytes a neuron.
    expected = (2 * found.sparsity + found.down_sparsity) / 3 - 48 / (3 * 32 * 4)
    assert found.bytes_skipped == pytest.approx(expected)
