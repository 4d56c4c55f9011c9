"""What a fine-tuning run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import check_choice
from ..errors import CatsparseError

SCHEDULES = ("cosine", "linear", "constant")
THRESHOLDS = ("recalibrate", "hold")
BASELINES = ("dense", "relu")
_COUNTS = ("steps", "batch_size", "accumulation", "rank", "log_every", "calibration_tokens")


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings of a run; equal settings, data and model give the same result on one machine.

    Attributes:
        steps: optimizer steps.
        batch_size: windows or conversations of one forward pass, on each device.
        accumulation: forward passes of one step.
        learning_rate: the highest, after the warm-up.
        warmup: share of the steps in which the rate rises.
        schedule: how it falls after that: ``cosine``, ``linear``, or ``constant``: not.
        weight_decay: of AdamW.
        rank, alpha, dropout: of LoRA; an adapter adds ``alpha / rank * B A``.
        targets: what LoRA adapts: of ``attention`` (query and value projections), ``mlp`` (gate,
            up and down of the found sites), ``all`` (every linear of the layers) and names of
            modules, with commas between them.
        full: train all weights instead of an adapter.
        distill: train towards the dense model's next-token distribution instead of the text's next
            token.
        thresholds: at the end, ``recalibrate`` them to the sparsity asked for, or ``hold`` them.
        log_every, eval_every, save_every: steps between rows of the log, losses on held-out text
            and checkpoints; 0 evaluates only before and after, or saves none. A checkpoint makes a
            row, too.
        calibration_tokens: tokens of the training text that thresholds are measured on at the end.
        early_stop: end after so many evaluations without a lower loss, with the best weights; each
            evaluation then makes a checkpoint, whatever ``save_every`` says.
        bf16: compute in bf16, the trained weights in fp32.
        checkpointing: compute activations a second time instead of keeping them.
        seed: of the adapter's first weights, dropout and the order of the data.

    Raises:
        CatsparseError: a setting is out of its range, or contradicts another.
    """

    steps: int = 500
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "attention,mlp"
    full: bool = False
    distill: bool = False
    thresholds: str = "recalibrate"
    log_every: int = 10
    eval_every: int = 50
    save_every: int = 100
    calibration_tokens: int = 32_768
    early_stop: int | None = None
    bf16: bool = False
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("thresholds", self.thresholds, THRESHOLDS)
        for name, least in (
            *((name, 1) for name in _COUNTS),
            *((name, 0) for name in ("eval_every", "save_every", "weight_decay")),
        ):
            if not getattr(self, name) >= least:
                raise CatsparseError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise CatsparseError(f"{name} must be a positive number, not {value}")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise CatsparseError(
                    f"{name} must be at least 0 and below 1, not {getattr(self, name)}"
                )
        if self.distill and self.full:
            raise CatsparseError(
                "distillation needs the dense model's own weights, which full fine-tuning changes; "
                "train an adapter (without full), or the text's next token (without distill)"
            )
        if self.early_stop is not None and (self.early_stop < 1 or not self.eval_every):
            raise CatsparseError(
                "early_stop counts evaluations: it must be at least 1, and eval_every too"
            )
