"""How cuda.cu streams a preview: tiles of neurons in stages of the ring (preview.cuh)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from .preview import GROUP, SCALE_GROUPS, PreviewKind, groups_of
from .stream import stage_count

PREVIEW = Path(__file__).with_name("preview.cuh")
TILE = 16  # neurons
OWN = PreviewKind(4, products=False)  # what int4 weights are packed as


@dataclass(frozen=True)
class Tiles:
    """Layout of a tile's stages.

    Attributes:
        kind: of the preview. groups: of 64 inputs, of a row.
        splits: stages of a tile, each with some of its rows and their scales.
    """

    kind: PreviewKind
    groups: int
    splits: int

    @property
    def stage(self) -> int:
        """Bytes."""
        row = self.groups * GROUP * self.kind.bits // 8
        scales = -(-self.groups // SCALE_GROUPS) * SCALE_GROUPS * 2
        return TILE // self.splits * (row + scales)


def find_tiles(hidden: int, kind: PreviewKind, stage: int) -> Tiles:
    """Tiles in as few stages of about ``stage`` bytes as hold them."""
    for splits in (1, 2, 4, 8):
        tiles = Tiles(kind, groups_of(hidden), splits)
        if tiles.stage <= stage * 9 // 8:
            break
    return tiles


@dataclass(frozen=True)
class Ring:
    """``stages`` of ``stage`` bytes, for rows of weights and a preview's tiles."""

    stage: int
    stages: int
    tiles: Tiles | None

    def holds(self, stages: int) -> bool:
        """So many stages, and a whole tile: its dots wait for all of it."""
        return self.stages >= max(stages, 0 if self.tiles is None else self.tiles.splits)


def find_ring(room: int, rows: int, row: int, hidden: int, kind: PreviewKind | None) -> Ring:
    """In ``room`` bytes, with ``rows`` of ``row`` bytes a stage."""
    tiles = None if kind is None else find_tiles(hidden, kind, rows * row)
    stage = max(rows * row, 0 if tiles is None else tiles.stage)
    return Ring(stage, stage_count(room, stage), tiles)


def tile_defines(tiles: Tiles | None) -> dict[str, int]:
    """The constants of preview.cuh."""
    if tiles is None:
        return {"PREVIEW": 0}
    return {"PREVIEW": tiles.kind.bits, "ROW_GROUPS": tiles.groups, "SPLITS": tiles.splits}


def digit_bytes(dtype: torch.dtype, hidden: int, tokens: int) -> int:
    """What the tokens' digits and their units take in shared memory, or the tokens themselves in
    their place."""
    return tokens * groups_of(hidden) * (GROUP * dtype.itemsize + 4)


class PreviewArgument(ctypes.Structure):
    """``Preview`` of preview.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "scale")]
