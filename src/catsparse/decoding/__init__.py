"""Fast text generation: ``model.generate`` whose decode is one captured graph per token."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import CatsparseError
from .fused import why_not_fused
from .loop import NoRoomError, forget, last_step, memory_bytes, run
from .request import Request, resolve

__all__ = ["forget", "generate", "last_step", "memory_bytes", "why_not_fused", "why_plain"]

_STEPS = ("auto", "compile", "plain")
_WARNED: set[str] = set()


def generate(model: Any, inputs: Any = None, *, step: str = "auto", **kwargs: Any) -> Any:
    """``model.generate``, with decode as one CUDA graph launch for each token.

    Greedy decoding and sampling of text give what ``model.generate`` gives, with the same seed.
    Anything else (beams, custom processors, hidden states, hooks, ...) is passed on to it, and a
    warning says why, once for each reason. On a CPU ``model.generate`` is all there is.

    Buffers and graphs are kept for the next call: :func:`memory_bytes` says how much,
    :func:`forget` frees them. They are made anew once the model changes.

    Args:
        model: a transformers model, dense or sparse.
        inputs: token ids ``[B, T]``, padded on the left; or give ``input_ids=``.
        step: ``auto``: our own kernels for plain decoders (Llama, Mistral, Qwen and what is built
            like them, with heads of 64, 128 or 256 elements; up to 16 sequences), checked against
            the model's own layers on first use, else the model's forward as it is;
            :func:`why_not_fused` tells afterwards why. ``compile``: the model's forward
            compiled, which takes a minute once and may be faster where ours does not serve.
            ``plain``: ``model.generate`` itself.
        **kwargs: those of ``model.generate``.

    Returns:
        Prompts and answers, ``[B * num_return_sequences, T + new]``, on the model's device; what
        ``model.generate`` returns if it serves the call.

    Raises:
        CatsparseError: ``step`` is unknown, or ``compile`` on a CPU.
    """
    if step not in _STEPS:
        raise CatsparseError(f"step must be one of {', '.join(_STEPS)}, not {step!r}")
    if step == "compile" and _is_on_cpu(model):
        raise CatsparseError("step='compile' needs a GPU; on a CPU leave it out")
    if step == "plain" or _is_on_cpu(model):
        return model.generate(inputs, **kwargs)
    request = resolve(model, inputs, kwargs)
    if isinstance(request, Request):
        try:
            return run(request, compiled=step == "compile")
        except NoRoomError as error:
            request = str(error)
    if request not in _WARNED:
        _WARNED.add(request)
        warnings.warn(f"model.generate runs this call: {request}", stacklevel=2)
    return model.generate(inputs, **kwargs)


def why_plain(model: Any, inputs: Any = None, **kwargs: Any) -> str | None:
    """Why :func:`generate` would pass this call to ``model.generate``; None if it would not."""
    request = resolve(model, inputs, kwargs)
    if not isinstance(request, Request):
        return request
    return "the model is on a CPU" if _is_on_cpu(model) else None


def _is_on_cpu(model: Any) -> bool:
    return getattr(getattr(model, "device", None), "type", "cpu") != "cuda"
