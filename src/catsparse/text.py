"""Text generation for the command line: a prompt in, streamed text and its speed out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from .errors import CatsparseError


@dataclass(frozen=True)
class Written:
    """Generated text (without the prompt) and how fast it came, prefill included."""

    text: str
    tokens: int
    tokens_per_second: float


class TextGenerator:
    """``model.generate`` with one set of options, the same seed for every prompt."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: int,
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        if temperature is not None and temperature <= 0:
            raise CatsparseError("temperature must be above 0; use --greedy for the likeliest text")
        if top_p is not None and not 0 < top_p <= 1:
            raise CatsparseError(f"top-p must be above 0 and at most 1, not {top_p}")
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.options: dict[str, Any] = {"max_new_tokens": tokens}
        if greedy:
            self.options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif temperature is not None or top_p is not None:
            self.options |= {"do_sample": True}
            self.options |= {} if temperature is None else {"temperature": temperature}
            self.options |= {} if top_p is None else {"top_p": top_p}

    def write(self, prompt: str, stream: bool = False) -> Written:
        """Continue ``prompt``; with ``stream`` also print it to stdout as it comes."""
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        length = inputs["input_ids"].shape[1]
        if length == 0:
            raise CatsparseError("the prompt is empty; give some text")
        inputs.pop("token_type_ids", None)
        streamer = TextStreamer(self.tokenizer, skip_special_tokens=True) if stream else None
        torch.manual_seed(self.seed)
        start = time.perf_counter()
        ids = self.model.generate(**inputs, streamer=streamer, **self.options)
        seconds = time.perf_counter() - start
        new = ids[0, length:]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Written(text, len(new), len(new) / seconds)
