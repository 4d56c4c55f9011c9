"""An OpenAI-compatible server of one model, through transformers' own.

What is taken from transformers: parameters and the forms of answers (``protocol``), continuous
batching (``batching``). Around it: limits, keys and errors (``app``), each answer's own sampling
(``sampling``), dense and sparse answers side by side (``turns``), a worker that is started again
(``service``), and metrics.
"""

from .settings import Settings

__all__ = ["Settings"]
