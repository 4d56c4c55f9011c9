"""Fine-tuning tiny models: loss, distillation, sparsity, resuming, output, what goes wrong."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import catsparse
import tiny
from catsparse import CatsparseError, hub
from catsparse.finetune import (
    Example,
    Examples,
    FinetuneOptions,
    adapter_targets,
    finetune,
    run_baseline,
    trainer,
    windows_as_examples,
)
from catsparse.finetune.running import train
from catsparse.finetune.trainer import SparseTrainer, divergence, last_checkpoint
from catsparse.meter import achieved_sparsity
from catsparse.modules import sparse_modules
from catsparse.sites import find_sites
from catsparse.surgery import run_dense, state_owner
from test_hub import one_line

DATA = tiny.tokens(32, 24, seed=21)
TRAIN = windows_as_examples(DATA[:24], "the text")
HELDOUT = windows_as_examples(DATA[24:], "the rest")
SAME = Examples([TRAIN[0]] * 24, "one window")
# As conversations: of other lengths, and only the end counts.
UNEQUAL = Examples(
    [
        Example(ids[:n], torch.where(torch.arange(n) < n // 2, -100, ids[:n]))
        for ids, n in zip(DATA, [4, 24, 7, 20, 15, 24, 5, 9] * 3, strict=False)
    ],
    "talks",
    table=True,
)
QUICK = FinetuneOptions(
    steps=6, batch_size=2, rank=4, learning_rate=0.01, log_every=2, eval_every=3, save_every=2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("finetune") / "base")


def sparse(base: Path, method: str | None = "energy", sparsity: float = 0.5, **options: Any) -> Any:
    model = hub.load_dense_model(str(base), dtype=options.pop("dtype", "float32"))
    preview = options.pop("preview", None)
    at = sparsity if "down_sparsity" in options else None
    calibration = catsparse.calibrate(
        model, DATA, progress=False, preview=preview, products_at=at, method="energy"
    )
    return catsparse.sparsify(model, calibration, sparsity, method, **options)


def tune(model: Any, folder: Path, options: FinetuneOptions = QUICK, **more: Any) -> Any:
    examples, heldout = more.pop("examples", TRAIN), more.pop("heldout", HELDOUT)
    return finetune(model, None, examples, heldout, options, folder, progress=False, **more)


def losses(rows: list[dict[str, Any]], name: str = "loss") -> list[float]:
    return [row[name] for row in rows if name in row]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# -- the whole


@pytest.mark.parametrize("distill", [False, True], ids=["text", "distilled"])
@pytest.mark.parametrize(
    "setting",
    [
        {"method": "cats", "compensate": False},
        {"method": "product", "preview": 4},
        {"method": "energy", "down_sparsity": 0.7},
        {"method": "energy", "prefill": "dense"},
    ],
    ids=lambda setting: "-".join(map(str, setting.values())),
)
def test_the_loss_falls_and_the_folder_holds_it(
    base: Path, tmp_path: Path, setting: dict[str, Any], distill: bool
) -> None:
    model = sparse(base, **setting)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    options = replace(QUICK, steps=12, distill=distill, learning_rate=4e-3)
    result = tune(model, tmp_path, options, examples=SAME)
    train_losses = losses(result.rows)
    assert train_losses[-1] < 0.97 * train_losses[0]
    assert [r["step"] for r in result.rows if "eval_loss" in r] == [0, 3, 6, 9, 12]
    assert [r["step"] for r in result.rows if "loss" in r] == [1, 2, 4, 6, 8, 10, 12]
    for row in result.rows:
        assert row["variant"] == setting["method"]
        assert list(row["sites"]) == list(model.catsparse.config.sites)
        # Also under the dense prefill policy: every token is thresholded.
        assert 0.35 < row["sparsity"] < 0.65
        assert ("down_sparsity" in row) == ("down_sparsity" in setting)
    for name, p in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, frozen[name.replace(".base_layer", "")])
    written = [json.loads(x) for x in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert written == result.rows
    assert not (tmp_path / "checkpoints").exists()
    assert all(m.catsparse_counter is None for m in sparse_modules(model).values())

    loaded = catsparse.load(tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(result.model))
    assert loaded.catsparse.config.prefill == setting.get("prefill", "masked")
    merged = catsparse.load(tmp_path, merge_adapter=True)
    for n in (tiny.SHORT, tiny.LONG):
        assert tiny.close(tiny.logits(merged, n), tiny.logits(loaded, n))


@pytest.mark.parametrize("setting", [{}, {"method": "product", "preview": 4}], ids=["", "product"])
def test_thresholds_are_recalibrated_or_held(
    base: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    def shares(model: Any) -> dict[str, float]:
        with torch.no_grad(), achieved_sparsity(model) as meter:
            model(input_ids=DATA[:24], use_cache=False)
        return meter.sites

    options = replace(QUICK, steps=12, learning_rate=0.05)
    again = tune(sparse(base, **setting), tmp_path / "again", options)
    held = tune(sparse(base, **setting), tmp_path / "held", replace(options, thresholds="hold"))
    assert adapter(tmp_path / "again").keys() == adapter(tmp_path / "held").keys()
    for name, tensor in adapter(tmp_path / "again").items():
        assert torch.equal(tensor, adapter(tmp_path / "held")[name])  # the same training
    assert max(abs(again.drifted[n] - s) for n, s in again.asked.items()) > 0.02
    assert again.drifted == held.drifted
    for name, share in shares(again.model).items():
        assert share == pytest.approx(again.asked[name], abs=0.01)
        assert again.config.sites[name].sparsity == pytest.approx(share, abs=0.01)
    for name, share in shares(held.model).items():
        assert share == pytest.approx(held.drifted[name], abs=1e-6)
        assert held.config.sites[name].sparsity == pytest.approx(share, abs=1e-6)
    original = sparse(base, **setting)
    for name, module in sparse_modules(held.model).items():
        before = original.get_submodule(name).catsparse_threshold
        assert torch.equal(module.catsparse_threshold, before)


def test_merged_output_runs_without_an_adapter(base: Path, tmp_path: Path) -> None:
    apart = tune(sparse(base), tmp_path / "apart")
    tokenizer = _NoTokenizer()
    merged = finetune(
        *(sparse(base), tokenizer, TRAIN, HELDOUT, QUICK, tmp_path / "merged"),
        merge=True,
        dtype=torch.float32,
        progress=False,
    )
    assert tokenizer.saved == [tmp_path / "merged"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    loaded = catsparse.load(tmp_path / "merged")
    assert "decode by the c kernel" in catsparse.explain(loaded)
    for n in (1, tiny.SHORT, tiny.LONG):
        expected = tiny.logits(apart.model, n)
        assert tiny.close(tiny.logits(loaded, n), expected)
        assert tiny.close(tiny.logits(merged.model, n), expected)


class _NoTokenizer:
    def __init__(self) -> None:
        self.saved: list[Path] = []

    def save_pretrained(self, folder: Path) -> None:
        self.saved.append(folder)


def test_full_fine_tuning(base: Path, tmp_path: Path) -> None:
    model, tokenizer = sparse(base, dtype="bfloat16"), _NoTokenizer()
    options = replace(QUICK, full=True, learning_rate=1e-3, save_every=3)
    result = finetune(model, tokenizer, SAME, HELDOUT, options, tmp_path, progress=False)
    assert losses(result.rows)[-1] < losses(result.rows)[0]
    loaded = catsparse.load(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(loaded), tiny.logits(result.model))
    moved = hub.load_dense_model(str(base))
    for name, p in loaded.named_parameters():
        assert not torch.equal(p.float(), moved.get_parameter(name).to(torch.bfloat16).float())


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_packed_weights_take_an_adapter_and_nothing_else(
    base: Path, tmp_path: Path, weights: str
) -> None:
    model = hub.load_dense_model(str(base), dtype="float32")
    catsparse.quantize_weights(model, weights)
    calibration = catsparse.calibrate(model, DATA, progress=False)
    catsparse.sparsify(model, calibration, 0.5)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    for more in ({"merge": True}, {"options": replace(QUICK, full=True)}):
        with pytest.raises(CatsparseError, match=f"packed in {weights} cannot be trained"):
            tune(model, tmp_path / "no", **more)
    assert not (tmp_path / "no").exists()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())
    result = tune(model, tmp_path / "yes", replace(QUICK, steps=12), examples=SAME)
    assert losses(result.rows)[-1] < losses(result.rows)[0]
    loaded = catsparse.load(tmp_path / "yes")
    assert torch.equal(tiny.logits(loaded), tiny.logits(state_owner(result.model)))
    weight = loaded.model.layers[0].mlp.down_proj
    weight = getattr(weight, "base_layer", weight).weight
    assert torch.equal(weight, frozen["model.layers.0.mlp.down_proj.weight"])


# -- losses


def test_divergence_is_torchs() -> None:
    one, other = torch.randn(2, 7, 50)
    expected = F.kl_div(
        one.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(divergence(one, other), expected)
    one.requires_grad_()
    divergence(one, other).backward()
    torch.testing.assert_close(one.grad, one.detach().softmax(-1) - other.softmax(-1))
    impossible = torch.tensor([[0.0, -math.inf]])
    assert float(divergence(torch.zeros(1, 2), impossible)) == pytest.approx(math.log(2))


def test_the_loss_is_the_models_own(base: Path, tmp_path: Path) -> None:
    model = sparse(base)
    with torch.no_grad():
        expected = model(input_ids=DATA[24:], labels=DATA[24:]).loss
    rows = tune(model, tmp_path, replace(QUICK, steps=1)).rows
    assert losses(rows, "eval_loss")[0] == pytest.approx(float(expected), rel=1e-5)


def test_distilled_from_the_dense_model_of_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in later steps: the adapter is off, and dropout is."""
    dense, wanted = hub.load_dense_model(str(base)), []

    def spy(logits: Tensor, target: Tensor) -> Tensor:
        wanted.append(target)
        return divergence(logits, target)

    monkeypatch.setattr(trainer, "divergence", spy)
    options = replace(QUICK, distill=True, batch_size=1, dropout=0.3)
    finetune(sparse(base), None, SAME, None, options, tmp_path, progress=False)
    with torch.no_grad():
        expected = dense(input_ids=DATA[:1]).logits[0, :-1]
    assert len(wanted) == 6
    assert all(torch.equal(target, expected) for target in wanted)


def test_at_sparsity_0_there_is_nothing_to_win_back(base: Path, tmp_path: Path) -> None:
    options = replace(QUICK, distill=True, learning_rate=1e-7)  # Adam magnifies rounding
    rows = tune(sparse(base, sparsity=0.0), tmp_path, options).rows
    assert max(map(abs, losses(rows))) < 1e-5


def test_accumulated_steps_are_larger_batches(base: Path, tmp_path: Path) -> None:
    one = tune(sparse(base), tmp_path / "one", replace(QUICK, batch_size=4))
    other = tune(sparse(base), tmp_path / "other", replace(QUICK, batch_size=2, accumulation=2))
    torch.testing.assert_close(losses(one.rows), losses(other.rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distill", [False, True], ids=["text", "distilled"])
def test_every_counted_token_weighs_alike(base: Path, tmp_path: Path, distill: bool) -> None:
    """Conversations differ in length: a step's loss is over all its labels, however it is cut into
    passes, and that of held-out ones over all theirs."""
    options = replace(QUICK, batch_size=4, distill=distill)
    half = replace(options, batch_size=2, accumulation=2)
    one = tune(sparse(base), tmp_path / "one", options, examples=UNEQUAL, heldout=UNEQUAL)
    other = tune(sparse(base), tmp_path / "other", half, examples=UNEQUAL, heldout=UNEQUAL)
    for name in ("loss", "eval_loss"):
        torch.testing.assert_close(
            losses(one.rows, name), losses(other.rows, name), rtol=1e-4, atol=1e-4
        )
    model, total, count = sparse(base), 0.0, 0
    for example in UNEQUAL:
        with torch.no_grad():
            log_p = model(input_ids=example.ids[None]).logits[0, :-1].log_softmax(-1)
        wanted = example.labels[1:]
        total -= float(log_p[wanted != -100].gather(1, wanted[wanted != -100, None]).sum())
        count += int((wanted != -100).sum())
    assert losses(one.rows, "eval_loss")[0] == pytest.approx(total / count, rel=1e-4)


def test_checkpointed_activations_change_nothing(base: Path, tmp_path: Path) -> None:
    setting = {"method": "product", "preview": 4}
    plain = tune(sparse(base, **setting), tmp_path / "plain")
    less = tune(sparse(base, **setting), tmp_path / "less", replace(QUICK, checkpointing=True))
    torch.testing.assert_close(losses(plain.rows), losses(less.rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(plain.rows, "sparsity"), losses(less.rows, "sparsity"))


def test_bf16(base: Path, tmp_path: Path) -> None:
    options = replace(QUICK, bf16=True, distill=True)
    result = tune(sparse(base), tmp_path, options, examples=SAME)
    kinds = {p.dtype for n, p in result.model.named_parameters() if "lora_" in n}
    assert kinds == {torch.float32}
    assert losses(result.rows)[-1] < losses(result.rows)[0]
    # Outside of training nothing computes in bf16 any more.
    assert tiny.logits(result.model).dtype == torch.float32
    assert torch.equal(tiny.logits(catsparse.load(tmp_path)), tiny.logits(result.model))


# -- interrupted


class Killed(BaseException):
    """As KeyboardInterrupt, which would end the tests if it came through."""


@contextmanager
def killed_in_step(number: int) -> Iterator[None]:
    done = 0
    real = SparseTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal done
        done += 1
        if done == number:
            raise Killed
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", step)
        yield


@pytest.mark.parametrize("torn", [False, True], ids=["between", "while a checkpoint is written"])
@pytest.mark.parametrize("setting", [{"method": "product", "preview": 4}], ids=["product"])
def test_a_killed_run_comes_to_the_same_end(
    base: Path, tmp_path: Path, setting: dict[str, Any], torn: bool
) -> None:
    options = replace(QUICK, dropout=0.2, distill=True)
    whole = tune(sparse(base, **setting), tmp_path / "whole", options)
    folder = tmp_path / "killed"
    with killed_in_step(6), pytest.raises(Killed):
        tune(sparse(base, **setting), folder, options)
    last = last_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.name == "checkpoint-4"
    if torn:
        (last / "trainer_state.json").write_text('{"global_step": 4, "log_his')
        assert last_checkpoint(folder / "checkpoints").name == "checkpoint-2"
    steps = 0
    real = SparseTrainer.training_step

    def counting(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal steps
        steps += 1
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", counting)
        again = tune(sparse(base, **setting), folder, options)
    assert steps == (4 if torn else 2)
    torch.testing.assert_close(losses(again.rows), losses(whole.rows), rtol=1e-6, atol=1e-7)
    assert [r["step"] for r in again.rows] == [r["step"] for r in whole.rows]
    for name, tensor in adapter(folder).items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "whole")[name], rtol=1e-5, atol=1e-7)


def test_a_run_killed_after_its_last_step_is_only_finished(base: Path, tmp_path: Path) -> None:
    whole = tune(sparse(base), tmp_path / "whole", keep_checkpoints=True)
    assert last_checkpoint(tmp_path / "whole" / "checkpoints").name == "checkpoint-6"
    with killed_in_step(1):  # no step is made
        again = tune(sparse(base), tmp_path / "whole")
    assert again.rows == whole.rows
    assert again.config == whole.config


def test_a_run_killed_before_its_output_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints stay until then: no step is made again."""
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save", _kill)
        with pytest.raises(Killed):
            tune(sparse(base), tmp_path / "killed")
    with killed_in_step(1):
        again = tune(sparse(base), tmp_path / "killed")
    assert again.rows == tune(sparse(base), tmp_path / "whole").rows
    assert not (tmp_path / "killed" / "checkpoints").exists()


def _kill(*args: Any, **kwargs: Any) -> None:
    raise Killed


def test_rows_are_the_same_wherever_a_checkpoint_lies(base: Path, tmp_path: Path) -> None:
    """Between two rows of the log, too, and in a later pass over the data."""
    options = replace(QUICK, steps=11, log_every=4, save_every=3, eval_every=0)
    examples = Examples(TRAIN.examples[:10], "five steps")
    whole = tune(sparse(base), tmp_path / "whole", options, examples=examples)
    with killed_in_step(8), pytest.raises(Killed):
        tune(sparse(base), tmp_path / "killed", options, examples=examples)
    again = tune(sparse(base), tmp_path / "killed", options, examples=examples)
    assert [r["step"] for r in again.rows] == [r["step"] for r in whole.rows]
    for name in ("loss", "sparsity"):
        torch.testing.assert_close(
            losses(again.rows, name), losses(whole.rows, name), rtol=1e-5, atol=1e-6
        )


ANOTHER = ["options", "data", "a prompt", "held-out data", "model", "sparsity", "compensation"]


@pytest.mark.parametrize("what", ANOTHER)
def test_checkpoints_of_another_run_are_refused(base: Path, tmp_path: Path, what: str) -> None:
    tune(sparse(base), tmp_path, examples=UNEQUAL, keep_checkpoints=True)
    model, options, examples, heldout = sparse(base), QUICK, UNEQUAL, HELDOUT
    if what == "options":
        options = replace(QUICK, learning_rate=0.03)
    elif what == "data":
        examples = TRAIN
    elif what == "a prompt":  # of which no token counts
        first = UNEQUAL[0]
        changed = Example(torch.cat([first.ids[:1] + 1, first.ids[1:]]), first.labels)
        examples = Examples([changed, *UNEQUAL.examples[1:]], "talks", table=True)
    elif what == "held-out data":
        heldout = TRAIN
    elif what == "model":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    elif what == "sparsity":
        model = sparse(base, sparsity=0.4)
    else:
        model = sparse(base, compensate=False)
    with pytest.raises(CatsparseError, match="another output folder") as caught:
        finetune(model, None, examples, heldout, options, tmp_path, progress=False)
    one_line(caught.value)


def test_early_stop_takes_the_best(base: Path, tmp_path: Path) -> None:
    """Random text cannot be learnt for other text: held-out loss soon rises."""
    options = replace(QUICK, steps=60, learning_rate=0.05, early_stop=2, schedule="constant")
    result = tune(sparse(base), tmp_path, options)
    measured = {r["step"]: r["eval_loss"] for r in result.rows if "eval_loss" in r}
    best = min((loss, step) for step, loss in measured.items() if step)[1]
    assert max(measured) == best + 2 * 3
    assert max(measured) < 60
    with torch.no_grad():
        loaded = catsparse.load(tmp_path)
        original = sparse(base)
        for name, module in sparse_modules(loaded).items():  # thresholds of training
            module.catsparse_threshold = original.get_submodule(name).catsparse_threshold
        loss = float(loaded(input_ids=DATA[24:], labels=DATA[24:]).loss)
    assert loss == pytest.approx(measured[best], rel=1e-5)


STOPPING = replace(QUICK, steps=60, learning_rate=0.05, early_stop=3, schedule="constant")


def test_a_killed_run_stops_as_early(base: Path, tmp_path: Path) -> None:
    """How often nothing was won is remembered."""
    whole = tune(sparse(base), tmp_path / "whole", STOPPING)
    last = whole.rows[-1]["step"]
    with killed_in_step(last - 1), pytest.raises(Killed):  # after two evaluations in vain
        tune(sparse(base), tmp_path / "killed", STOPPING)
    again = tune(sparse(base), tmp_path / "killed", STOPPING)
    assert [r["step"] for r in again.rows] == [r["step"] for r in whole.rows]
    for name, tensor in adapter(tmp_path / "killed").items():
        torch.testing.assert_close(tensor, adapter(tmp_path / "whole")[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("steps", [60, 15], ids=["stopped", "at its last step"])
def test_killed_at_its_end_it_still_takes_the_best(base: Path, tmp_path: Path, steps: int) -> None:
    options = replace(STOPPING, steps=steps)
    whole = tune(sparse(base), tmp_path / "whole", options, keep_checkpoints=True)
    weights = adapter(tmp_path / "whole")
    measured = losses(whole.rows, "eval_loss")
    assert min(measured[1:]) < measured[-1]
    with killed_in_step(1):  # no step is made
        again = tune(sparse(base), tmp_path / "whole", options)
    assert again.rows == whole.rows
    for name, tensor in adapter(tmp_path / "whole").items():
        assert torch.equal(tensor, weights[name])


# -- what goes wrong


def test_weights_that_are_not_finite_at_the_end(base: Path, tmp_path: Path) -> None:
    """The last step breaks them: no loss tells, and no checkpoint is made that would."""
    real = SparseTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = real(self, *args, **kwargs)
        if self.state.global_step == QUICK.steps - 1:
            next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = math.inf
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", step)
        options = replace(QUICK, save_every=0)
        with pytest.raises(CatsparseError, match="a trained weight is not finite") as caught:
            tune(sparse(base), tmp_path, options, heldout=None)
    one_line(caught.value)
    assert not (tmp_path / "catsparse.json").exists()


def test_a_held_out_loss_that_is_not_finite(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.cross_entropy

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return real(logits, labels) * (1 if torch.is_grad_enabled() else math.nan)

    monkeypatch.setattr(trainer, "cross_entropy", loss)
    with pytest.raises(CatsparseError, match="held-out text is not finite") as caught:
        tune(sparse(base), tmp_path)
    one_line(caught.value)


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_loss_that_is_not_finite(base: Path, tmp_path: Path, where: str) -> None:
    """One sentence; the checkpoint before is whole and finite."""
    done = 0
    real = SparseTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal done
        done += 1
        loss = real(self, *args, **kwargs)
        if done == 4:
            if where == "loss":
                return loss * math.nan
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            parameter.data[0, 0] = math.inf
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseTrainer, "training_step", step)
        # SparseTrainer's own check is in training_step: keep it.
        patch.setattr(SparseTrainer, "training_step", _checked(step))
        with pytest.raises(CatsparseError, match="lower the learning rate") as caught:
            tune(sparse(base), tmp_path, keep_checkpoints=True)
    message = one_line(caught.value)
    last = last_checkpoint(tmp_path / "checkpoints")
    assert last.name == "checkpoint-2"
    if where == "loss":
        assert str(last) in message
    state = load_file(last / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def _checked(step: Any) -> Any:
    def checked(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = step(self, *args, **kwargs)
        broken = ~torch.isfinite(loss)
        self._broken = broken if self._broken is None else self._broken | broken
        return loss

    return checked


def test_a_learning_rate_that_is_much_too_high(base: Path, tmp_path: Path) -> None:
    options = replace(QUICK, learning_rate=1e30, weight_decay=0.0, warmup=0.0, save_every=0)
    with pytest.raises(CatsparseError, match="no checkpoint was made") as caught:
        tune(sparse(base), tmp_path, options)
    one_line(caught.value)


BAD_OPTIONS = [
    ({"steps": 0}, "steps"),
    ({"batch_size": 0}, "batch_size"),
    ({"rank": 0}, "rank"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": math.nan}, "learning_rate"),
    ({"alpha": -1.0}, "alpha"),
    ({"dropout": 1.0}, "dropout"),
    ({"warmup": 1.0}, "warmup"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"schedule": "wavy"}, "schedule"),
    ({"thresholds": "guess"}, "thresholds"),
    ({"distill": True, "full": True}, "full fine-tuning"),
    ({"early_stop": 0}, "early_stop"),
    ({"early_stop": 2, "eval_every": 0}, "eval_every"),
]


@pytest.mark.parametrize(("change", "match"), BAD_OPTIONS, ids=[str(b[0]) for b in BAD_OPTIONS])
def test_bad_options(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CatsparseError, match=match) as caught:
        FinetuneOptions(**change)
    one_line(caught.value)


def test_refusals(base: Path, tmp_path: Path) -> None:
    def refused(match: str, model: Any, **more: Any) -> None:
        with pytest.raises(CatsparseError, match=match) as caught:
            tune(model, tmp_path, **more)
        one_line(caught.value)
        assert not list(tmp_path.iterdir())

    refused("not sparse", hub.load_dense_model(str(base)))
    refused(
        "needs text to measure on", sparse(base), options=replace(QUICK, early_stop=1), heldout=None
    )
    refused("no linear layer", sparse(base), options=replace(QUICK, targets="mlp,atention"))
    long = windows_as_examples(tiny.tokens(2, 129), "a book")
    refused(r"129 tokens, more than .* context of 128", sparse(base), examples=long)
    refused(r"129 tokens, more than .* context of 128", sparse(base), heldout=long)
    row = Examples(long.examples, "talks", table=True)
    refused("context of 128; shorten or leave out the row", sparse(base), examples=row)
    refused("nothing holds no sequence", sparse(base), examples=Examples([], "nothing"))


def test_a_folder_with_a_whole_model_is_refused_before_training(base: Path, tmp_path: Path) -> None:
    catsparse.save(sparse(base), tmp_path, merge=True)
    with killed_in_step(1), pytest.raises(CatsparseError, match="holds a whole model"):
        tune(sparse(base), tmp_path)


def test_an_adapter_on_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = tune(sparse(base), tmp_path / "one").model
    with pytest.raises(CatsparseError, match="merge_adapter=True"):
        tune(model, tmp_path / "two")


# -- targets


def test_targets(base: Path) -> None:
    model = hub.load_dense_model(str(base))
    sites, _ = find_sites(model)

    def chosen(wanted: str) -> set[str]:
        return {n.removeprefix("model.layers.") for n in adapter_targets(model, sites, wanted)}

    def named(*names: str) -> set[str]:
        return {f"{layer}.{name}" for layer in (0, 1) for name in names}

    mlp = named("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    attention = named("self_attn.q_proj", "self_attn.v_proj")
    assert chosen("mlp") == mlp
    assert chosen("attention") == attention
    assert chosen("attention,mlp") == mlp | attention
    rest = named("self_attn.k_proj", "self_attn.o_proj")
    assert chosen("all") == mlp | attention | rest  # the output head is in no layer
    assert chosen("o_proj,mlp.up_proj") == named("self_attn.o_proj", "mlp.up_proj")
    assert chosen("model.layers.1.mlp.up_proj") == {"1.mlp.up_proj"}


def test_a_tied_head_is_no_target() -> None:
    model = tiny.build(tiny.llama_config(tie_word_embeddings=True))
    sites, _ = find_sites(model)
    with pytest.raises(
        CatsparseError, match=r"lm_head shares its weight .* leave it out"
    ) as caught:
        adapter_targets(model, sites, "mlp,lm_head")
    one_line(caught.value)


def test_targets_of_a_fused_mlp() -> None:
    from transformers import Phi3Config

    model = tiny.build(Phi3Config(**tiny.SMALL))
    sites, _ = find_sites(model)
    names = {n.rpartition(".")[2] for n in adapter_targets(model, sites, "attention,mlp")}
    assert names == {"qkv_proj", "gate_up_proj", "down_proj"}
    assert trains_fused(model)


def trains_fused(model: Any) -> bool:
    calibration = catsparse.calibrate(model, DATA, progress=False, preview=4)
    catsparse.sparsify(model, calibration, 0.5)
    ids = DATA[:2]
    import peft

    config = peft.LoraConfig(target_modules=["gate_up_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert "4-bit product preview; decode" in catsparse.explain(wrapped)
    return all(p.grad.any() for n, p in wrapped.named_parameters() if "lora_" in n)


# -- baselines


@pytest.mark.parametrize("distill", [False, True], ids=["text", "distilled"])
@pytest.mark.parametrize("kind", ["dense", "relu"])
def test_baselines(base: Path, tmp_path: Path, kind: str, distill: bool) -> None:
    model = hub.load_dense_model(str(base))
    before, state = tiny.logits(model), copy.deepcopy(model.state_dict())
    options = replace(QUICK, distill=distill)
    rate = 1e-7 if distill and kind == "dense" else 0.01  # Adam magnifies rounding
    options = replace(options, learning_rate=rate)
    rows = run_baseline(model, kind, SAME, HELDOUT, options, tmp_path, progress=False)
    assert torch.equal(tiny.logits(model), before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert {row["variant"] for row in rows} == {kind}
    assert not (tmp_path / "checkpoints").exists()
    assert all("sparsity" not in row for row in rows)
    if kind == "relu":
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.ReLU()
    with torch.no_grad():
        first = float(model(input_ids=DATA[24:], labels=DATA[24:]).loss)
    assert losses(rows, "eval_loss")[0] == pytest.approx(first, rel=1e-5)
    if distill and kind == "dense":
        assert max(map(abs, losses(rows))) < 1e-5  # its own teacher
    else:
        assert losses(rows)[-1] < losses(rows)[0]


def test_baseline_refusals(base: Path, tmp_path: Path) -> None:
    dense = hub.load_dense_model(str(base))

    def refused(match: str, model: Any, kind: str = "dense", options: Any = QUICK) -> None:
        with pytest.raises(CatsparseError, match=match) as caught:
            run_baseline(model, kind, TRAIN, HELDOUT, options, tmp_path, progress=False)
        one_line(caught.value)

    refused("densify", sparse(base))
    refused("one of dense, relu", dense, "gelu")
    refused("full", dense, options=replace(QUICK, full=True, distill=False))


def test_a_stopped_baseline_leaves_the_activations(base: Path, tmp_path: Path) -> None:
    model = hub.load_dense_model(str(base))
    kept = model.model.layers[0].mlp.act_fn
    with killed_in_step(2), pytest.raises(Killed):
        run_baseline(model, "relu", TRAIN, HELDOUT, QUICK, tmp_path, progress=False)
    assert model.model.layers[0].mlp.act_fn is kept


def test_plain_train_of_a_sparse_model_counts_only_training(base: Path, tmp_path: Path) -> None:
    """What evaluation drops is not in the rows of training."""
    model = sparse(base)
    names = adapter_targets(model, find_sites(hub.load_dense_model(str(base)))[0], "mlp")
    odd = replace(QUICK, steps=3, log_every=3, eval_every=2)
    _, rows = train(model, names, SAME, HELDOUT, odd, tmp_path, "x", progress=False)
    first = sparse(base)
    with torch.no_grad(), achieved_sparsity(first) as meter:
        first(input_ids=DATA[:1], use_cache=False)
    assert rows[1]["step"] == 1
    assert rows[1]["sparsity"] == pytest.approx(meter.sparsity, abs=1e-6)
    with torch.no_grad(), run_dense(first):
        assert first(input_ids=DATA[:1]).logits.isfinite().all()
