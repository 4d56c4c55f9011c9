"""Text generation for the command line: a prompt in, streamed text and its speed out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from . import decoding
from .errors import CatsparseError
from .text_stream import TextStream

Show = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """Generated text (without the prompt) and how fast it came.

    Attributes:
        ids: ``[T]``, the prompt's tokens and the new ones.
        seconds: of the whole call, prefill included.
        times: seconds from the call to each new token.
        interrupted: Ctrl-C ended it.
    """

    text: str
    ids: Tensor
    prompt_tokens: int
    seconds: float
    times: tuple[float, ...]
    interrupted: bool = False

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def tokens_per_second(self) -> float:
        """Prefill included."""
        return self.tokens / self.seconds

    @property
    def seconds_to_first_token(self) -> float | None:
        """Prefill; None if no token came."""
        return self.times[0] if self.times else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Without the prefill and without the first decode step, in which kernels may be built and
        weights copied; None below three tokens."""
        if len(self.times) < 3:
            return None
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


class TextGenerator:
    """``generate`` with one set of options, the same seed for every prompt."""

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
        compile: bool = False,
    ) -> None:
        if temperature is not None and temperature <= 0:
            raise CatsparseError("temperature must be above 0; use --greedy for the likeliest text")
        if top_p is not None and not 0 < top_p <= 1:
            raise CatsparseError(f"top-p must be above 0 and at most 1, not {top_p}")
        self.model, self.tokenizer, self.tokens, self.seed = model, tokenizer, tokens, seed
        self.options: dict[str, Any] = {"num_beams": 1}  # a streamer follows one beam only
        if compile:
            self.options["step"] = "compile"
        if greedy:
            self.options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif temperature is not None or top_p is not None:
            self.options |= {"do_sample": True}
            self.options |= {} if temperature is None else {"temperature": temperature}
            self.options |= {} if top_p is None else {"top_p": top_p}

    def write(self, prompt: str, show: Show | None = None) -> Written:
        """Continue ``prompt``; ``show`` gets the new text as it comes."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise CatsparseError("the prompt is empty; give some text")
        return self.write_ids(ids, show)

    def write_ids(
        self,
        ids: Tensor,
        show: Show | None = None,
        tokens: int | None = None,
        keep_partial: bool = False,
    ) -> Written:
        """Continue the token ids ``[1, T]``.

        Args:
            show: gets the new text as it comes.
            tokens: the most new tokens, if not the generator's own number.
            keep_partial: Ctrl-C ends the text instead of being raised.
        """
        ids = ids.to(self.model.device)
        torch.manual_seed(self.seed)
        stream = _Stream(self.tokenizer, ids[0].tolist(), show)
        interrupted = False
        try:
            _generate(
                self.model,
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens if tokens is None else tokens,
                streamer=stream,
                **self.options,
            )
        except KeyboardInterrupt:
            if not keep_partial:
                raise
            interrupted = True
        seconds = time.perf_counter() - stream.start
        stream.flush()
        return Written(
            "".join(stream.pieces),
            torch.tensor(stream.ids),
            ids.shape[1],
            seconds,
            tuple(stream.times),
            interrupted,
        )


def _generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """The one place where the command line generates."""
    return decoding.generate(model, ids, **options)


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Keeps every token with its time, and shows the text as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, prompt: list[int], show: Show | None) -> None:
        self.text, self.show = TextStream(tokenizer, prompt), show
        self.times: list[float] = []
        self.pieces: list[str] = []
        self.start = time.perf_counter()
        self._prompt_comes = True  # generate sends the prompt first

    @property
    def ids(self) -> list[int]:
        return self.text.ids

    def put(self, value: Tensor) -> None:
        if self._prompt_comes:
            self._prompt_comes = False
            return
        new = value.flatten().tolist()
        now = time.perf_counter() - self.start
        self.times += [now] * len(new)
        self._keep(self.text.add(new))

    def end(self) -> None:
        pass

    def flush(self) -> None:
        """Show what is left, even half a character."""
        self._keep(self.text.rest())

    def _keep(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            if self.show is not None:
                self.show(piece)
