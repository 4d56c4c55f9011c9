"""Versions of ``catsparse.json``: what came with each, and how an older file is read."""

from __future__ import annotations

from typing import Any

from .errors import CatsparseError
from .strict_json import shorten

FORMAT_VERSION = 4

# Keys that came with a version of the format: of the file, of each of its sites, of calibration.
_SINCE: dict[int, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    2: (
        dict.fromkeys(("down_sparsity", "measured_down_sparsity", "preview")),
        dict.fromkeys(("product_threshold", "down_sparsity")),
        {},
    ),
    3: ({"inputs": {}, "scope": "mlp"}, {}, {}),
    4: ({}, {}, {"weights": None}),
}


def upgrade(raw: dict[str, Any], version: int, source: str) -> dict[str, Any]:
    """A file of an older version as this one has it; new keys in it are as unknown as any."""

    def added(part: Any, keys: dict[str, Any], where: str) -> Any:
        if not isinstance(part, dict):
            return part  # build says what is wrong
        if unknown := sorted(part.keys() & keys.keys()):
            raise CatsparseError(
                f"{where} has unknown keys ({', '.join(map(repr, unknown))}) for format version "
                f"{version}; remove them or save it again"
            )
        return part | keys

    for newer in range(version + 1, FORMAT_VERSION + 1):
        of_file, of_site, of_calibration = _SINCE[newer]
        raw = added(raw, of_file, source)
        if isinstance(calibration := raw.get("calibration"), dict):
            raw["calibration"] = added(calibration, of_calibration, f"{source}: calibration")
        if isinstance(sites := raw.get("sites"), dict):
            raw["sites"] = {
                name: added(site, of_site, f"{source}: sites: {shorten(name)}")
                for name, site in sites.items()
            }
    return raw | {"format_version": FORMAT_VERSION}
