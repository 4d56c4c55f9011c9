"""Benchmarks that state ratios measured in one run: to the best dense, and to the byte limit."""

from .decode import bench_decode
from .op import bench_op
from .rows import Row, append_rows
from .shapes import SHAPES, Shape, find_shape
from .tune import TuneRow, bench_tune

__all__ = [
    "SHAPES",
    "Row",
    "Shape",
    "TuneRow",
    "append_rows",
    "bench_decode",
    "bench_op",
    "bench_tune",
    "find_shape",
]
