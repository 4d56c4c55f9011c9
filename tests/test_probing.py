"""Sensitivities against a direct computation; interrupted runs; what is refused."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import catsparse
import tiny
from catsparse import Calibration, CatsparseError, Sensitivities, hub, probing
from catsparse.data import load_windows
from catsparse.modules import sparse_modules
from catsparse.probing import divergence, measure_sensitivities, split_windows

GRID = (0.4, 0.8)
CELLS = 2 * 2 * 3  # MLPs, sparsities, windows


@pytest.fixture
def held_out() -> Tensor:
    return tiny.tokens(3, 32, seed=11)


def quiet(model: Any, calibration: Calibration, windows: Tensor, **options: Any) -> Sensitivities:
    given = {"sparsities": GRID, "progress": False} | options
    return measure_sensitivities(model, calibration, windows, **given)


def assert_same(one: Sensitivities, other: Sensitivities) -> None:
    assert list(one.losses) == list(other.losses)
    assert all(torch.equal(loss, other.losses[name]) for name, loss in one.losses.items())
    assert replace(one, losses={}) == replace(other, losses={})


def is_dense(model: Any) -> bool:
    return not sparse_modules(model) and "catsparse" not in model.__dict__


def kl_by_hand(dense: Tensor, sparse: Tensor) -> float:
    """sum over words of p (log p - log q), mean over tokens, in fp64."""
    log_p, log_q = (F.log_softmax(x.double(), -1).flatten(0, -2) for x in (dense, sparse))
    return sum(float((p.exp() * (p - q)).sum()) for p, q in zip(log_p, log_q, strict=True)) / len(
        log_p
    )


@torch.no_grad()
def directly(model: Any, calibration: Calibration, ids: Tensor, name: str, s: float, **how: Any):
    """The model with the MLP of this name replaced by the masked maths, written out by hand."""
    sparse = catsparse.sparsify(copy.deepcopy(model), calibration, s, **how)
    state = sparse.catsparse
    state.thresholds.update({n: t for n, t in state.thresholds.items() if n == name})
    for other in set(state.thresholds) - {name}:
        del state.thresholds[other]
    by_hand = tiny.masked_by_hand(sparse, model, how.get("compensate", True))
    rows = [(model(input_ids=row[None]).logits, by_hand(input_ids=row[None]).logits) for row in ids]
    return sum(kl_by_hand(*pair) for pair in rows) / len(rows)


@pytest.mark.parametrize("how", [{}, {"method": "cats", "compensate": False}, {"method": "chess"}])
def test_losses_are_those_of_one_sparse_mlp_at_a_time(
    llama: Any, calibration: Calibration, held_out: Tensor, how: dict[str, Any]
) -> None:
    table = quiet(llama, calibration, held_out, **how)
    assert list(table.losses) == list(calibration.sites)
    assert (table.tokens, table.sparsities, table.preview) == (held_out.numel(), GRID, None)
    assert table.method == how.get("method", "energy")
    assert table.compensate == how.get("compensate", True)
    for name, losses in table.losses.items():
        expected = [directly(llama, calibration, held_out, name, s, **how) for s in GRID]
        assert losses.tolist() == pytest.approx(expected, rel=1e-3)
        assert 0 < losses[0] < losses[1]


def test_bundled_model_directly() -> None:
    """First and last layer at 70%, against a copy of the model with that layer done by hand."""
    model = hub.load_dense_model("default", dtype="float32")
    tokenizer = hub.load_tokenizer("default")
    text = hub.bundled_text("calibration")
    windows = load_windows(text, tokenizer, tokens=1024 + 256, seq_len=128)
    windows, held_out = split_windows(windows, 2)
    calibration = catsparse.calibrate(model, windows, progress=False)
    table = quiet(model, calibration, held_out, sparsities=(0.7,))
    names = list(calibration.sites)
    assert len(names) == 7
    for name in (names[0], names[-1]):
        expected = directly(model, calibration, held_out, name, 0.7)
        assert float(table.losses[name]) == pytest.approx(expected, rel=1e-3)


def test_preview_decides_in_the_measurement_too(
    llama: Any, windows: Tensor, held_out: Tensor
) -> None:
    calibration = catsparse.calibrate(llama, windows, preview=4, progress=False)
    table = quiet(llama, calibration, held_out)
    assert table.preview == 4
    name = list(calibration.sites)[1]
    with torch.no_grad():
        dense = llama(input_ids=held_out).logits
        sparse = catsparse.sparsify(copy.deepcopy(llama), calibration, 0.8)
        for other, module in sparse_modules(sparse).items():
            module.catsparse_enabled = other == name
        expected = kl_by_hand(dense, sparse(input_ids=held_out).logits)
    assert float(table.losses[name][1]) == pytest.approx(expected, rel=1e-3)


def test_batches_and_repetition_change_nothing(
    llama: Any, calibration: Calibration, held_out: Tensor
) -> None:
    table = quiet(llama, calibration, held_out)
    assert_same(quiet(llama, calibration, held_out), table)
    # Two windows, then one: windows weigh by their tokens.
    batched = quiet(llama, calibration, held_out, batch_size=2)
    for name, losses in table.losses.items():
        assert batched.losses[name].tolist() == pytest.approx(losses.tolist(), rel=1e-4)


def test_few_tokens_are_thresholded_as_well(llama: Any, calibration: Calibration) -> None:
    """Calls that are small enough for the decode op."""
    short = tiny.tokens(2, tiny.SHORT, seed=5)
    table = quiet(llama, calibration, short)
    name = next(iter(table.losses))
    expected = directly(llama, calibration, short, name, 0.8)
    assert float(table.losses[name][1]) == pytest.approx(expected, rel=1e-3)


# The model


def test_model_is_the_same_afterwards(
    llama: Any, calibration: Calibration, held_out: Tensor
) -> None:
    before = tiny.logits(llama)
    llama.model.layers[0].train()
    quiet(llama, calibration, held_out)
    assert llama.model.layers[0].training
    assert is_dense(llama)
    llama.eval()
    assert torch.equal(tiny.logits(llama), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_dense_after_an_error(
    llama: Any, calibration: Calibration, held_out: Tensor, error: type[BaseException]
) -> None:
    stop_after(llama, 3, error)
    with pytest.raises(error):
        quiet(llama, calibration, held_out)
    assert is_dense(llama)


def test_cost_is_what_is_promised(llama: Any, calibration: Calibration, held_out: Tensor) -> None:
    calls = counted(llama)
    quiet(llama, calibration, held_out)
    assert len(calls) == CELLS + 3
    # For 32 layers, within 30 evaluations of 20,000 tokens.
    assert probing.TOKENS * (1 + 32 * len(probing.GRID)) <= 30 * 20_000


def test_progress_goes_to_stderr(
    llama: Any,
    calibration: Calibration,
    held_out: Tensor,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    quiet(llama, calibration, held_out, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "measuring sensitivities" in captured.err
    quiet(llama, calibration, held_out)
    assert capsys.readouterr().err == ""


# Checkpoints


def counted(model: Any) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def stop_after(model: Any, passes: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    calls = counted(model)

    def stop(*_: Any) -> None:
        if len(calls) > passes:
            raise error

    return model.register_forward_pre_hook(stop)


@pytest.fixture
def every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each loss."""
    monkeypatch.setattr(probing, "_SAVE_SECONDS", -1.0)


@pytest.mark.usefixtures("every_cell")
@pytest.mark.parametrize("passes", [0, 1, 2, 5, 7, CELLS + 2])
def test_interrupted_run_goes_on(
    llama: Any, calibration: Calibration, held_out: Tensor, passes: int, tmp_path: Path
) -> None:
    expected = quiet(llama, calibration, held_out)
    path = tmp_path / "partial"
    hook = stop_after(llama, passes)
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, calibration, held_out, checkpoint=path)
    hook.remove()
    assert os.listdir(tmp_path) == (["partial"] if passes > 1 else [])
    done = int(load_file(path)["losses"].isfinite().sum()) if passes > 1 else 0
    calls = counted(llama)
    assert_same(quiet(llama, calibration, held_out, checkpoint=path), expected)
    assert len(calls) == CELLS - done + -(-(CELLS - done) // 4)  # and each window's dense pass
    assert os.listdir(tmp_path) == []


def test_short_runs_write_no_checkpoint(
    llama: Any, calibration: Calibration, held_out: Tensor, tmp_path: Path
) -> None:
    hook = stop_after(llama, 8)
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, calibration, held_out, checkpoint=tmp_path / "partial")
    hook.remove()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def partial(
    llama: Any, calibration: Calibration, held_out: Tensor, every_cell: None, tmp_path: Path
) -> Path:
    path = tmp_path / "partial"
    hook = stop_after(llama, 8)
    with pytest.raises(KeyboardInterrupt):
        quiet(llama, calibration, held_out, checkpoint=path)
    hook.remove()
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"sparsities": (0.4, 0.7)},
        {"sparsities": (0.4,)},
        {"method": "chess"},
        {"compensate": False},
        {"batch_size": 3},
        {"windows": tiny.tokens(3, 32, seed=12)},
        {"windows": tiny.tokens(4, 24, seed=11)},
    ],
    ids=str,
)
def test_checkpoint_of_another_run(
    llama: Any, calibration: Calibration, held_out: Tensor, partial: Path, change: Any
) -> None:
    change = {"windows": held_out} | change
    with pytest.raises(CatsparseError, match="another run's sensitivities; delete it") as caught:
        quiet(llama, calibration, change.pop("windows"), checkpoint=partial, **change)
    assert "\n" not in str(caught.value)
    assert partial.exists()
    assert is_dense(llama)


def test_checkpoint_of_another_calibration(llama: Any, held_out: Tensor, partial: Path) -> None:
    other = tiny.calibrate(llama, seed=8)
    with pytest.raises(CatsparseError, match="another run's"):
        quiet(llama, other, held_out, checkpoint=partial)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\xff" * 64])
def test_damaged_checkpoint(
    llama: Any, calibration: Calibration, held_out: Tensor, partial: Path, content: bytes
) -> None:
    partial.write_bytes(content)
    with pytest.raises(CatsparseError, match=r"is damaged .*delete it to start again"):
        quiet(llama, calibration, held_out, checkpoint=partial)


@pytest.mark.parametrize("value", [-1.0, torch.inf])
def test_checkpoint_with_impossible_losses(
    llama: Any, calibration: Calibration, held_out: Tensor, partial: Path, value: float
) -> None:
    from safetensors import safe_open

    with safe_open(partial, framework="pt") as file:
        metadata, losses = file.metadata(), file.get_tensor("losses")
    losses[0, 0, 0] = value
    save_file({"losses": losses}, partial, metadata)
    with pytest.raises(CatsparseError, match="another run's"):
        quiet(llama, calibration, held_out, checkpoint=partial)


# What is refused


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(0, 4, dtype=torch.long),
        torch.zeros(4, dtype=torch.long),
        torch.ones(2, 4),
    ],
    ids=["none", "flat", "float"],
)
def test_windows_that_are_none(llama: Any, calibration: Calibration, ids: Tensor) -> None:
    with pytest.raises(CatsparseError, match="windows must be token ids"):
        quiet(llama, calibration, ids)


def test_bad_options(llama: Any, calibration: Calibration, held_out: Tensor) -> None:
    with pytest.raises(CatsparseError, match="must rise"):
        quiet(llama, calibration, held_out, sparsities=(0.5, 0.4))
    with pytest.raises(CatsparseError, match="method must be"):
        quiet(llama, calibration, held_out, method="magic")
    with pytest.raises(CatsparseError, match="calibrate again with inputs='mlp'"):
        quiet(llama, calibration, held_out, method="teal")
    assert is_dense(llama)


def test_another_model(calibration: Calibration, held_out: Tensor) -> None:
    wider = tiny.build(tiny.llama_config(intermediate_size=64))
    with pytest.raises(CatsparseError, match="use the model that was calibrated"):
        quiet(wider, calibration, held_out)
    assert is_dense(wider)


def test_sparse_model_stays_as_it_is(
    sparse_llama: Any, calibration: Calibration, held_out: Tensor
) -> None:
    with pytest.raises(CatsparseError, match="already sparse"):
        quiet(sparse_llama, calibration, held_out)
    assert len(sparse_modules(sparse_llama)) == 2


def test_predictions_that_are_not_finite(
    llama: Any, calibration: Calibration, held_out: Tensor
) -> None:
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(CatsparseError, match="not finite; load the model in bf16 or fp32"):
        quiet(llama, calibration, held_out)
    assert is_dense(llama)


# Parts


def test_divergence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = torch.randn(3, 5, 11), torch.randn(3, 5, 11)
    expected = kl_by_hand(dense, sparse)
    assert divergence(dense, sparse) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(probing, "_LOGITS", 44)  # four tokens a piece, the last one short
    assert divergence(dense, sparse) == pytest.approx(expected, rel=1e-5)
    assert divergence(dense, dense) == 0
    assert divergence(dense.bfloat16(), dense.bfloat16()) == 0


def test_split_windows() -> None:
    windows = torch.arange(20).view(10, 2)
    for asked, held in ((0, 0), (3, 3), (5, 5), (9, 5)):
        one, other = split_windows(windows, asked)
        assert torch.equal(torch.cat([one, other]), windows)
        assert len(other) == held
    with pytest.raises(CatsparseError, match="one window"):
        split_windows(windows[:1], 3)
