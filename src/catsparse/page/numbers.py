"""Numbers and names as the page's JSON holds them: short, finite, and of no one machine."""

from __future__ import annotations

import re

import numpy as np

from ..strict_json import shorten


def rounded(value: float, digits: int = 6) -> float:
    """To so many significant digits: what a reader can use, in few bytes."""
    return float(f"{value:.{digits}g}")


def exact(value: float) -> float:
    """The shortest decimal that rounds to the fp32 nearest to ``value``, at most the largest."""
    largest = float(np.finfo(np.float32).max)
    return float(str(np.float32(min(max(value, -largest), largest))))


def portable(name: str, limit: int = 120) -> str:
    """A name to show: of an absolute path the last part, as pages are for other machines, too."""
    if re.match(r"([A-Za-z]:)?[\\/]|~", name):
        name = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return shorten(name, limit)
