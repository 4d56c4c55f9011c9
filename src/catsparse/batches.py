"""What calibration is given to read -> batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor

from .config import Provenance
from .data import pack_texts
from .errors import CatsparseError

Batch = dict[str, Tensor]
Data = Tensor | Iterable[Batch] | Sequence[str]


def as_batches(
    data: Data,
    tokenizer: Any,
    tokens: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    data_name: str,
    dtype: str,
    weights: str | None,
) -> tuple[Iterable[Batch], int | None, Provenance]:
    """(batches, their number if known, provenance)."""
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise CatsparseError("calibration data must be token ids, batches or a list of texts")
    if isinstance(data, Sequence) and data and all(isinstance(text, str) for text in data):
        if tokenizer is None:
            raise CatsparseError("texts need a tokenizer: calibrate(model, texts, tokenizer)")
        data = pack_texts(data, tokenizer, tokens=tokens, seq_len=seq_len, seed=seed)
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.numel() == 0 or data.is_floating_point():
            raise CatsparseError("token ids must be an integer tensor [windows, length]")
        batches = [{"input_ids": ids} for ids in data.split(batch_size)]
        provenance = Provenance(data_name, data.numel(), data.shape[1], seed, dtype, weights)
        return batches, len(batches), provenance
    count = len(data) if isinstance(data, Sequence) else None
    given = cast("Iterable[Batch]", data)
    return given, count, Provenance(data_name, 0, 0, seed, dtype, weights)
