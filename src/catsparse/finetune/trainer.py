"""transformers' Trainer for sparse models: loss, distillation, logged sparsity, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress, TaskID
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from ..adapters import ADAPTER_WEIGHTS
from ..errors import CatsparseError
from ..strict_json import parse_json
from .counting import SparsityLog
from .examples import IGNORED

# Positions of which the loss is taken at once: their logits in fp32 are large.
_CHUNK = 4096
TRAINER_STATE_NAME = "trainer_state.json"
Teacher = Callable[[], AbstractContextManager[None]]


class SparseTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose rows tell sparsity by site and whose checkpoints hold only finite weights.

    Args:
        sparsity: counts of the model's sparse modules, or None of a dense model.
        teacher: makes the model compute, inside a ``with`` block, what it is to be distilled from;
            None to train towards the labels.
    """

    is_fsdp_enabled: bool

    def __init__(
        self, *args: Any, sparsity: SparsityLog | None, teacher: Teacher | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer then counts the labels of a whole step: all its passes, on all devices.
        self.model_accepts_loss_kwargs = True
        self._sparsity, self._teacher = sparsity, teacher
        self._broken: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean over the labels of the step, in evaluation over those of the whole text: a long
        answer counts for as much as it has tokens, whatever it shares a batch with."""
        labels = inputs["labels"][:, 1:]
        counted = labels != IGNORED
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self._sparsity is not None:
            mask = inputs.get("attention_mask")
            self._sparsity.rows = None if mask is None else mask.bool()
        # Where there is nothing to distil from, evaluation included, towards the text itself.
        wanted = None
        if self._teacher is not None and model.training:
            with torch.no_grad(), _evaluating(self.model), self._teacher():
                wanted = model(**given, use_cache=False).logits[:, :-1][counted]
        logits = model(**given, use_cache=False).logits[:, :-1][counted]
        losses = [
            cross_entropy(part, target) if wanted is None else divergence(part, target)
            for part, target in zip(
                logits.split(_CHUNK),
                (labels[counted] if wanted is None else wanted).split(_CHUNK),
                strict=True,
            )
        ]
        loss = torch.stack(losses).sum()
        if model.training:  # devices' gradients are averaged
            loss = loss * self.accelerator.num_processes / num_items_in_batch
        else:  # the Trainer takes a mean over sequences
            loss = loss / (len(labels) * self._labels_of_a_sequence)
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        broken = ~torch.isfinite(loss.detach())
        self._broken = broken if self._broken is None else self._broken | broken
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._sparsity is None:
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]
        with self._sparsity.apart():
            return super().evaluate(*args, **kwargs)  # type: ignore[no-any-return]

    @cached_property
    def _labels_of_a_sequence(self) -> float:
        """Of what is evaluated on, the mean."""
        counts = [int((e.labels[1:] != IGNORED).sum()) for e in self.eval_dataset]
        return sum(counts) / len(counts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.refuse_broken()
            logs |= self._achieved()
        if "eval_loss" in logs:
            if not math.isfinite(logs["eval_loss"]):
                raise self._stopped("the loss on held-out text")
            logs = {"eval_loss": logs["eval_loss"]} | (
                self._achieved() if self._sparsity is not None else {}
            )
        super().log(logs, start_time)

    def _achieved(self) -> dict[str, Any]:
        """``sparsity`` over all sites and ``sites``: fractions of neurons dropped; with a second
        decision ``down_sparsity`` and ``down_sites`` too."""
        taken = None if self._sparsity is None else self._sparsity.take()
        if taken is None or self._sparsity is None:
            return {}
        kept, kept_down, seen = self.accelerator.reduce(taken, "sum").cpu().unbind(1)
        found: dict[str, Any] = {
            "sparsity": float(1 - kept.sum() / seen.sum()),
            "sites": dict(zip(self._sparsity.modules, (1 - kept / seen).tolist(), strict=True)),
        }
        if not torch.equal(kept, kept_down):
            down = zip(self._sparsity.modules, (1 - kept_down / seen).tolist(), strict=True)
            found |= {"down_sparsity": float(1 - kept_down.sum() / seen.sum())}
            found |= {"down_sites": dict(down)}
        return found

    def refuse_broken(self) -> None:
        """Stop where a loss since the last call was not finite.

        Raises:
            CatsparseError: naming the last checkpoint, which is good.
        """
        broken, self._broken = self._broken, None
        if broken is not None and bool(self.accelerator.reduce(broken.float(), "sum") > 0):
            raise self._stopped("the loss")

    def refuse_broken_weights(self) -> None:
        """Stop where a trained weight is not finite, as the last step's may be: no loss tells.

        Raises:
            CatsparseError: naming the last checkpoint.
        """
        broken = torch.zeros((), device=self.args.device)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                broken += ~torch.isfinite(held.detach()).all()
        # Of a sharded model other processes hold other parts: all stop, or none.
        if bool(self.accelerator.reduce(broken, "sum") > 0):
            raise self._stopped("a trained weight")

    def _stopped(self, what: str) -> CatsparseError:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the weights before are in {last}" if last else "no checkpoint was made before"
        return CatsparseError(
            f"{what} is not finite at step {self.state.global_step} or shortly before; lower the "
            f"learning rate (it is {self.args.learning_rate:g}) or train in fp32: {kept}"
        )

    def take(self, checkpoint: Path) -> None:
        """The history of a finished run, and its weights: the best, where it asked for these."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            checkpoint = checkpoint.parent / Path(best).name
        if not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(checkpoint))
        elif (weights := checkpoint / ADAPTER_WEIGHTS).exists():  # nothing is sharded yet
            import peft

            peft.set_peft_model_state_dict(self.model, load_file(weights))
            self.is_fsdp_enabled = False  # nor need it be, to be measured
        else:
            raise CatsparseError(
                f"the run is over, but FSDP left its weights in {checkpoint} in shards; train an "
                "adapter with fsdp_state_dict_type FULL_STATE_DICT, in another output folder"
            )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.refuse_broken()
        self.refuse_broken_weights()
        super()._save_checkpoint(*args, **kwargs)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over N positions of -log p(label), in fp32; logits ``[N, V]``, labels ``[N]``."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum over N positions of KL(p || q), p of the logits ``wanted``, q of ``logits``, ``[N, V]``.

    In fp32; as cross-entropy to p less p's entropy, which has no gradient.
    """
    p = wanted.float().softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum()
    total: Tensor = F.cross_entropy(logits.float(), p, reduction="sum") - entropy
    return total


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; flags only, as ``eval()`` would make sparse modules prepare."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``: its state, written last, can be read."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            parse_json((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError, CatsparseError):
            continue
        return path
    return None


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


class LogWithCheckpoints(TrainerCallback):  # type: ignore[misc]
    """A row of the log wherever a checkpoint is made: none is then of steps on both sides of it, so
    that a run which goes on from there logs the same losses."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Moves a progress bar on, with the last loss and sparsity."""

    def __init__(self, bar: Progress, label: str) -> None:
        self.bar, self.label, self.seen = bar, label, ""
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.task = self.bar.add_task(self.label, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(
                self.task, completed=state.global_step, description=self.label + self.seen
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and math.isfinite(logs["loss"]):
            dropped = f", {logs['sparsity']:.1%} dropped" if "sparsity" in logs else ""
            self.seen = f": loss {logs['loss']:.4f}{dropped}"
