"""Thresholds and means as tensors of ``calibration.safetensors``, read and checked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, float32

from .config import CALIBRATION_NAME, CONFIG_NAME, InputConfig, SparsityConfig
from .errors import CatsparseError
from .methods import SiteThreshold


def read_threshold(
    config: SparsityConfig, name: str, names: set[str], get: Callable[[str], Tensor]
) -> SiteThreshold:
    """What one site or input of ``config`` needs.

    Raises:
        CatsparseError: a tensor is missing, of another shape or not finite, or does not fit the
            config.
    """
    site = config.sites.get(name) or config.inputs[name]
    neurons = site.in_features if isinstance(site, InputConfig) else site.intermediate_size
    threshold = _read_vector(f"{name}.threshold", names, get, [(), (neurons,)])
    mean = None
    if config.compensates(name):
        mean = _read_vector(f"{name}.mean", names, get, [(neurons,)])
    if threshold.dim() == 0 and float(threshold) != site.threshold:
        raise CatsparseError(
            f"the threshold of {name} is {site.threshold} in {CONFIG_NAME} but {float(threshold)} "
            f"in {CALIBRATION_NAME}; save it again"
        )
    if isinstance(site, InputConfig):
        return SiteThreshold(threshold, mean, site.threshold, site.sparsity)
    product = None
    if site.product_threshold is not None:
        product = _read_vector(f"{name}.product_threshold", names, get, [(), (neurons,)])
    scalars = site.product_threshold, site.down_sparsity
    return SiteThreshold(threshold, mean, site.threshold, site.sparsity, product, *scalars)


def _read_vector(
    key: str, names: set[str], get: Callable[[str], Tensor], shapes: list[tuple[int, ...]]
) -> Tensor:
    if key not in names:
        raise CatsparseError(f"{CALIBRATION_NAME} lacks {key[:120]}; save it again")
    value = get(key)
    if value.dtype != float32 or tuple(value.shape) not in shapes:
        raise CatsparseError(
            f"{key} in {CALIBRATION_NAME} is {value.dtype} {list(value.shape)}, not float32 of the "
            "site's size; save it again"
        )
    if not bool(value.isfinite().all()):
        raise CatsparseError(f"{key} in {CALIBRATION_NAME} is not finite; save it again")
    return value
