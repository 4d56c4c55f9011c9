"""How a preview is cut into stages, and how many of them there are."""

from __future__ import annotations

import pytest

from catsparse.kernels.preview import PreviewKind, preview_shapes
from catsparse.kernels.tiles import TILE, find_ring, find_tiles

FOUR, EIGHT = PreviewKind(4, products=False), PreviewKind(8, products=False)


@pytest.mark.parametrize("kind", [FOUR, EIGHT], ids=str)
@pytest.mark.parametrize("hidden", [8, 64, 576, 1000, 2048, 2880, 4096, 8192, 16384, 32768])
def test_stages_hold_the_rows_of_the_packed_preview(hidden: int, kind: PreviewKind) -> None:
    tiles = find_tiles(hidden, kind, 32768)
    (_, row), (_, scales) = preview_shapes(1, hidden, kind.bits)
    assert row % 16 == scales * 2 % 16 == 0  # whole pieces
    assert tiles.stage * tiles.splits == TILE * (row + 2 * scales)


def test_stages_bound_the_size() -> None:
    for hidden in (2048, 4096, 8192, 16384):
        stage = 4 * 2 * hidden
        assert find_tiles(hidden, FOUR, stage).splits == 1
        assert find_tiles(hidden, FOUR, stage // 2).splits == 2
        assert find_tiles(hidden, EIGHT, stage).splits == 2
    assert find_tiles(32768, EIGHT, 1).splits == 8


def test_a_ring_must_hold_a_whole_tile() -> None:
    """Its dots wait for every stage of the tile before they let one go."""
    row, room = 2 * 16384, 200_000
    assert find_ring(room, 1, row, 16384, None).holds(6)
    assert not find_ring(room, 1, row, 16384, None).holds(7)
    four, eight = find_ring(room, 1, row, 16384, FOUR), find_ring(room, 1, row, 16384, EIGHT)
    assert four.tiles is not None
    assert four.tiles.splits == 4 <= four.stages
    assert four.holds(2)
    assert eight.tiles is not None
    assert eight.tiles.splits == 8 > eight.stages >= 2
    assert not eight.holds(2)
