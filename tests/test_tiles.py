"""How a gate preview is cut into stages."""

from __future__ import annotations

import pytest

from catsparse.kernels.preview import preview_shapes
from catsparse.kernels.tiles import TILE, find_tiles


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hidden", [8, 64, 576, 1000, 2048, 2880, 4096, 8192, 16384, 32768])
def test_rows_are_those_of_the_packed_preview(hidden: int, bits: int) -> None:
    tiles = find_tiles(hidden, bits, 32768)
    (_, row), (_, scales) = preview_shapes(1, hidden, bits)
    assert (tiles.row, tiles.scale_row) == (row, 2 * scales)
    assert tiles.row % 16 == tiles.scale_row % 16 == 0  # whole pieces
    assert tiles.stage * tiles.splits == TILE * (row + 2 * scales)


def test_stages_bound_the_size() -> None:
    for hidden in (2048, 4096, 8192, 16384):
        stage = 4 * 2 * hidden
        assert find_tiles(hidden, 4, stage).splits == 1
        assert find_tiles(hidden, 4, stage // 2).splits == 2
        assert find_tiles(hidden, 8, stage).splits == 2
    assert find_tiles(32768, 8, 1).splits == 8
