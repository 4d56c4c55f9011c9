"""Log-likelihoods of continuations, by the conventions of lm-evaluation-harness.

Batches hold inputs of equal length, so nothing is padding and a sparsity meter counts the texts'
own tokens; inputs that agree up to the last token are run once.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CatsparseError
from ..strict_json import shorten

Pair = tuple[str, str]  # context, continuation
Tokens = list[int]


class Score(NamedTuple):
    """Of one continuation: its log-probability in nats, and whether greedy decoding writes it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Batch:
    """How much goes through the model at once: so many ``tokens``, or so many ``rows``."""

    tokens: int | None = None
    rows: int | None = None

    def rows_of(self, length: int) -> int:
        return self.rows if self.rows is not None else max(1, (self.tokens or 1) // length)


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any) -> list[tuple[Tokens, Tokens]]:
    """Token ids of each context and continuation.

    Both are encoded as one text that is cut where the encoded context ends; spaces at the end of
    the context belong to the continuation. An empty context is the tokenizer's first special token.

    Raises:
        CatsparseError: nothing is left to score, or there is no token to begin with.
    """
    split = [_move_spaces(context, continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in split))
    known = dict(zip(contexts, _encode(contexts, tokenizer), strict=True))
    wholes = _encode([context + continuation for context, continuation in split], tokenizer)
    found = []
    for (context, continuation), whole in zip(split, wholes, strict=True):
        if context:
            start, rest = known[context], whole[len(known[context]) :]
        else:
            start, rest = _after_prefix(continuation, tokenizer)
        if not start or not rest:
            raise CatsparseError(
                f"the tokenizer leaves nothing to score of {shorten(continuation)!r} after "
                f"{shorten(context[-40:])!r}; drop this example"
            )
        found.append((start, rest))
    return found


def _move_spaces(context: str, continuation: str) -> Pair:
    kept = context.rstrip()
    return (kept, context[len(kept) :] + continuation)


def _after_prefix(continuation: str, tokenizer: Any) -> tuple[Tokens, Tokens]:
    ids: Tokens = tokenizer.encode(continuation, add_special_tokens=False)
    prefix = _prefix_token(tokenizer)
    if prefix is None:
        raise CatsparseError(
            "this tokenizer has neither a bos nor an eos token to begin a text with; use a task "
            "whose examples have a context"
        )
    return (ids[:1], ids[1:]) if ids and ids[0] == prefix else ([prefix], ids)


def _prefix_token(tokenizer: Any) -> int | None:
    first: int | None = tokenizer.bos_token_id
    return tokenizer.eos_token_id if first is None else first


def _encode(texts: list[str], tokenizer: Any) -> list[Tokens]:
    """With the tokenizer's own special tokens, unless a text begins with one."""
    prefix = _prefix_token(tokenizer)
    written = "" if prefix is None else tokenizer.decode(prefix)
    ids: list[Tokens] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    for index, text in enumerate(texts):
        if written and text.startswith(written):
            ids[index] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def context_window(model: Any, tokenizer: Any) -> int:
    """Tokens the model takes at once: from its config, else from its tokenizer, else 2048."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and limit < 10**9 else 2048


@torch.no_grad()
def loglikelihoods(
    model: Any,
    pairs: Sequence[tuple[Tokens, Tokens]],
    window: int,
    batch: Batch,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """Score each continuation after its context, in the order of ``pairs``.

    What is longer than the context window loses its beginning.

    Args:
        model: a causal language model.
        pairs: token ids of (context, continuation), neither empty.
        window: the context window in tokens.
        batch: how much goes through the model at once.
        advance: told the tokens of each finished batch.

    Raises:
        CatsparseError: a continuation alone is longer than the window, or a log-probability is
            not finite.
    """
    wanted: dict[tuple[int, ...], list[tuple[int, Tokens]]] = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) > window:
            raise CatsparseError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context "
                f"window, {window}; drop this example"
            )
        wanted[_input(context, continuation, window)].append((index, continuation))
    takes = inspect.signature(model.forward).parameters
    scores: dict[int, Score] = {}
    for inputs in _batches(list(wanted), batch):
        asked = [(row, *each) for row, ids in enumerate(inputs) for each in wanted[ids]]
        keep = max(len(continuation) for _, _, continuation in asked)
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in takes:
            options["logits_to_keep"] = keep  # the head costs as much as a few layers
        logits = model(input_ids=torch.tensor(inputs, device=model.device), **options).logits
        found = [_score(logits[row], continuation) for row, _, continuation in asked]
        sums = torch.stack([logprob for logprob, _ in found]).tolist()
        greedy = torch.stack([same for _, same in found]).tolist()
        for (_, index, _), logprob, same in zip(asked, sums, greedy, strict=True):
            scores[index] = Score(logprob, same)
        advance(len(inputs) * len(inputs[0]))
    if not all(math.isfinite(score.logprob) for score in scores.values()):
        raise CatsparseError("a log-probability is not finite; load the model in bf16 or fp32")
    return [scores[index] for index in range(len(pairs))]


def count_tokens(pairs: Sequence[tuple[Tokens, Tokens]], window: int) -> int:
    """Tokens that :func:`loglikelihoods` will run."""
    return sum(map(len, {_input(*pair, window) for pair in pairs}))


def is_truncated(pair: tuple[Tokens, Tokens], window: int) -> bool:
    return len(pair[0]) + len(pair[1]) > window + 1


def _input(context: Tokens, continuation: Tokens, window: int) -> tuple[int, ...]:
    """What the model reads: all but the last token, of which nothing is predicted."""
    return tuple((context + continuation)[-(window + 1) :][:-1])


def _batches(inputs: list[tuple[int, ...]], batch: Batch) -> Iterator[list[tuple[int, ...]]]:
    """Equal lengths together, the longest first: if memory is too small it shows at once."""
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for ids in inputs:
        by_length[len(ids)].append(ids)
    for length in sorted(by_length, reverse=True):
        rows, same = batch.rows_of(length), by_length[length]
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def _score(logits: Tensor, continuation: Tokens) -> tuple[Tensor, Tensor]:
    """Of logits ``[>= N, V]``, whose last N rows predict ``continuation``; in fp32."""
    ids = torch.tensor(continuation, device=logits.device)
    rows = logits[-len(continuation) :].float()
    logprobs = rows.gather(-1, ids[:, None])[:, 0] - rows.logsumexp(-1)
    return logprobs.double().sum(), (rows.argmax(-1) == ids).all()
