"""How cuda.cu streams a preview: tiles of neurons in stages of the ring (preview.cuh)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from .preview import GROUP, SCALE_GROUPS, PreviewKind, groups_of

PREVIEW = Path(__file__).with_name("preview.cuh")
TILE = 16  # neurons


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


class PreviewArgument(ctypes.Structure):
    """``Preview`` of preview.cuh."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "scale")]
