"""Activation sparsity for gated-MLP language models: calibrate, sparsify, generate, save,
load.

Importing also lets transformers restore merged directories (``quant_method: cats``).
"""

from . import hub as hub
from . import quantizer
from ._version import __version__
from .allocation import allocate
from .calibration import Calibration
from .config import SparsityConfig
from .decoding import generate
from .errors import CatsparseError
from .explanation import explain
from .hub import load, save
from .meter import achieved_sparsity
from .observation import calibrate
from .probing import measure_sensitivities
from .quantized import quantize_weights
from .sensitivities import Sensitivities
from .surgery import densify, set_backend, sparsify

quantizer.register_with_transformers()

__all__ = [
    "Calibration",
    "CatsparseError",
    "Sensitivities",
    "SparsityConfig",
    "__version__",
    "achieved_sparsity",
    "allocate",
    "calibrate",
    "densify",
    "explain",
    "generate",
    "load",
    "measure_sensitivities",
    "quantize_weights",
    "save",
    "set_backend",
    "sparsify",
]
