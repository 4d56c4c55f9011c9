"""From logits to the next tokens on the device, as ``model.generate`` does it.

Nothing here waits for the device or changes shape, so that all of it can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

_Name = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Sampling:
    """What is done to the logits; equal ones can share a graph.

    Args:
        do_sample: draw, instead of taking the likeliest token.
        eos: tokens that finish a row.
        pad: what finished rows emit; needed if there are ``eos``.
        penalty: repetition penalty, or None.
        has_least: whether ``eos`` are ruled out up to a length.
        warpers: transformers' own, in their order.
    """

    do_sample: bool
    eos: tuple[int, ...] = ()
    pad: int | None = None
    penalty: float | None = None
    has_least: bool = False
    warpers: tuple[Any, ...] = field(default=(), compare=False)
    names: tuple[_Name, ...] = field(init=False)

    def __post_init__(self) -> None:
        # transformers' processors compare by identity: their settings stand in for them.
        names = tuple(
            (type(one).__name__, tuple(sorted(vars(one).items()))) for one in self.warpers
        )
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Rows:
    """Static device tensors of a batch that sampling reads and writes.

    Args:
        seen: ``[B, columns]`` the sequences so far, for the repetition penalty. Columns that are
            still free repeat a token of the row, which the penalty counts once anyway.
        finished: ``[B]`` whether a row met an eos.
        least: ``[1]`` columns before which no eos may come.
    """

    seen: Tensor
    finished: Tensor
    least: Tensor

    @classmethod
    def empty(cls, batch: int, columns: int, device: torch.device) -> Rows:
        return cls(
            torch.zeros(batch, columns, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    @property
    def nbytes(self) -> int:
        return self.seen.nbytes + self.finished.nbytes + self.least.nbytes


class Sampler:
    """``logits [B, V]`` to tokens ``[B]``. A graph made of it needs it to stay alive."""

    def __init__(self, sampling: Sampling, vocabulary: int, device: torch.device) -> None:
        self.sampling = sampling
        self._penalty = (
            None
            if sampling.penalty is None
            else RepetitionPenaltyLogitsProcessor(penalty=sampling.penalty)
        )
        self._eos = torch.tensor(sampling.eos, dtype=torch.int64, device=device)
        ids = torch.arange(vocabulary, device=device)
        self._is_eos = (ids[:, None] == self._eos).any(1)

    def __call__(self, logits: Tensor, rows: Rows, column: Tensor) -> Tensor:
        """The tokens of ``column`` (``[1]``, on the device), noted in ``rows``."""
        sampling = self.sampling
        scores = logits.to(dtype=torch.float32, copy=True)
        if self._penalty is not None:
            scores = self._penalty(rows.seen, scores)
        if sampling.has_least and sampling.eos:
            scores = scores.masked_fill(self._is_eos & (column < rows.least), -torch.inf)
        for warper in sampling.warpers:
            scores = warper(rows.seen, scores)
        if sampling.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if sampling.eos and len(tokens) > 1:  # a single row that has finished ends the call
            assert sampling.pad is not None
            tokens = tokens.masked_fill(rows.finished, sampling.pad)
            rows.finished.logical_or_((tokens[:, None] == self._eos).any(1))
        if self._penalty is not None:
            rows.seen.index_copy_(1, column, tokens[:, None])
        return tokens
