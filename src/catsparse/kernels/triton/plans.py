"""How a call of the Triton kernels is cut up: plans by shape, programs, and what launches share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import Call

# First gate rows asked for before the previous kernel ends, in kilobytes a program.
PREFETCH_KB = 32
SUM_COLUMNS, SUM_WARPS = 32, 4
MASK_BLOCK = 512
# Of a program that decides: words of a preview's row at a time; neurons, and elements of W_gate's.
DECIDE_WARPS, WORDS = 4, 128
GATE_ROWS, GATE_COLUMNS = 4, 512
LIST_BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """How the work is cut up; chosen by measurement on an H200 (docs/kernels.md).

    Attributes:
        per_sm: programs a multiprocessor. warps: warps a program.
        rows: rows in half a tile.
    """

    per_sm: int
    warps: int
    rows: int

    @property
    def registers(self) -> int:
        """What a thread may use for ``per_sm`` programs to fit."""
        return min(255, 65536 // (self.per_sm * self.warps * 32) // 8 * 8)


def find_plan(block: int, tokens: int, dtype: torch.dtype, weights: str | None = None) -> Plan:
    """The plan for rows padded to ``block`` elements, packed or of floats.

    Packed rows are shorter, so there are more of them in a tile, as long as registers hold them;
    their plans follow from that, and have not been tuned.
    """
    if weights is not None and tokens <= 2:
        per_sm = 2 if block <= 4096 else 1
        if tokens == 2:
            return Plan(per_sm, warps=8, rows=2)
        short = block <= 2048
        return Plan(per_sm, warps=4 if short else 8, rows=4 if short or weights == "int4" else 2)
    if tokens > 2 or (dtype == torch.float32 and block > 2048):
        return Plan(per_sm=1, warps=8, rows=1)
    if tokens == 2:
        return Plan(per_sm=1 if block > 4096 else 2, warps=8, rows=1)
    if block <= 2048:
        return Plan(per_sm=2, warps=4, rows=4)
    return Plan(per_sm=2 if block <= 4096 else 1, warps=8, rows=2)


def preview_rows(tokens: int) -> int:
    """Neurons of a program that decides by a preview: as many as leave its sums in registers."""
    return 16 if tokens == 1 else 8


def kept_rows(plan: Plan, dtype: torch.dtype, weights: str | None = None) -> int:
    """Rows in half a tile of exact rows of what was decided ahead."""
    return plan.rows if weights is not None else max(1, plan.rows * 2 // dtype.itemsize)


def fields(weights: str) -> int:
    """Elements in a word of a row: see rows.py."""
    return {"float": 1, "int4": 8}.get(weights, 4)


def run_words(words: int, warps: int) -> int:
    """How many of a row's words a thread reads at once: at most 16 bytes; of int4 of one group."""
    return min(4, max(1, words // (warps * 32)))


@dataclass(frozen=True)
class Launch:
    """What all launches of a call share.

    Attributes:
        padded: tokens, a power of two. block: elements of a row, likewise.
        weights: the format, ``float`` if they are not packed.
        early: keywords, where a kernel may start before the one ahead has ended.
    """

    padded: int
    block: int
    weights: str
    plan: Plan
    programs: int
    early: dict[str, bool]

    @classmethod
    def of(cls, call: Call) -> Launch:
        import triton

        neurons, hidden = call.w_gate.shape[0], call.x.shape[-1]
        padded = triton.next_power_of_2(call.x.numel() // hidden)
        block = triton.next_power_of_2(max(hidden, call.columns))
        plan = find_plan(block, padded, call.x.dtype, call.weights)
        programs = min(plan.per_sm * multiprocessors(call.x.device), neurons)
        early = {"launch_pdl": True} if launches_early(call.x.device) else {}
        return cls(padded, block, call.weights or "float", plan, programs, early)

    @property
    def shape(self) -> dict[str, Any]:
        """Of a row: see :func:`.rows.places`."""
        words = self.words(self.block)
        return {"FORMAT": self.weights, "BLOCK": words, "RUN": run_words(words, self.plan.warps)}

    def words(self, elements: int) -> int:
        """Of a row of so many elements; of floats, elements."""
        return -(-elements // fields(self.weights))

    @property
    def options(self) -> dict[str, Any]:
        """Of the kernels that hold whole rows in registers."""
        nvidia = {} if torch.version.hip else {"maxnreg": self.plan.registers}
        return {"num_warps": self.plan.warps, **nvidia, **self.early}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter; odd, so that sum_kernel has rows to mask
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Programmatic dependent launch: a kernel starts while the one before it ends."""
    if device.type == "cpu":  # Triton's interpreter
        return False
    import triton.language as tl

    if torch.version.hip is not None:
        return False
    has_waits = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")
    return has_waits and torch.cuda.get_device_capability(device) >= (9, 0)
