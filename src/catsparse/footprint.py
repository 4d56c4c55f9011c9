"""Bytes of MLP weights that a decoded token reads, and what of them sparsity skips."""

from __future__ import annotations

# Of a packed weight, with the scales of int4's groups.
PACKED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 64}


def weight_bytes(dtype: str, weights: str | None) -> float:
    """Bytes of a weight of a model of this dtype, or packed in the format ``weights``."""
    if weights is None:
        return 4 if dtype.endswith("float32") else 2
    return PACKED_BYTES[weights.split("-")[-1]]


def preview_bytes(hidden: int, bits: int) -> int:
    """Bytes of a neuron in a preview of one matrix: codes in groups of 64, scales in pieces of 16
    bytes."""
    groups = -(-hidden // 64)
    return groups * 8 * bits + 16 * -(-groups // 8)


def bytes_skipped(
    sparsity: float,
    down_sparsity: float | None,
    preview: int | None,
    hidden: int,
    itemsize: float,
    of_products: bool = False,
) -> float:
    """Fraction of one gated MLP's weight bytes that a decoded token does not read.

    Without a preview, dropped neurons' rows of W_up and W_down; with one, their rows of W_gate,
    too, less the preview's own bytes (so the fraction is negative if little is dropped).

    Args:
        sparsity: fraction of neurons dropped by the first decision.
        down_sparsity: fraction of W_down's rows not read; None for ``sparsity``.
        preview: its bits; None if the exact gate decides.
        hidden: H.
        itemsize: bytes of a weight.
        of_products: whether the preview is of W_gate and W_up, two matrices to read.
    """
    down = sparsity if down_sparsity is None else down_sparsity
    if preview is None:
        return (sparsity + down) / 3
    read = (2 if of_products else 1) * preview_bytes(hidden, preview) / (hidden * itemsize)
    return (2 * sparsity + down - read) / 3


def sparse_tokens(
    most: int,
    sparsity: float,
    down_sparsity: float | None,
    preview: int | None,
    hidden: int,
    itemsize: int,
    of_products: bool = False,
) -> int:
    """The most tokens of a step, up to ``most``, for which a sparse kernel still skips something.

    A row is read if any token keeps it, so of a sparsity s they leave out s^T, taken as
    independent. Another 2% of the bytes must be left over. The other arguments are those of
    :func:`bytes_skipped`.
    """
    down = sparsity if down_sparsity is None else down_sparsity
    found = 0
    for tokens in range(1, most + 1):
        skipped = bytes_skipped(
            *(sparsity**tokens, down**tokens, preview, hidden, itemsize, of_products)
        )
        found = tokens if skipped > 0.02 else found
    return found
