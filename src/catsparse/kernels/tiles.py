"""How cuda.cu streams a gate preview: tiles of neurons in stages of the ring (preview.cuh)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .preview import GROUP, SCALE_GROUPS, groups_of

PREVIEW = Path(__file__).with_name("preview.cuh")
TILE = 16  # neurons


@dataclass(frozen=True)
class Tiles:
    """Layout of a tile's stages.

    Attributes:
        bits: of the preview. groups: of 64 inputs, of a row.
        splits: stages of a tile, each with some of its rows and their scales.
    """

    bits: int
    groups: int
    splits: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.groups * GROUP * self.bits // 8

    @property
    def scale_row(self) -> int:
        """Bytes of a row's scales."""
        return -(-self.groups // SCALE_GROUPS) * SCALE_GROUPS * 2

    @property
    def stage(self) -> int:
        """Bytes."""
        return TILE // self.splits * (self.row + self.scale_row)


def find_tiles(hidden: int, bits: int, stage: int) -> Tiles:
    """Tiles in as few stages of about ``stage`` bytes as hold them."""
    for splits in (1, 2, 4, 8):
        tiles = Tiles(bits, groups_of(hidden), splits)
        if tiles.stage <= stage * 9 // 8:
            break
    return tiles


class PreviewArgument(ctypes.Structure):
    """``Preview`` of preview.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scale")),
        *((name, ctypes.c_int) for name in ("row", "scale_row", "groups")),
    ]

    @classmethod
    def of(cls, preview: Tensor, scale: Tensor, tiles: Tiles) -> PreviewArgument:
        return cls(preview.data_ptr(), scale.data_ptr(), tiles.row, tiles.scale_row, tiles.groups)
