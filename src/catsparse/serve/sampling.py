"""The next token of each answer, by that answer's own parameters.

transformers' continuous batching has one set of sampling parameters and one random generator for
all requests, and drops penalties. Here each answer's row of logits goes through the processors
that ``model.generate`` would make for it, and is drawn from by the answer's own generator. So an
answer does not depend on its neighbours, and a seed means the same as for ``model.generate``.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        config: its complete generation config.
        prompt: tokens of the prompt.
        new: tokens of the answer, at most.
        seed: None for one of no one's choice.
    """

    def __init__(self, model: Any, config: Any, prompt: int, new: int, seed: int | None) -> None:
        device = model.device
        self.processors = model._get_logits_processor(config, prompt, device=device)
        self.draws = bool(config.do_sample)
        self.generator = torch.Generator(device)
        self.generator.manual_seed(secrets.randbits(62) if seed is None else seed % 2**63)
        self._ids = torch.empty(1, prompt + new, dtype=torch.long, device=device)
        self._known = 0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all there is to it."""
        return not self.draws and not self.processors

    def choose(self, prompt: list[int], new: list[int], scores: Tensor) -> Tensor:
        """``scores`` ``[1, V]`` in which the chosen token is the greatest."""
        length, before = len(prompt) + len(new), len(prompt)
        # Another worker may have got further, or begun with what the last one wrote as its prompt.
        self._known = min(self._known, length)
        if self._known < before:
            self._ids[0, :before] = torch.tensor(prompt)
            self._known = before
        for at in range(self._known, length):
            self._ids[0, at] = new[at - before]
        self._known = length
        scores = self.processors(self._ids[:, :length], scores)
        if not self.draws:
            return scores
        drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class PerRequest(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Continuous batching's hook: each row by its request's own :class:`Sampler`."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012, as transformers declares it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.samplers: dict[str, Sampler] = {}
        self.steps = 0
        self._rows: list[tuple[Sampler, Any] | None] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Notes which request each row belongs to; nothing has to go to the device."""
        self.steps += 1  # each of them calls this, those of nothing but a prompt's part, too
        self._rows = []
        for request in requests_with_new_token:
            sampler = self.samplers.get(request.state.request_id)
            plain = sampler is None or sampler.is_plain
            self._rows.append(None if plain else (sampler, request.state))  # type: ignore[arg-type]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        for i, row in enumerate(self._rows):
            if row is not None:
                sampler, state = row
                new = state.generated_tokens
                scores[i : i + 1] = sampler.choose(state.initial_tokens, new, scores[i : i + 1])
        return scores
