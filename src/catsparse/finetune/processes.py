"""The processes that ``accelerate launch`` or torchrun started, by their environment."""

from __future__ import annotations

import os


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
