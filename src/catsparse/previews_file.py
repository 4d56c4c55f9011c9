"""``previews.safetensors`` of a merged directory: previews that a load on a CPU need not make anew.

They are a copy of what follows from the weights, so the file holds SHA-256 of the very weights that
each was made of; a preview of other weights, or of these in another dtype, is not taken, and made
from the weights at hand as without the file. On a GPU they are always made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import SparsityConfig
from .errors import CatsparseError
from .kernels.preview import preview_shapes
from .modules import SparseMLP
from .strict_json import first_sentence, parse_json, shorten

PREVIEWS_NAME = "previews.safetensors"
_DIGESTS = "catsparse.weights"
_ROWS = 1024  # hashed at once, where they are not contiguous or on a GPU

Preview = tuple[Tensor, Tensor]


def write_previews(modules: Mapping[str, SparseMLP], path: Path) -> None:
    """The previews of all ``modules`` and what they were made of.

    They are made here, not taken from the modules: weights written past their version leave those
    behind.

    Raises:
        CatsparseError: the weights of a module cannot be read.
    """
    tensors, digests = {}, {}
    for name, module in modules.items():
        bits, reason = module.catsparse_preview_bits, module.why_not_raw()
        if bits is None:
            continue
        if reason is not None:
            raise CatsparseError(
                f"the preview of {shorten(name)} cannot be stored: {reason}; save it without it"
            )
        gate, up = module.effective_gate_up()
        packed, scale = module.make_preview(bits, module.catsparse_of_products)
        tensors[f"{name}.preview"] = packed.cpu().contiguous()
        tensors[f"{name}.preview_scale"] = scale.cpu().contiguous()
        digests[name] = _digest(gate, up if module.catsparse_of_products else None)
    save_file(tensors, path, {_DIGESTS: json.dumps(digests, sort_keys=True)})


class StoredPreviews:
    """The previews of an artifact with this config; its file is looked for when one is wanted.

    Args:
        config: of the artifact.
        of_products: whether its previews are of W_gate and W_up.
        find: the file's path, or None if there is none.
    """

    def __init__(
        self, config: SparsityConfig, of_products: bool, find: Callable[[], Path | None]
    ) -> None:
        self._config, self._of_products, self._find = config, of_products, find

    def of(self, name: str, gate: Tensor, up: Tensor) -> Preview | None:
        """The preview of a site with these weights, if there is one of the very same.

        Raises:
            CatsparseError: the file is damaged, or does not fit the config.
        """
        if gate.device.type != "cpu" or (path := self._find()) is None:
            return None
        try:
            with safe_open(path, framework="pt") as file:
                digests = parse_json((file.metadata() or {}).get(_DIGESTS, "null"), _DIGESTS)
                if not isinstance(digests, dict):
                    raise CatsparseError(
                        f"{PREVIEWS_NAME} does not say of which weights it is; save the model "
                        "again, or delete that file"
                    )
                if digests.get(name) != _digest(gate, up if self._of_products else None):
                    return None
                keys = set(file.keys())
                wanted = [f"{name}.preview", f"{name}.preview_scale"]
                found = [file.get_tensor(key) for key in wanted if key in keys]
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, CatsparseError):
                raise
            raise CatsparseError(
                f"{PREVIEWS_NAME} is damaged ({first_sentence(error)}); save the model again, or "
                "delete that file"
            ) from error
        site, bits = self._config.sites[name], self._config.preview
        rows = site.intermediate_size * (2 if self._of_products else 1)
        shapes = preview_shapes(rows, site.hidden_size, bits or 0)
        dtypes = (torch.uint8, torch.bfloat16)
        if [(t.shape, t.dtype) for t in found] != [*zip(shapes, dtypes, strict=True)]:
            raise CatsparseError(
                f"{PREVIEWS_NAME} holds no {bits}-bit preview of {shorten(name)}; save the model "
                "again, or delete that file"
            )
        packed, scale = found
        return packed, scale


def _digest(gate: Tensor, up: Tensor | None) -> str:
    digest = hashlib.sha256()
    for weight in (gate, up):
        if weight is None:
            continue
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        for rows in weight.detach().split(_ROWS):
            digest.update(memoryview(rows.cpu().contiguous().view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
